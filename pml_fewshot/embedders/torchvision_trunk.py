"""Any classification network of torchvision.models as a trunk."""

import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError


class TorchvisionTrunk(nn.Module):
    """A torchvision classifier without its last linear layer, fed with images in [0, 1].

    Gray images are repeated to three channels, and pixels are normalized as torchvision's weights expect.

    Args:
        model: a model of torchvision.models: `resnet18(weights="DEFAULT")`. One without a linear layer (SqueezeNet) is
            refused, because it is not known where its embedding is.

    Shapes: (B, 1 or 3, H, W) -> (B, inputs of the removed layer): 512-d for resnet18.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UsageTypeError(f"expected a model, got {model!r}; call it, or put it into a config as partial(...)")
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            wanted, got = "a model that ends in a linear layer", f"{type(model).__name__}, which has none"
            raise UsageError(f"expected {wanted}, got {got}; give a module without a classifier to Embedder directly")
        model.set_submodule(linear[-1], nn.Identity())
        self.model = model
        # of ImageNet's pixels in [0, 1], by which torchvision's pretrained weights expect them normalized
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.model((images.expand(-1, 3, -1, -1) - self.mean) / self.std)
        # GoogLeNet and Inception return a named tuple in training mode, with the outputs of auxiliary heads
        return (out if isinstance(out, Tensor) else out.logits).flatten(1)
