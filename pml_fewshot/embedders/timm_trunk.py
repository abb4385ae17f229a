"""TimmTrunk: any image network from timm."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError, import_extra
from pml_fewshot.embedders.image_trunk import OFFLINE, ImageTrunk, load_weights
from pml_fewshot.embedders.preprocessing import Preprocessing


class TimmTrunk(ImageTrunk):
    """A timm network without its classifier, with its own normalization, size, crop and interpolation.

    Args:
        model: a name, such as "tf_efficientnet_lite0" or "hf-hub:owner/name"; or a model from `timm.create_model`,
            whose classifier, if it has one, is removed from it.
        pretrained: download timm's weights for the name from the Hugging Face hub.
        checkpoint: or a file with the weights, safetensors or a state dict saved by torch. Those of a classifier in it
            are ignored.
        mean, std: of each channel, for pixels in [0, 1], if the weights were trained with other values than timm's.

    A pretrained trunk, or one whose batch norms hold statistics, starts in eval mode: batch norms keep them, even
    in `fit`, until somebody calls `train()`. Its `preprocessing` equals timm's `create_transform`; it is None where
    timm pads images or expects a shape other than a square (10 to 20 of its 3,400 sets of weights).

    Shapes: (B, 1 or 3, H, W) -> (B, width): 1,280-d for tf_efficientnet_lite0.

    Raises:
        MissingPackageError: timm is not installed (the extra `timm`).
        UsageError: no model of that name, a failed download, or a file whose weights do not fit.
    """

    def __init__(
        self,
        model: nn.Module | str,
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        timm = import_extra("timm", "for TimmTrunk", "timm")
        name = model if isinstance(model, str) else ""
        if isinstance(model, str):
            if pretrained and checkpoint is not None:
                raise UsageError("expected pretrained=True or a checkpoint, got both; leave one out")
            model = _create(timm, model, pretrained)
        elif pretrained:
            got = f"pretrained=True with a {type(model).__name__}"
            raise UsageError(f"expected pretrained=True with a model's name, got {got}; pass it to timm.create_model")
        if not isinstance(model, nn.Module) or not hasattr(model, "reset_classifier"):
            got = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
            do = "give other networks to TorchvisionTrunk or to Embedder directly"
            raise UsageTypeError(f"expected a model of timm or the name of one, got {got}; {do}")
        model.reset_classifier(0)  # type: ignore[operator]
        data = timm.data.resolve_model_data_config(model)
        if checkpoint is not None:
            names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
            load_weights(model, checkpoint, [names] if isinstance(names, str) else names)
        mean, std = data["mean"] if mean is None else mean, data["std"] if std is None else std
        own_size = getattr(getattr(model, "patch_embed", None), "img_size", None)  # of ViTs created for another size
        preprocessing = _preprocessing(data, own_size or data["input_size"][1:], len(mean))
        super().__init__(model, mean, std, preprocessing, name, pretrained or checkpoint is not None)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalized(images))


def _create(timm: Any, name: str, pretrained: bool) -> nn.Module:
    if ":" not in name and not timm.is_model(name):  # (a name with a colon is a place to fetch it from)
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        do = f"did you mean {near[0]!r}?" if near else "timm.list_models() lists them"
        raise UsageError(f"expected a model of timm, got {name!r}; {do}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:  # from the hub, not only of the network; a tag that timm does not know
        got = str(error).partition("\n")[0][:200] or type(error).__name__
        wanted = f"weights of {name} from the hub" if pretrained else f"a model of timm named {name!r}"
        raise UsageError(f"expected {wanted}, got an error ({got}); {OFFLINE}") from error


def _preprocessing(data: dict[str, Any], size: Sequence[int], channels: int) -> Preprocessing | None:
    """timm's `transforms_imagenet_eval` as a Preprocessing; None if it cannot be expressed as one."""
    height, width = size
    scaled = math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"])
    known = data["crop_mode"] == "squash" or (data["crop_mode"] == "center" and height == width)
    if not known or channels not in (1, 3):
        return None
    scale_to = scaled if data["crop_mode"] == "squash" else scaled[0]
    return Preprocessing((height, width), scale_to, data["interpolation"], channels)
