"""TorchvisionTrunk: any classification network from torchvision.models."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError, check_choice
from pml_fewshot.embedders.image_trunk import IMAGENET_MEAN, IMAGENET_STD, OFFLINE, ImageTrunk, load_weights
from pml_fewshot.embedders.preprocessing import Preprocessing


class TorchvisionTrunk(ImageTrunk):
    """A torchvision classifier without its last linear layer, for images in [0, 1].

    Gray images are repeated to three channels, and pixels are normalized as the weights expect.

    Args:
        model: a name, such as "resnet18"; or a model from torchvision.models, such as `resnet18(weights="DEFAULT")`,
            whose last linear layer is removed from it. One without a linear layer (SqueezeNet) is refused, because it
            is not known where its embedding is.
        weights: torchvision's weights: "DEFAULT", "IMAGENET1K_V1" or a member of the model's enum
            (`ResNet18_Weights.DEFAULT`). With a name they are downloaded; with a model the member says which it has,
            because normalization and preprocessing are those of its `transforms()`.
        checkpoint: or a file with the weights, safetensors or a state dict saved by torch, such as torchvision
            downloads. Those of the last linear layer in it are ignored.
        mean, std: of each channel, for pixels in [0, 1], if the weights were trained with other values; ImageNet's when
            neither these nor the weights specify them.

    A pretrained trunk, or one whose batch norms hold statistics, starts in eval mode: batch norms keep them, even
    in `fit`, until somebody calls `train()`. Without weights, `preprocessing` is that of most torchvision weights: the
    shorter side scaled to 256, a 224 x 224 center crop, bilinear.

    Shapes: (B, 1 or 3, H, W) -> (B, inputs of the removed layer): 512-d for resnet18.

    Raises:
        UsageError: no model or weights of that name, no linear layer, a failed download, or a file whose weights do not
            fit.
    """

    def __init__(
        self,
        model: nn.Module | str,
        weights: Enum | str | None = None,
        checkpoint: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if weights is not None and checkpoint is not None and isinstance(model, str):
            raise UsageError("expected weights or a checkpoint, got both; leave one out")
        name = model if isinstance(model, str) else ""
        if isinstance(model, str):
            model, weights = _named(model, weights)
        if not isinstance(model, nn.Module):
            raise UsageTypeError(f"expected a model, got {model!r}; call it, or put it into a config as partial(...)")
        if isinstance(weights, str):
            do = "name the model too, or give the member of its enum"
            raise UsageError(f"expected weights {weights!r} with a model's name, got {type(model).__name__}; {do}")
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            wanted, got = "a model that ends in a linear layer", f"{type(model).__name__}, which has none"
            raise UsageError(f"expected {wanted}, got {got}; give a module without a classifier to Embedder directly")
        model.set_submodule(linear[-1], nn.Identity())
        if checkpoint is not None:
            load_weights(model, checkpoint, linear[-1:])
        preprocessing, own_mean, own_std = _transforms(weights)
        pretrained = weights is not None or checkpoint is not None
        super().__init__(model, mean or own_mean, std or own_std, preprocessing, name, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(self.normalized(images))
        # GoogLeNet and Inception return a named tuple in training mode, with the outputs of auxiliary heads
        return (out if isinstance(out, Tensor) else out.logits).flatten(1)


def _named(name: str, weights: Any) -> tuple[nn.Module, Enum | None]:
    from torchvision import models

    check_choice("a model of torchvision", name, models.list_models(module=models))
    if isinstance(weights, str):
        kinds = models.get_model_weights(name)
        check_choice(f"the weights of {name}", weights, list(kinds.__members__))
        weights = kinds[weights]
    try:
        return models.get_model(name, weights=weights), weights
    except OSError as error:
        wanted, got = f"weights of {name} at {weights.url}", str(error) or type(error).__name__
        raise UsageError(f"expected {wanted}, got an error ({got}); {OFFLINE}") from error


def _transforms(weights: Any) -> tuple[Preprocessing, Sequence[float], Sequence[float]]:
    """Preprocessing, mean and standard deviation of a member of torchvision's enums."""
    if weights is None:
        return Preprocessing((224, 224), 256), IMAGENET_MEAN, IMAGENET_STD
    own = weights.transforms()
    wanted = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if not all(hasattr(own, name) for name in wanted):
        raise UsageError(f"expected weights of a classifier of images, got {weights}; choose another model")
    (crop,), (scale,) = own.crop_size, own.resize_size
    return Preprocessing((crop, crop), scale, own.interpolation.value), own.mean, own.std
