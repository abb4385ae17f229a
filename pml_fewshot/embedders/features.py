"""Converts features in common forms to rows with labels: arrays, rows by class, pairs, and pandas tables."""

import sys
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError

# Their names in tables and files; the first one found is used.
EMBEDDINGS = ("embeddings", "embedding", "features")
LABELS = ("labels", "label", "class", "class_name", "target")


def as_rows(values: Any) -> Tensor:
    """Embeddings as a tensor that shares their memory, or memory map, where possible. Python floats become float32.

    Raises:
        UsageTypeError: not numbers, rows of different lengths, or a table with a column of anything but floats.
    """
    if isinstance(values, Tensor):
        return values
    given = described(values)
    if is_table(values) and (others := [f"{t} in {name!r}" for name, t in values.dtypes.items() if t.kind != "f"]):
        do = "leave them out, convert them with .astype('float32'), or use EmbeddingBank.from_features"
        raise UsageTypeError(f"expected columns of floats, got {', '.join(others[:3])}; {do}")
    try:
        if is_table(values):  # (pandas would convert its own float types to objects)
            columns = [column.to_numpy(column.dtype.type, na_value=np.nan) for _, column in values.items()]
            values = np.stack(columns, axis=1)
        if not isinstance(values, list | tuple):
            array = np.asarray(values)
            values = list(array) if array.dtype == object and array.ndim == 1 else array  # a column of arrays
        if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
            return torch.stack(list(values))
        array, leaf = np.asarray(values), _leaf(values)
        if array.dtype == np.float64 and type(leaf) in (float, int):
            array = array.astype(np.float32)
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():  # nothing here writes to embeddings, and `load_bank` says that nobody may
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = "embeddings as a tensor, numpy array, DataFrame or list of rows, all numbers and of one length"
        raise UsageTypeError(f"expected {wanted}, got {given}; convert them") from error


def labeled_rows(features: Any) -> tuple[Tensor, Any]:
    """The rows, and a label for each, from any form that EmbeddingBank.from_features accepts without labels."""
    if is_table(features):
        return table_rows(without_row_names(features))
    if isinstance(features, Mapping):
        return _class_rows(features)
    if isinstance(features, list | tuple):
        if is_pair(features):
            return as_rows(features[0]), features[1]
        if features and all(is_pair(item, (1, 0)) for item in features):
            labels = [label.item() if isinstance(label, Tensor) else label for _, label in features]
            return as_rows([row for row, _ in features]), labels
    rows = as_rows(features)
    if rows.ndim == 3:
        return rows.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    do = "give labels, a dict of rows by class, pairs of row and label, or rows of shape (classes, items, D)"
    raise UsageError(f"expected labels beside the features, got {described(features)} alone; {do}")


def _class_rows(classes: Mapping[Any, Any]) -> tuple[Tensor, np.ndarray]:
    parts = {name: as_rows(rows) for name, rows in classes.items()}
    if not parts or not any(all(isinstance(name, type_) for name in parts) for type_ in (str, Integral)):
        got = ", ".join(map(repr, list(parts)[:5])) or "none"
        raise UsageTypeError(f"expected rows by class, all named by texts or all by integers, got {got}; rename them")
    dims = next(iter(parts.values())).shape[-1:]
    for name, rows in parts.items():
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1:] != dims or not rows.is_floating_point():
            wanted = f"floats of shape (n, {', '.join(map(str, dims))}), n > 0, for every class"
            got = f"got {described(rows)} for class {name!r}"
            do = "convert or leave it out, or give embeddings and labels as a pair where these are no classes"
            raise UsageError(f"expected {wanted}, {got}; {do}")
    return torch.cat(list(parts.values())), np.repeat(np.array(list(parts)), [len(rows) for rows in parts.values()])


def table_rows(
    table: Any,
    embeddings_key: str | None = None,
    labels_key: str | None = None,
    place: str = "the table",
    labels_elsewhere: bool = False,
) -> tuple[Tensor, Any]:
    """The rows of a DataFrame and its column of labels.

    Args:
        table: one column of lists holds the features, or else its columns of floats do.
        embeddings_key: name of a column of lists; when None, one of EMBEDDINGS, or the only one.
        labels_key: name of the labels; when None, one of LABELS, or the only column of neither numbers nor lists.
        place: where the table comes from, for messages.
        labels_elsewhere: whether the table may have no labels.
    """
    label = label_column(table, labels_key, place, not labels_elsewhere)
    labels = None if label is None else table[label]
    kinds = [(name, "label" if name == label else kind) for name, kind in _column_kinds(table)]
    lists = [name for name, kind in kinds if kind == "list"]
    column = embeddings_key
    if column is None:
        column = next((name for name in EMBEDDINGS if name in lists), lists[0] if len(lists) == 1 else None)
    if column in lists:
        return as_rows(table[column]), labels
    if lists or column is not None:
        wanted = "one column of lists" if column is None else f"lists in a column named {column!r}"
        raise UsageError(f"expected {wanted} in {place}, got {_listed(table)}; say which by embeddings_key")
    if others := [f"{table[name].dtype} in {name!r}" for name, kind in kinds if kind == "other number"]:
        wanted, do = (
            f"floats in the columns of {place} that are no labels",
            "convert others to floats or leave them out",
        )
        do = f"name that of labels 'label' (or load_bank's labels_key), {do}"
        raise UsageTypeError(f"expected {wanted}, got {', '.join(others[:3])}; {do}")
    is_float = [kind == "float" for _, kind in kinds]
    if not any(is_float):
        raise UsageError(f"expected columns of floats, or one of lists, in {place}, got {_listed(table)}; add them")
    return as_rows(table.loc[:, is_float]), labels


