"""TransformersTrunk: vision models from Hugging Face's transformers."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, import_extra
from pml_fewshot.embedders.image_trunk import ImageTrunk
from pml_fewshot.embedders.preprocessing import Preprocessing


class TransformersTrunk(ImageTrunk):
    """A vision model from transformers with the normalization and preprocessing of its image processor.

    The embedding is that of the image in a space shared with text if the model has one (CLIP, SigLIP), else its pooled
    output, else the mean of the last hidden state over tokens or positions.

    Args:
        model: a folder written by `save_pretrained` or a name on the Hugging Face hub, loaded by AutoModel; or a model.
        processor: its image processor, or the folder or name of one; when None, that of the model's folder or name.

    A pretrained trunk starts in eval mode: batch norms and dropout stay in it, even in `fit`, until somebody calls
    `train()`. The center crop of its `preprocessing` may be one pixel off from transformers' own, which rounds down.
    `preprocessing` is None if the processor has no fixed output size; then pass one to ImageEmbedder.

    Shapes: (B, 1 or 3, H, W) -> (B, width): 768-d for ViT-B/16.

    Raises:
        MissingPackageError: transformers is not installed (the extra `hf`).
        UsageError: a folder or name that cannot be loaded, no processor, or one that scales pixels differently.
    """

    def __init__(self, model: nn.Module | str | Path, processor: Any = None) -> None:
        transformers = import_extra("hf", "for TransformersTrunk", "transformers")
        named = isinstance(model, str | Path)
        source = str(model if named else getattr(model, "name_or_path", ""))
        pretrained = bool(source)
        model = _loaded(transformers.AutoModel, source) if isinstance(model, str | Path) else model
        if processor is None and not source:
            do = "give processor=, for example ViTImageProcessor()"
            raise UsageError(f"expected the image processor of {type(model).__name__}, got none; {do}")
        if processor is None or isinstance(processor, str | Path):
            processor = _loaded(transformers.AutoImageProcessor, str(processor or source))
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        if not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-3:
            got = f"do_rescale={processor.do_rescale} by {processor.rescale_factor}"
            raise UsageError(f"expected an image processor that scales pixels by 1/255, got {got}; set it so")
        super().__init__(model, mean, std, _preprocessing(processor), source if named else "", pretrained)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.normalized(images)
        shared = getattr(self.model, "get_image_features", None)
        out = self.model(pixel_values=pixels) if shared is None else shared(pixel_values=pixels)
        return out if isinstance(out, Tensor) else _pooled(out, self.model)


def _loaded(kind: Any, source: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        got = " ".join(str(error).split())[:200]
        do = "copy the folder of the model and give its path (docs/how-to/offline.md)"
        raise UsageError(f"expected a vision model at {source}, got an error ({got}); {do}") from error


def _pooled(out: Any, model: nn.Module) -> Tensor:
    for name in ("image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).flatten(1)  # ResNets return (B, D, 1, 1)
    hidden = getattr(out, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        got = f"{type(out).__name__} from {type(model).__name__}"
        raise UsageError(f"expected a pooled output or a last hidden state, got {got}; give its .base_model")
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)


def _preprocessing(processor: Any) -> Preprocessing | None:
    """An image processor's resizing and crop as a Preprocessing; None if they cannot be expressed as one."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    resampling = Image.Resampling(int(processor.resample)).name.lower()
    edge, fixed = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    crop_pct = getattr(processor, "crop_pct", None)
    if edge and crop_pct:  # ConvNeXt, which crops only below 384 pixels
        kept, scale_to = (edge, edge), int(edge / crop_pct) if edge < 384 else (edge, edge)
    elif getattr(processor, "do_center_crop", False) and crop:
        kept, scale_to = (crop["height"], crop["width"]), edge or fixed
    else:
        kept, scale_to = fixed, fixed
    known = resampling in ("nearest", "bilinear", "bicubic", "lanczos") and all(kept)
    if not processor.do_resize or not known or not (isinstance(scale_to, int) or all(scale_to)):
        return None
    return Preprocessing(kept, scale_to, resampling)  # type: ignore[arg-type]
