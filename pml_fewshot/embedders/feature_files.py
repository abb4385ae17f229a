"""Reads embeddings and labels from files as any tool writes them, without running anything in a file."""

import pickle
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import MissingFileError, UsageError, check_choice, import_extra
from pml_fewshot.embedders.features import (
    EMBEDDINGS,
    LABELS,
    as_rows,
    axes,
    described,
    is_pair,
    is_table,
    kind,
    label_column,
    labeled_rows,
    table_rows,
    without_row_names,
)
from pml_fewshot.io.tensors import read_tensors

FORMATS = (".npy", ".npz", ".pt", ".pth", ".safetensors", ".csv", ".tsv", ".parquet", ".h5", ".hdf5")

_lock = threading.Lock()

# Words in array names that show that the arrays are not classes: x_train, clip_features, fc.weight.
ROLES = {
    *("train", "val", "valid", "validation", "dev", "test", "query", "queries", "gallery", "support", "reference"),
    *("base", "novel", "feature", "features", "feat", "feats", "embedding", "embeddings", "emb", "embs", "x", "y"),
    *("data", "images", "logits", "scores", "label", "labels", "target", "targets", "weight", "bias", "arr"),
}


def read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """A file's content, an array, a table, a list, or a dict of these; and the texts that `save_bank` wrote with it.

    Raises:
        MissingFileError: there is no such file.
        UsageError: another format, a broken file, one with more than data, or no package to read it.
    """
    ending = path.suffix.lower()
    if not path.is_file():
        got = "a folder" if path.is_dir() else "none"
        raise MissingFileError(f"expected a file of embeddings or labels at {path}, got {got}; check the path")
    check_choice("the file's ending", ending, FORMATS)
    if ending == ".safetensors":
        return read_tensors(path)
    try:
        match ending:
            case ".npz":
                with path.open("rb") as file:  # numpy leaves a broken one open
                    return dict(np.load(file, allow_pickle=False)), {}
            case ".npy":  # "r": Linux refuses a writable map that is larger than memory, even a private one
                return np.load(path, mmap_mode="r", allow_pickle=False), {}
            case ".pt" | ".pth":
                return _read_pt(path), {}
            case ".h5" | ".hdf5":
                return _read_hdf5(path), {}
            case _:
                return _read_table(path), {}
    except (PermissionError, UsageError, ImportError):
        raise
    except Exception as error:  # readers can raise anything on broken files
        reason = str(error).partition("\n")[0] or type(error).__name__
        if ending in (".npz", ".npy") and "allow_pickle" in reason:  # numpy's text recommends loading it anyway
            reason = "no arrays of numbers"
        if isinstance(error, pickle.UnpicklingError):  # torch's text recommends loading it anyway
            called = re.search(r"GLOBAL (\S+)", str(error))
            reason = called[1] if called else "no pickle of data"
        got = f"a file that is broken or holds more than data ({reason})"
        raise UsageError(f"expected arrays in {path}, got {got}; write plain ones, in a dict or as a pair") from error


