"""ImageTrunk: what trunks made of other libraries' networks share; their weights may come from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.io.checkpoint import check_weights
from pml_fewshot.io.tensors import read_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], by which most networks expect them normalized
IMAGENET_STD = (0.229, 0.224, 0.225)
OFFLINE = "get its file on a machine with a network and give checkpoint=PATH (docs/how-to/offline.md)"


class ImageTrunk(nn.Module):
    """A network behind the normalization that it was trained with; gray images are repeated to its channels.

    Args:
        model: the network.
        mean, std: of each channel of pixels in [0, 1]; no part of the state dict, for they are no weights.
        preprocessing: what turns an image of any size into the network's input, where that is known.
        name: by which the model was made; empty of one that was given.
        pretrained: start in eval mode: batch norms keep their statistics until somebody calls `train()`, in `fit`
            too, where weights are trained all the same. A network whose batch norms hold statistics does so anyway.
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
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            wanted = f"images (B, 1 or {channels}, H, W)" if channels > 1 else "gray images (B, 1, H, W)"
            raise UsageError(f"expected {wanted}, got shape {tuple(images.shape)}; convert them")
        return (images.expand(-1, channels, -1, -1) - self.mean) / self.std

    @property
    def width(self) -> int:
        """D of the embeddings, from one blank image in eval mode: what a model says of its width is not always so."""
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
    """A network's weights of a file: safetensors, or a state dict saved by torch, also one below "state_dict".

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is broken, or holds more than tensors (which is not loaded).
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise MissingFileError(f"expected a file of weights at {path}, got no such file; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler happens to meet
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
    """Reads a network's weights from a file; those of layers that were cut off may be there and are left out.

    Args:
        classifiers: the names that these layers had.

    Raises:
        UsageError: as `read_weights`; or a weight is missing, unknown or of another shape.
    """
    own: dict[str, Any] = model.state_dict()
    stored = {name: value for name, value in read_weights(path).items() if name.rpartition(".")[0] not in classifiers}
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # which files of old versions lack, and nothing here needs
            stored.setdefault(name, value)
        if name in stored and stored[name].is_floating_point() and value.is_floating_point():
            stored[name] = stored[name].to(value.dtype)
    check_weights(own, stored, str(path))
    model.load_state_dict(stored)
