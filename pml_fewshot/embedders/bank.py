"""EmbeddingBank: a data set's embeddings, computed once and evaluated many times; and banks in files of any tool."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import (
    BLOCK_ROWS,
    MissingFileError,
    UsageError,
    UsageTypeError,
    check_choice,
    check_finite,
    check_labels,
)
from pml_fewshot.embedders.modes import widened
from pml_fewshot.io.tensors import read_tensors, write_tensors

ClassName = str | int  # a class's name, or its label where the source has no names

FORMATS = (".npy", ".npz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class EmbeddingBank:
    """Embeddings of a data set with its labels.

    Args:
        embeddings: (M, D) floats, all finite; a tensor over a memory map stays one (`load_bank` makes it).
        labels: (M,) int64, of any values; where there are class names, indices into them.
        source: fingerprint of the data set that was embedded, which tells that results from the bank and from the set
            are on the same episodes; empty when unknown.
        class_names: where the source has names. Two banks that meet (queries and references) are aligned by them.
    """

    embeddings: Tensor
    labels: Tensor
    source: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        if len(shape) != 2:
            raise UsageError(f"expected embeddings of shape (M, D), got shape {shape}; flatten each item to one row")
        if not self.embeddings.is_floating_point():
            raise UsageTypeError(f"expected float embeddings, got {self.embeddings.dtype}; convert them with .float()")
        check_labels(self.labels, len(self.embeddings), "the bank's")
        check_finite(self.embeddings, "embeddings")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if repeated := [name for name, count in Counter(self.class_names).items() if count > 1]:
            raise UsageError(f"expected different class names, got {repeated[:3]} more than once; rename them")
        if self.class_names and len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= len(self.class_names):
                wanted = f"labels that are indices into the {len(self.class_names)} class names"
                raise UsageError(f"expected {wanted}, got labels from {low} to {high}; number the classes from 0")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "EmbeddingBank":
        return replace(self, embeddings=self.embeddings.to(device), labels=self.labels.to(device))

    def fingerprint(self) -> str:
        """16 hex digits that identify the set: its source where known, else a hash of its labels and class names."""
        labels = self.labels.cpu().contiguous().numpy().astype("<i8")
        names = json.dumps(self.class_names).encode() if self.class_names else b""
        return self.source or hashlib.blake2b(labels.data.tobytes() + names, digest_size=8).hexdigest()

    def mean(self) -> Tensor:
        """The mean embedding (D,), summed in float64, read a block at a time."""
        sums = [block.sum(dim=0, dtype=torch.float64) for block in self.embeddings.split(BLOCK_ROWS)]
        return (torch.stack(sums).sum(dim=0) / len(self)).to(widened(self.embeddings[:0]))

    def centered(self, mean: Tensor) -> "EmbeddingBank":
        """Subtracts a mean (D,) from every row: `train_bank.mean()` (Wang et al. 2019, SimpleShot).

        The result is float32 at least, as 16 bits would round what is left.
        """
        shape, got = tuple(self.embeddings.shape[1:]), tuple(mean.shape)
        if shape != got:
            raise UsageError(f"expected a mean of shape {shape}, got {got}; use bank.mean()")
        rows = widened(self.embeddings)
        return replace(self, embeddings=rows - mean.to(rows))

    def normalized(self) -> "EmbeddingBank":
        """Scales every embedding to length 1, in float32 at least; with `centered` before it, SimpleShot's "CL2N"."""
        return replace(self, embeddings=F.normalize(widened(self.embeddings), dim=1))


def align(source: Any, to: Any) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of a set, bank or Gallery as another numbers its classes: by name; and the names, new ones at the end.

    Raises:
        UsageError: one has names and the other has none.
    """
    if bool(source.class_names) != bool(to.class_names):
        known, unknown = (source, to) if source.class_names else (to, source)
        names = ", ".join(map(repr, known.class_names[:3]))
        raise UsageError(
            f"expected class names on both sides or on none, got {names}, .. on one ({type(known).__name__}), numbers "
            f"alone on the other ({type(unknown).__name__}); give it class_names=[...], or take them from both"
        )
    if source.class_names == to.class_names:
        return source.labels, to.class_names
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*to.class_names, *source.class_names)))}
    renumbered = torch.tensor([numbers[name] for name in source.class_names], device=source.labels.device)
    return renumbered[source.labels], tuple(numbers)


def names_of(labels: Tensor, class_names: Sequence[str]) -> list[ClassName]:
    """What each label (N,) stands for: its class's name, or the label itself where there are no names."""
    return [class_names[label] if class_names else label for label in labels.tolist()]


def save_bank(path: str | Path, bank: EmbeddingBank) -> None:
    """Writes a bank as safetensors, atomically; `load_bank` and any other tool can read it."""
    if Path(path).suffix != ".safetensors":
        raise UsageError(f"expected a path that ends with .safetensors, got {path}; rename it")
    names = {"class_names": json.dumps(bank.class_names)} if bank.class_names else {}
    write_tensors(path, {"embeddings": bank.embeddings, "labels": bank.labels}, {"source": bank.source, **names})