class _PickledDtype:
    """Replaces numpy.dtype while a .pt is read; supports only numbers and strings.

    NumPy's own would accept any fields and flags in a file, and with them bytes as pointers to objects.
    """

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufcSU][0-9]{1,6}", code):
            raise ValueError(f"an array of {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _PickledArray:
    """Replaces numpy.ndarray and the function that creates one."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if fortran else "C")
        # NumPy trusts that these bytes are booleans and characters
        value = value.view(np.uint8) != 0 if value.dtype.kind == "b" else value
        self.value = np.array(value.tolist(), dtype=str) if value.dtype.kind == "U" else value


def _called(module: str, name: str, kind: type) -> type:
    """A class that torch uses for what a pickle calls by this name (torch accepts pairs of both from 2.6 on)."""
    return type(name, (kind,), {"__module__": module})


NUMPY_IN_PICKLES: list[Any] = [
    _called("numpy", "dtype", _PickledDtype),
    _called("numpy", "ndarray", _PickledArray),
    _called("numpy._core.multiarray", "_reconstruct", _PickledArray),
    _called("numpy.core.multiarray", "_reconstruct", _PickledArray),  # NumPy 1
]


def _read_pt(path: Path) -> Any:
    with _lock:  # torch's safe globals are shared by all threads
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            others = [each for each in allowed if "numpy" not in str(getattr(each, "__module__", each))]  # in the way
            with torch.serialization.safe_globals([*others, *NUMPY_IN_PICKLES]):
                return _plain(torch.load(path, map_location="cpu", weights_only=True))
        finally:
            torch.serialization.add_safe_globals(allowed)


def _plain(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _plain(each) for name, each in part.items()}
    if isinstance(part, list | tuple):
        return [_plain(each) for each in part]
    return part.detach() if isinstance(part, Tensor) else part.value if isinstance(part, _PickledArray) else part


def _read_hdf5(path: Path) -> Any:
    h5py = import_extra("tables", f"to read {path}", "h5py")

    def data(node: Any) -> Any:
        if isinstance(node, h5py.Group):
            sets = {name: node[name] for name in node}
            return {name: data(each) for name, each in sets.items() if getattr(each, "ndim", 0) <= 3}  # images: no
        texts = h5py.check_string_dtype(node.dtype) is not None
        return np.asarray(node.asstr()[()], dtype=str) if texts else node[()]

    with h5py.File(path, "r") as file:
        return data(file)


def _read_table(path: Path) -> Any:
    parquet = path.suffix.lower() == ".parquet"
    pandas = import_extra("tables", f"to read {path}", "pandas", *["pyarrow"] * parquet)
    if parquet:
        return pandas.read_parquet(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    table = pandas.read_csv(path, sep=separator)
    for name in table.columns.intersection(LABELS):
        texts = pandas.read_csv(path, sep=separator, usecols=[name], dtype=str)[name]
        if table[name].dtype.kind == "i" and (texts != table[name].astype(str)).any():  # 001 is not 1
            table[name] = texts
    numbers = [name for name in table.columns if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", name.lower())]
    if any(not name.isdigit() for name in numbers) or not isinstance(table.index, pandas.RangeIndex):
        got = f"{', '.join(map(repr, table.columns[:4]))}, .. for {table.shape[1]} columns"
        raise UsageError(f"expected a first line with a name for every column in {path}, got {got}; add it")
    floats = table.select_dtypes("float64").columns
    return without_row_names(table).astype(dict.fromkeys(floats, np.float32))  # they are Python's floats


def features_in(
    content: Any, embeddings_key: str | None, labels_key: str | None, path: Path, labels_elsewhere: bool
) -> tuple[Tensor, Any, Any]:
    """The rows, labels and class names in a file's content; None for any that it lacks.

    Raises:
        UsageError: they are ambiguous.
    """
    if is_table(content):
        return *table_rows(content, embeddings_key, labels_key, str(path), labels_elsewhere), None
    if isinstance(content, list):
        return (as_rows(content), None, None) if labels_elsewhere else (*labeled_rows(content), None)
    parts, embeddings_key = _parts(content, embeddings_key, path)
    arrays = _arrays(parts)
    given = labels_elsewhere or embeddings_key is not None or labels_key is not None
    rows_alone = len(arrays) > 1 and all((kind(part), axes(part)) == ("f", 2) for part in arrays.values())
    if rows_alone and not given:
        words = {word for name in arrays for word in re.split(r"[^a-z]+", str(name).lower())}
        if not words & ROLES:
            return *labeled_rows(arrays), None
    rows = _choose(parts, embeddings_key, "embeddings", path, rows_alone)
    if labels_elsewhere:
        return as_rows(rows), None, None
    if axes(rows) == 3 and labels_key is None and not any(kind(part) in "iuUS" for part in arrays.values()):
        return *labeled_rows(rows), None
    return as_rows(rows), _choose(parts, labels_key, "labels", path), parts.get("class_names")


def labels_in(content: Any, key: str | None, path: Path) -> tuple[Any, Any]:
    """The labels and class names in the content of a label file."""
    if is_table(content):
        column = content.columns[0] if content.shape[1] == 1 else label_column(content, key, str(path))
        return content[column], None
    if isinstance(content, list):
        return content[1] if is_pair(content) else content, None
    parts, _ = _parts(content, None, path)
    return _choose(parts, key, "labels", path), parts.get("class_names")


def _parts(content: Any, key: str | None, path: Path) -> tuple[Mapping[Any, Any], str | None]:
    """A file's content by name, or that of the group named `key` or of the only group; and the key within."""
    parts = content if isinstance(content, Mapping) else {path.stem: content}
    if isinstance(parts.get(key), Mapping):
        return parts[key], None
    only = next(iter(parts.values())) if len(parts) == 1 else None
    return (only if isinstance(only, Mapping) else parts), key


def _arrays(parts: Mapping[Any, Any]) -> dict[Any, Any]:
    return {n: part for n, part in parts.items() if axes(part) and kind(part) in "fiuUSbc" and n != "class_names"}


def _choose(parts: Mapping[Any, Any], key: str | None, wanted: str, path: Path, maybe_classes: bool = False) -> Any:
    """The wanted array: the one of that name, else the only one that it can be."""
    arrays = _arrays(parts)
    shown = arrays or {name: part for name, part in parts.items() if isinstance(part, Mapping)}
    listing = ", ".join(f"{name} {described(part)}" for name, part in shown.items()) or "nothing"
    if key is not None and key not in arrays:
        raise UsageError(f"expected {wanted} named {key!r} in {path}, got {listing}; give one of these names")
    is_rows = wanted == "embeddings"
    for name in (EMBEDDINGS if is_rows else LABELS) if key is None else (key,):
        if name in arrays:
            return arrays[name]
    kinds, what = ("f", "floats of two axes") if is_rows else ("iuUS", "integers or texts of one axis")
    by_axes = {n: [part for part in arrays.values() if axes(part) == n and kind(part) in kinds] for n in (1, 2, 3)}
    fitting = (by_axes[2] or by_axes[3]) if is_rows else by_axes[1]
    if len(fitting) != 1:
        do = f"say which by {wanted}_key, name it {wanted!r}" + ("" if is_rows else ", or give a file of labels")
        do += ", or give them to EmbeddingBank.from_features where these are classes" if maybe_classes else ""
        raise UsageError(f"expected one array of {wanted}, {what}, in {path}, got {listing}; {do}")
    return fitting[0]
