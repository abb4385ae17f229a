"""ImageTrunk: base class of trunks from other libraries' networks; their weights may come from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pml_fewshot.checks import MissingFileError, UsageError, check_floats
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.io.checkpoint import check_weights
from pml_fewshot.io.tensors import read_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]; most networks expect this normalization
IMAGENET_STD = (0.229, 0.224, 0.225)
OFFLINE = "get its file on a machine with a network and give checkpoint=PATH (docs/how-to/offline.md)"


class ImageTrunk(nn.Module):
    """A network preceded by the normalization that it was trained with; gray images are repeated to its channels.

    Args:
        model: the network.
        mean, std: of each channel, for pixels in [0, 1]; not in the state dict, as they are not weights.
        preprocessing: turns an image of any size into the network's input, if that is known.
        name: the name by which the model was created; empty for a model that was passed in.
        pretrained: start in eval mode: batch norms keep their statistics, even in `fit`, which still trains weights,
            until somebody calls `train()`. A network whose batch norms hold statistics always does so.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        preprocessing: Preprocessing | None,
        name: str,
        pretrained: bool,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(each > 0 for each in std):
            got = f"mean={tuple(mean)} and std={tuple(std)}"
            raise UsageError(f"expected a mean and a deviation above 0 for each channel, got {got}; give three each")
        self.model = model
        self.preprocessing = preprocessing
        self.name = name
        self.mean = nn.Buffer(torch.tensor([float(each) for each in mean]).view(1, -1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor([float(each) for each in std]).view(1, -1, 1, 1), persistent=False)
        self._width = 0
        if pretrained or any(map(_holds_statistics, model.modules())):
            self.eval()

    def normalized(self, images: Tensor) -> Tensor:
        check_floats(images)
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            wanted = f"images (B, 1 or {channels}, H, W)" if channels > 1 else "gray images (B, 1, H, W)"
            raise UsageError(f"expected {wanted}, got shape {tuple(images.shape)}; convert them")
        return (images.expand(-1, channels, -1, -1) - self.mean) / self.std

    @property
    def width(self) -> int:
        """D of the embeddings, from one blank image in eval mode: a model's own figure is not always right."""
        if not self._width:
            size = (224, 224) if self.preprocessing is None else self.preprocessing.size
            weight = next((p for p in self.parameters() if p.is_floating_point()), self.mean)
            with evaluating(self):
                self._width = self(weight.new_zeros(1, self.mean.shape[1], *size)).shape[1]
        return self._width


def _holds_statistics(module: nn.Module) -> bool:
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and bool(mean.any() or (var != 1).any())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A network's weights from a file: safetensors, or a state dict saved by torch, also under "state_dict" or "model".

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is broken, or holds more than tensors (and is not loaded).
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise MissingFileError(f"expected a file of weights at {path}, got no such file; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler can raise anything
        got = str(error).partition("\n")[0][:200] or type(error).__name__
        wanted = f"a state dict of tensors alone at {path}"
        raise UsageError(f"expected {wanted}, got another file ({got}); save model.state_dict()") from error
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        got = f"a {type(content).__name__} of something else"
        raise UsageError(f"expected a state dict of tensors at {path}, got {got}; save model.state_dict()")
    return content


def load_weights(model: nn.Module, path: str | Path, classifiers: Sequence[str]) -> None:
    """Loads a network's weights from a file; those of removed layers may be in it and are ignored.

    Args:
        classifiers: names of the removed layers.

    Raises:
        UsageError: as in `read_weights`; or a weight is missing, unknown or of another shape.
    """
    own: dict[str, Any] = model.state_dict()
    stored = {name: value for name, value in read_weights(path).items() if name.rpartition(".")[0] not in classifiers}
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # old versions' files lack these, and nothing here needs them
            stored.setdefault(name, value)
        if name in stored and stored[name].is_floating_point() and value.is_floating_point():
            stored[name] = stored[name].to(value.dtype)
    check_weights(own, stored, str(path))
    model.load_state_dict(stored)