def load_bank(
    path: str | Path, labels: str | Path | None = None, embeddings_key: str | None = None, labels_key: str | None = None
) -> EmbeddingBank:
    """Reads embeddings and labels, onto the CPU, from a file that cannot run code.

    Args:
        path: .npy, .npz, .pt or .pth (a dict, or a pair), or .safetensors. A .npy holds only embeddings and is
            memory-mapped, read-only (writing to them would crash the process), so it may be larger than memory.
        labels: file of the labels where they are not in `path`, of any of these formats; for a .npy `<name>_labels.npy`
            beside it when None. Texts are class names, numbered in alphabetical order.
        embeddings_key: name of the embeddings in the file; when None "embeddings", else the only floats of two axes.
        labels_key: name of the labels; when None "labels", else the only integers (or texts) of one axis.

    Raises:
        MissingFileError: there is no such file.
        UsageError: an unknown format, a broken file, one that holds objects other than data or in which it is not
            clear what the embeddings and labels are, or what makes no EmbeddingBank.
    """
    path = Path(path)
    tensors, texts = _read(path)
    source, embeddings = texts.get("source", ""), _choose(tensors, embeddings_key, "embeddings", path)
    if labels is None and path.suffix == ".npy":
        labels = path.with_name(f"{path.stem}_labels.npy")
    if labels is not None:
        path = Path(labels)
        tensors, texts = _read(path)
    numbers, names = _choose(tensors, labels_key, "labels", path), json.loads(texts.get("class_names", "[]"))
    if isinstance(numbers, np.ndarray):
        labels_of_items = np.char.decode(numbers, "utf-8") if numbers.dtype.kind == "S" else numbers
        names, index = np.unique(labels_of_items, return_inverse=True)
        numbers, names = torch.from_numpy(index), map(str, names)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise UsageTypeError(f"expected labels as integers or texts in {path}, got {numbers.dtype}; convert them")
    return EmbeddingBank(embeddings, numbers.long(), source, tuple(names))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All arrays of a file by name, tensors or texts (numpy), and what `save_bank` wrote beside them."""
    check_choice("the file's ending", path.suffix, FORMATS)
    if not path.is_file():
        raise MissingFileError(f"expected a file of embeddings or labels at {path}, got none; check the path")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file:  # numpy leaves a broken one open
                parts = dict(np.load(file, allow_pickle=False))
        elif path.suffix == ".npy":  # "r": Linux refuses a writable map that is larger than memory, even a private one
            parts = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            parts = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(parts, Tensor | np.ndarray):
            parts = {path.stem: parts}
        elif isinstance(parts, list | tuple) and len(parts) == 2:
            parts = {"embeddings": parts[0], "labels": parts[1]}
        return {str(name): _tensor(part) for name, part in parts.items() if _is_array(part)}, {}
    except PermissionError:
        raise
    except Exception as error:  # on broken files readers raise whatever their code happens to meet
        reason = str(error).partition("\n")[0] or type(error).__name__
        got = f"a file that is broken or holds more than data ({reason})"
        raise UsageError(f"expected arrays in {path}, got {got}; write plain ones, in a dict or as a pair") from error


def _is_array(part: Any) -> bool:
    flat_list = isinstance(part, list | tuple) and bool(part) and isinstance(part[0], int | float | str)
    return flat_list or isinstance(part, Tensor | np.ndarray)


def _tensor(array: Tensor | np.ndarray | Sequence[Any]) -> Tensor | np.ndarray:
    """A tensor, over the same memory map where there is one; texts stay a numpy array."""
    if isinstance(array, Tensor):
        return array.detach()
    array = np.asarray(array)
    if array.dtype.kind in "US":
        return array
    with warnings.catch_warnings():  # nothing here writes to embeddings, and `load_bank` says that nobody may
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _choose(tensors: dict[str, Any], key: str | None, wanted: str, path: Path) -> Any:
    """The tensor that is meant: the one of that name, else the only one that it can be."""
    listing = ", ".join(f"{n} {tensor.dtype} {tuple(tensor.shape)}" for n, tensor in tensors.items()) or "nothing"
    name = wanted if key is None else key
    if name in tensors:
        return tensors[name]
    if key is not None:
        raise UsageError(f"expected {wanted} named {key!r} in {path}, got {listing}; give one of these names")
    axes, what = (2, "floats of two axes") if wanted == "embeddings" else (1, "integers or texts of one axis")
    is_float = {name: isinstance(each, Tensor) and each.is_floating_point() for name, each in tensors.items()}
    fitting = [each for name, each in tensors.items() if each.ndim == axes and is_float[name] == (axes == 2)]
    if len(fitting) != 1:
        do = f"say which by {wanted}_key, name it {wanted!r}" + ("" if axes == 2 else ", or give a file of labels")
        raise UsageError(f"expected one array of {wanted}, {what}, in {path}, got {listing}; {do}")
    return fitting[0]