def label_column(table: Any, key: str | None, place: str, required: bool = True) -> Any:
    """The name of a table's label column: the one asked for, one of LABELS, else the only one it can be."""
    if key is not None and key not in table.columns:
        raise UsageError(f"expected labels in a column named {key!r} in {place}, got {_listed(table)}; name another")
    named = {str(name).lower(): name for name in table.columns}
    texts = [name for name, kind in _column_kinds(table) if kind == "other"]
    column = key if key is not None else next((named[name] for name in LABELS if name in named), None)
    column = texts[0] if column is None and len(texts) == 1 else column
    if column is None and required:
        wanted = f"a column of labels ({', '.join(LABELS)}, or the only one of texts)"
        do = "name it 'label', or say which by load_bank's labels_key"
        raise UsageError(f"expected {wanted} in {place}, got {_listed(table)}; {do}")
    if column is not None and (count := int((table.columns == column).sum())) > 1:
        raise UsageError(f"expected one column {column!r} in {place}, got {count}; rename the others")
    if column is not None and (missing := table[column].isna()).any():
        got = f"none in {int(missing.sum())} of {len(table)} rows, first in row {int(missing.argmax())}"
        raise UsageError(f"expected a label in every row of {place}, got {got} ({column!r}); fill them in")
    return column


def _column_kinds(table: Any) -> list[tuple[Any, str]]:
    kinds = {"f": "float", **dict.fromkeys("iub", "other number")}
    in_lists = [len(table) > 0 and axes(column.iloc[0]) > 0 for _, column in table.items()]
    letters = [(name, dtype.kind) for name, dtype in table.dtypes.items()]
    return [
        (n, kinds.get(k, "list" if is_list else "other")) for (n, k), is_list in zip(letters, in_lists, strict=True)
    ]


def without_row_names(table: Any) -> Any:
    """The table without the unnamed column to which pandas and R write row names or numbers."""
    is_there = "Unnamed: 0" in table.columns and table["Unnamed: 0"].dtype.kind != "f"
    return table.drop(columns="Unnamed: 0") if is_there else table


def _listed(table: Any) -> str:
    columns = [f"{name} {dtype}" for name, dtype in table.dtypes.items()]
    return "columns " + ", ".join(columns[:8]) + (f", .. ({len(columns)})" if len(columns) > 8 else "")


def is_table(values: Any) -> bool:
    """Whether it is a pandas DataFrame, checked without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(values, pandas.DataFrame)


def described(values: Any) -> str:
    """A short description of a value, for messages."""
    if isinstance(values, Mapping):
        return f"a dict of {', '.join(map(repr, list(values)[:5])) or 'nothing'}"
    shape = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor | np.ndarray) else ""
    return shape or f"{type(values).__name__}{f' of {len(values)}' if isinstance(values, list | tuple) else ''}"


def is_pair(values: Any, of: tuple[int, int] = (2, 1)) -> bool:
    """Whether it is a pair with these numbers of axes, by default embeddings and their labels."""
    return isinstance(values, list | tuple) and len(values) == 2 and (axes(values[0]), axes(values[1])) == of


def axes(values: Any) -> int:
    """The number of axes of an array, or of nested lists, counted along their first items."""
    if isinstance(values, list | tuple):
        return 1 + (axes(values[0]) if values else 0)
    return getattr(values, "ndim", 0)


def kind(values: Any) -> str:
    """NumPy's letter for the type of an array or of nested lists' first item: f(loat), i, u(nsigned), U (string), .."""
    leaf = _leaf(values)
    if isinstance(leaf, Tensor):
        is_integer = not (leaf.is_complex() or leaf.dtype == torch.bool)
        return "f" if leaf.is_floating_point() else "i" if is_integer else "b"
    return np.asarray(leaf).dtype.kind


def _leaf(values: Any) -> Any:
    while isinstance(values, list | tuple) and values:
        values = values[0]
    return values
