"""Any classification network of torchvision.models as a trunk."""

import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError

# Mean and standard deviation of ImageNet's pixels in [0, 1], by which torchvision's pretrained weights expect them
# normalized.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TorchvisionTrunk(nn.Module):
    """A torchvision classifier without its last linear layer, fed with images in [0, 1].

    Gray images are repeated to three channels, and pixels are normalized as torchvision's weights expect.

    Args:
        model: a model of torchvision.models: `resnet18(weights="DEFAULT")`.

    Shapes: (B, 1 or 3, H, W) -> (B, inputs of the removed layer): 512-d for resnet18.

    Raises:
        UsageTypeError: the model is the function that makes one.
        UsageError: the model has no linear layer (SqueezeNet), so it is not known where its embedding is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UsageTypeError(f"expected a model, got {model!r}; call it, or put it into a config as partial(...)")
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UsageError(
                f"expected a model that ends in a linear layer, got {type(model).__name__}, which has none; give a "
                "module that maps images to embeddings to Embedder(trunk=...) directly"
            )
        model.set_submodule(linear[-1], nn.Identity())
        self.model = model
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.model((images.expand(-1, 3, -1, -1) - self.mean) / self.std)
        # GoogLeNet and Inception return a named tuple in training mode, with the outputs of auxiliary heads
        return (out if isinstance(out, Tensor) else out.logits).flatten(1)
