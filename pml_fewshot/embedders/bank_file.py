"""Banks in files: embeddings and labels made by any tool, read without executing code, memory-mapped where possible."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import check_choice, require
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.npy_file import map_npy, parse_npy
from pml_fewshot.pytorch_file import read_pytorch
from pml_fewshot.sizes import check_fits_memory
from pml_fewshot.tensor_file import read_tensors, write_tensors
from pml_fewshot.zip_archive import member_names, open_zip, read_member

Array = np.ndarray | Tensor

FORMATS = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def save_bank(path: str | Path, bank: EmbeddingBank) -> None:
    """Writes a bank as safetensors, all of it or nothing; `load_bank` and any other tool can read it."""
    path = Path(path)
    require(path.suffix == ".safetensors", "a path that ends with .safetensors", str(path), "rename it")
    tensors = {"embeddings": bank.embeddings, "labels": bank.labels}
    write_tensors(path, tensors, {"source": bank.source})


def load_bank(
    path: str | Path,
    labels: str | Path | None = None,
    embeddings_key: str | None = None,
    labels_key: str | None = None,
) -> EmbeddingBank:
    """Reads embeddings and labels from .npy, .npz, .pt (a dict, or a pair), or .safetensors.

    Args:
        path: the file. A .npy holds the embeddings alone and is memory-mapped, read-only (writing to the bank's
            embeddings ends the process): it may be larger than memory.
        labels: file of the labels where they are not in `path`, of any of these formats; for a .npy `<name>_labels.npy`
            beside it when None.
        embeddings_key: name of the embeddings in the file; when None "embeddings", else the only floats of two axes.
        labels_key: name of the labels; when None "labels", else the only integers (or texts) of one axis.

    Returns:
        EmbeddingBank on the CPU. Labels of texts are numbered in their alphabetical order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, a broken file, one that holds objects other than data or in which it is not
            clear what the embeddings and labels are, labels of another length, NaN.
        TypeError: labels are neither integers nor texts.
    """
    path = Path(path)
    arrays, source = _arrays(path)
    embeddings = _floats(arrays.pop(_choose(arrays, embeddings_key, "embeddings", path)), path)
    if labels is None and path.suffix == ".npy":
        labels = path.with_name(f"{path.stem}_labels.npy")
    if labels is not None:
        path = Path(labels)
        arrays, _ = _arrays(path)
    return EmbeddingBank(embeddings, _numbers(arrays[_choose(arrays, labels_key, "labels", path)], path), source)


def _arrays(path: Path) -> tuple[dict[str, Array], str]:
    """All arrays of a file by name, and the fingerprint of the data set that they come from where it says so."""
    check_choice("the file's ending", path.suffix, FORMATS)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of embeddings or labels at {path}, got none; check the path")
    try:
        return _read(path)
    except PermissionError:
        raise
    except Exception as error:  # of a broken file the readers raise whatever their code comes upon
        raise ValueError(
            f"expected arrays in {path}, got a file that is broken or holds more than data "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); write plain arrays of floats and "
            "integers"
        ) from error


def _read(path: Path) -> tuple[dict[str, Array], str]:
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        return dict(tensors), metadata.get("source", "")
    if path.suffix in (".pt", ".pth"):
        return _named(read_pytorch(path)), ""
    if path.suffix == ".npy":  # "r": Linux refuses a writable map, also a private one, that is larger than memory
        return {path.stem: map_npy(path, mode="r")}, ""
    with open_zip(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        check_fits_memory(sum(sizes.values()), path)
        names = member_names(archive, lambda name: name.endswith(".npy"))
        arrays = {name: read_member(archive, name, sizes[name]) for name in names}
        return {name.removesuffix(".npy"): parse_npy(content, name) for name, content in arrays.items()}, ""


def _named(loaded: object) -> dict[str, Array]:
    """What a .pt file held as named arrays."""
    if isinstance(loaded, Mapping):
        return {str(key): _array(value) for key, value in loaded.items() if isinstance(value, Tensor | list)}
    if isinstance(loaded, list | tuple) and len(loaded) == 2:
        return {"embeddings": _array(loaded[0]), "labels": _array(loaded[1])}
    if isinstance(loaded, Tensor):
        return {"tensor": loaded}
    raise ValueError(f"a {type(loaded).__name__} instead of a dict of tensors or a pair of them")


def _array(value: Any) -> Array:
    """A tensor as it is; a list only when it is flat, for lists within lists can hold a few numbers 2**40 times."""
    if isinstance(value, list) and not all(isinstance(item, int | float | str) for item in value):
        raise ValueError("a list of other than numbers and texts")
    return value if isinstance(value, Tensor) else np.asarray(value)


def _choose(arrays: Mapping[str, Array], key: str | None, wanted: str, path: Path) -> str:
    """Name of the array that is meant."""
    if key is not None:
        require(key in arrays, f"{wanted} named {key!r} in {path}", f"{_listing(arrays)}", "give one of these names")
        return key
    if wanted in arrays:
        return wanted
    axes = 2 if wanted == "embeddings" else 1
    fitting = [name for name, array in arrays.items() if array.ndim == axes and _is_float(array) == (axes == 2)]
    what = "floats of two axes" if axes == 2 else "integers or texts of one axis"
    require(
        len(fitting) == 1,
        f"one array of {wanted}, {what}, in {path}",
        _listing(arrays),
        f"say which by {wanted}_key, name it {wanted!r}" + ("" if axes == 2 else ", or give a file of labels"),
    )
    return fitting[0]


def _listing(arrays: Mapping[str, Array]) -> str:
    listed = (f"{name} {array.dtype} {tuple(array.shape)}" for name, array in arrays.items())
    return ", ".join(listed) or "nothing else"


def _is_float(array: Array) -> bool:
    """Whether these are floats of 16 to 64 bits."""
    if isinstance(array, Tensor):
        return array.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return array.dtype.kind == "f" and array.dtype.itemsize <= 8


def _floats(array: Array, path: Path) -> Tensor:
    """Embeddings as a tensor, which shares the memory of a map."""
    if not _is_float(array):
        raise TypeError(f"expected embeddings as floats of 16 to 64 bits in {path}, got {array.dtype}; convert them")
    # (without columns a file of no bytes can claim 10**18 rows)
    require(0 not in array.shape[1:], f"columns in the embeddings of {path}", f"{tuple(array.shape)}", "write them")
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():  # nothing here writes to embeddings, and `load_bank` says that nobody may
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _numbers(labels: Array, path: Path) -> Tensor:
    """Labels as int64; texts are numbered."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "US":
        labels = np.unique(labels, return_inverse=True)[1]
    if isinstance(labels, Tensor):
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    else:
        whole = labels.dtype.kind in "iu"
    if not whole:
        raise TypeError(f"expected labels as integers or texts in {path}, got {labels.dtype}; convert them")
    array = labels.numpy() if isinstance(labels, Tensor) else labels
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"expected labels below 2**63 in {path}, got {array.max()}; number the classes from 0")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
