"""EmbeddingBank: a dataset's embeddings, computed once and evaluated many times; also loaded from any tool's files."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import BLOCK_ROWS, UsageError, UsageTypeError, as_labels, as_names, check_finite, renumbered
from pml_fewshot.data.dataset import FewShotDataset, joined_notes
from pml_fewshot.embedders.feature_files import features_in, labels_in, read_file
from pml_fewshot.embedders.features import as_rows, labeled_rows
from pml_fewshot.embedders.modes import widened
from pml_fewshot.io.tensors import write_tensors

ClassName = str | int  # a class's name, or its label where the source has no names


@dataclass(frozen=True, init=False)
class EmbeddingBank:
    """Embeddings of a dataset with its labels.

    Args:
        embeddings: (M, D) floats, all finite: a tensor, NumPy array, DataFrame or list of rows. Memory-mapped
            embeddings (see `load_bank`) stay memory-mapped.
        labels: (M,) integers of any values (indices into the class names if there are any), or strings: a tensor,
            NumPy array, list or table column. They are stored as int64.
        source: fingerprint of the embedded dataset, which shows that results from the bank and from the dataset are on
            the same episodes; empty when unknown.
        class_names: names of the classes, if known; when empty and the labels are strings, these strings in
            alphabetical order. Banks used together (queries and references) are aligned by name.
        note: what readers of results from this bank must know; kept with the bank and with its results.

    Raises:
        UsageError: another type (UsageTypeError), shape or number of labels, NaN or infinity, a label that is not among
            the class names, or a repeated name.
    """

    embeddings: Tensor
    labels: Tensor
    source: str = ""
    class_names: tuple[str, ...] = ()
    note: str = ""

    def __init__(
        self, embeddings: Any, labels: Any, source: str = "", class_names: Sequence[str] = (), note: str = ""
    ) -> None:
        rows = as_rows(embeddings)
        if rows.ndim != 2:
            of_classes = ", or where these are (classes, items, D) use EmbeddingBank.from_features without labels"
            do = "flatten each item to one row" + (of_classes if rows.ndim == 3 else "")
            raise UsageError(f"expected embeddings of shape (M, D), got shape {tuple(rows.shape)}; {do}")
        if not rows.is_floating_point():
            do = "convert them with .float() or .astype('float32'), or write 1.0 for 1"
            raise UsageTypeError(f"expected float embeddings, got {rows.dtype}; {do}")
        numbers, found = as_labels(labels, len(rows), "the bank's")
        check_finite(rows, "embeddings")
        names = as_names(class_names) or found
        if found:
            numbers = renumbered(numbers, found, names)
        if names and len(numbers):
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= len(names):
                wanted = f"labels that are indices into the {len(names)} class names"
                raise UsageError(f"expected {wanted}, got labels from {low} to {high}; number the classes from 0")
        given = (rows, numbers.to(rows.device), source, names, note)
        for field, value in zip(fields(self), given, strict=True):
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_features(
        cls, features: Any, labels: Any = None, class_names: Sequence[str] = (), note: str = ""
    ) -> "EmbeddingBank":
        """Creates a bank from features in any common form.

        Args:
            features: a dict from class (strings or integers) to rows (n, D); floats (classes, items, D), whose labels
                are 0, 1, ..; a list of (row, label) pairs; a pair of embeddings and labels; or a DataFrame with a
                column of labels (`label`, `class`, `class_name`, `target` or the only non-numeric one) and columns of
                floats, or one column of lists (`embedding`, `features` or the only one). Rows alone with `labels`.
            labels: as in EmbeddingBank, if they are not in `features`.
            class_names, note: as in EmbeddingBank.

        Raises:
            UsageError: any other form, or data that EmbeddingBank refuses.
        """
        rows, labels = labeled_rows(features) if labels is None else (features, labels)
        return cls(rows, labels, class_names=class_names, note=note)

    def __len__(self) -> int:
        return len(self.labels)

    def as_dataset(self) -> FewShotDataset:
        """The embeddings as items of a dataset, for training a projection of them; its classes are those with items."""
        values, labels = torch.unique(self.labels, return_inverse=True)
        return FewShotDataset(self.embeddings, labels, list(map(str, names_of(values, self.class_names))), self.note)

    def without_small_classes(self, least: int) -> "EmbeddingBank":
        """Returns the bank without classes of fewer than `least` items; its note counts those left out.

        The result is another set, so its episodes are not those of the whole bank, nor those of a dataset without the
        same classes: to compare with the latter, leave the classes out of the dataset before embedding it.
        """
        values, index, counts = torch.unique(self.labels, return_inverse=True, return_counts=True)
        kept = counts >= least
        if kept.all():
            return self
        if not kept.any():
            raise UsageError(f"expected a class of at least {least} items, got at most {int(counts.max())}; lower it")
        items, lost = kept[index], int(counts[~kept].sum())
        names = names_of(values[kept], self.class_names)
        labels = (kept.cumsum(0) - 1)[index] if self.class_names else self.labels
        source = self.source and _hash(json.dumps([self.source, names]).encode())
        note = f"{int((~kept).sum())} of {len(kept)} classes with fewer than {least} items left out ({lost} items)"
        own_names = list(map(str, names)) if self.class_names else ()
        return EmbeddingBank(self.embeddings[items], labels[items], source, own_names, joined_notes(self.note, note))

    def to(self, device: torch.device | str) -> "EmbeddingBank":
        return replace(self, embeddings=self.embeddings.to(device), labels=self.labels.to(device))

    def fingerprint(self) -> str:
        """16 hex digits that identify the set: its source where known, else a hash of its labels and class names."""
        labels = self.labels.cpu().contiguous().numpy().astype("<i8")
        names = json.dumps(self.class_names).encode() if self.class_names else b""
        return self.source or _hash(labels.data.tobytes() + names)

    def mean(self) -> Tensor:
        """The mean embedding (D,), summed in float64, one block at a time."""
        sums = [block.sum(dim=0, dtype=torch.float64) for block in self.embeddings.split(BLOCK_ROWS)]
        return (torch.stack(sums).sum(dim=0) / len(self)).to(widened(self.embeddings[:0]))

    def centered(self, mean: Tensor) -> "EmbeddingBank":
        """Subtracts a mean (D,), such as `train_bank.mean()`, from every row (Wang et al. 2019, SimpleShot).

        The result is at least float32, as 16 bits would round the differences.
        """
        mean = torch.as_tensor(mean)
        shape, got = tuple(self.embeddings.shape[1:]), tuple(mean.shape)
        if shape != got:
            raise UsageError(f"expected a mean of shape {shape}, got {got}; use bank.mean()")
        rows = widened(self.embeddings)
        return replace(self, embeddings=rows - mean.to(rows))

    def normalized(self) -> "EmbeddingBank":
        """L2-normalizes every embedding, in at least float32; after `centered`, this is SimpleShot's "CL2N".

        Raises:
            UsageError: a length that is not finite, of numbers above 1e18.
        """
        rows = widened(self.embeddings)
        lengths = rows.norm(dim=1, keepdim=True)
        check_finite(lengths, "lengths of embeddings", "divide them by a constant")
        return replace(self, embeddings=rows / lengths.clamp_min(1e-12))

    def power_transformed(self, power: float = 0.5) -> "EmbeddingBank":
        """Raises x + 1e-6 to a power, which makes skewed features more Gaussian (Hu et al. 2021, PT-MAP).

        For features that are never negative, as after a ReLU: the paper's are, and its code turns others into NaN. The
        paper then L2-normalizes them: `bank.power_transformed().normalized()`.

        Raises:
            UsageError: a power that is not above 0, or a negative number in an embedding.
        """
        if not 0 < power < math.inf:
            raise UsageError(f"expected a power above 0, got {power}; 0.5 is the paper's")
        rows = widened(self.embeddings)
        if len(rows) and (least := rows.min()) < 0:
            do = "take a trunk that ends in a ReLU (Conv4 does, ResNet12's is leaky)"
            raise UsageError(f"expected embeddings of at least 0 to raise to a power, got {least:.4g}; {do}")
        return replace(self, embeddings=(rows + 1e-6).pow_(power))

    def transformed(self, fitted: Any) -> "EmbeddingBank":
        """Applies a fitted scikit-learn transformer: PCA, PCA(whiten=True), FastICA, QuantileTransformer, a Pipeline.

        Fit it on embeddings of the training classes: one fitted on the evaluated classes has seen the queries. Rows are
        transformed in blocks, so a memory-mapped bank may be larger than memory; the result is float32. As with
        `centered`, the note does not change, so name table rows after the transformation.

        Raises:
            UsageError: it is not fitted, or was fitted on embeddings of another width; it returns NaN, infinity or not
                one row per embedding. Anything but a transformer is a UsageTypeError.
        """
        from sklearn.exceptions import NotFittedError  # takes seconds to import, and only this needs it
        from sklearn.utils.validation import check_is_fitted

        name, wanted = type(fitted).__name__, "a fitted scikit-learn transformer"
        if isinstance(fitted, type) or not (hasattr(fitted, "fit") and hasattr(fitted, "transform")):
            raise UsageTypeError(f"expected {wanted}, got {fitted!r}; give one such as PCA(64).fit(bank.embeddings)")
        try:
            check_is_fitted(fitted)
        except NotFittedError as error:
            do = f"fit it on the training bank's embeddings: {name}(...).fit(train_bank.embeddings)"
            raise UsageError(f"expected {wanted}, got {name} that is not fitted; {do}") from error
        dim, known = self.embeddings.shape[1], getattr(fitted, "n_features_in_", None)
        if known not in (None, dim):
            do = "fit it on embeddings of the same trunk"
            raise UsageError(f"expected embeddings of {known} dimensions, as {name} was fitted on, got {dim}; {do}")
        out = torch.empty(0)  # one tensor: a list of parts would take twice its size when joined
        for start in range(0, len(self), BLOCK_ROWS):
            block = widened(self.embeddings[start : start + BLOCK_ROWS]).to("cpu", copy=True)
            rows = np.asarray(fitted.transform(block.numpy()))  # a copy, as copy=False would write into the bank
            if rows.ndim != 2 or len(rows) != len(block):
                got = f"shape {rows.shape} for {len(block)} embeddings"
                raise UsageError(f"expected a row of numbers for each embedding from {name}, got {got}; take another")
            if start == 0:
                out = torch.empty(len(self), rows.shape[1])
            out[start : start + len(rows)] = torch.tensor(rows)
        check_finite(out, f"embeddings from {name}", "look at what it was fitted on, and at its settings")
        return replace(self, embeddings=out.to(self.embeddings.device))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def align(source: Any, to: Any) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of a dataset, bank or Gallery, renumbered by name to match another; and the names, new ones last.

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
    numbers = dict.fromkeys((*to.class_names, *source.class_names))
    return renumbered(source.labels, source.class_names, tuple(numbers)), tuple(numbers)


def names_of(labels: Tensor, class_names: Sequence[str]) -> list[ClassName]:
    """The class name of each label (N,), or the label itself if there are no names."""
    return [class_names[label] if class_names else label for label in labels.tolist()]


def check_bank(bank: Any) -> None:
    """Raises a UsageTypeError for anything but an EmbeddingBank."""
    if not isinstance(bank, EmbeddingBank):
        do = "make one: EmbeddingBank(embeddings, labels)"
        raise UsageTypeError(f"expected an EmbeddingBank, got {type(bank).__name__}; {do}")


def save_bank(path: str | Path, bank: EmbeddingBank) -> None:
    """Writes a bank as safetensors, atomically; `load_bank` and any other tool can read it.

    Raises:
        UsageError: a path that does not end with .safetensors.
    """
    check_bank(bank)
    if Path(path).suffix != ".safetensors":
        raise UsageError(f"expected a path that ends with .safetensors, got {path}; rename it")
    texts = {"class_names": json.dumps(bank.class_names) if bank.class_names else "", "note": bank.note}
    texts = {"source": bank.source} | {name: text for name, text in texts.items() if text}
    write_tensors(path, {"embeddings": bank.embeddings, "labels": bank.labels}, texts)


def load_bank(
    path: str | Path, labels: str | Path | None = None, embeddings_key: str | None = None, labels_key: str | None = None
) -> EmbeddingBank:
    """Reads embeddings and labels, onto the CPU, from a file that cannot run code.

    Args:
        path: .npy, .npz, .pt or .pth, .safetensors, .h5 or .hdf5 (with h5py), .csv, .tsv or .parquet (with pandas, the
            last with pyarrow too). It holds embeddings and labels by name or as a pair, or any form that
            `from_features` accepts without labels: floats (classes, items, D), rows by class (in HDF5 also in a group),
            (row, label) pairs, or a table. A .npy is memory-mapped, read-only (writing to it would crash the process),
            so it may be larger than memory. Floats in a CSV become float32.
        labels: file of the labels if they are not in `path`, in any of these formats; when None, for a .npy,
            `<name>_labels.npy` next to it. Strings are class names, numbered in alphabetical order, or in the order of
            `class_names` if the file has them.
        embeddings_key: name of the embeddings in the file, or of a group that holds everything; when None,
            "embeddings", "embedding" or "features", else the only floats with two axes, or else with three.
        labels_key: name of the labels; when None, "labels", "label", "class", "class_name" or "target", else the only
            integers (or strings) with one axis; in a table, the only column of strings.

    Raises:
        MissingFileError: there is no such file.
        UsageError: an unknown format, or one whose package is not installed; a broken file, one that holds objects
            other than data, or one in which the embeddings and labels are ambiguous; or data that EmbeddingBank
            refuses. Named arrays are read as classes only if none has a name like "x_train" or "features".
    """
    path = Path(path)
    content, texts = read_file(path)
    beside = path.with_name(f"{path.stem}_labels.npy")
    if labels is None and path.suffix == ".npy" and (content.ndim != 3 or beside.exists()):
        labels = beside
    rows, numbers, names = features_in(content, embeddings_key, labels_key, path, labels is not None)
    source, note = texts.get("source", ""), texts.get("note", "")
    if labels is not None:
        content, texts = read_file(Path(labels))
        numbers, names = labels_in(content, labels_key, Path(labels))
    if names is None:
        names = json.loads(texts.get("class_names", "[]"))
    return EmbeddingBank(rows, numbers, source, names, note)
