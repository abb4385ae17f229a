"""Errors for user mistakes, and checks shared across the library: "expected .., got ..; do .."."""

import difflib
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 2**14


class UsageError(ValueError):
    """The input cannot be used; the message says what was expected, what was given and what to do.

    Commands show it as one line. The subclasses below are also the built-in errors that Python programs would catch.
    """


class UsageTypeError(UsageError, TypeError):
    """An argument has the wrong type."""


class MissingFileError(UsageError, FileNotFoundError):
    """A required file or folder does not exist."""


class ExistingFileError(UsageError, FileExistsError):
    """A file or folder exists and must not be overwritten."""


class LockedError(UsageError, BlockingIOError):
    """Another process is writing to the same place."""


class MissingPackageError(UsageError, ImportError):
    """A package from one of this library's extras is not installed."""


def import_extra(extra: str, what: str, *packages: str) -> Any:
    """Imports packages that come with an extra, and returns the first.

    Raises:
        MissingPackageError: one is not installed; the message says what they are for and which extra installs them.
    """
    try:
        first, *_ = [importlib.import_module(name) for name in packages]
        return first
    except ImportError as error:
        got = f"no {error.name} installed" if isinstance(error, ModuleNotFoundError) else f"an error ({error})"
        needed = " and ".join(packages)
        raise MissingPackageError(f"expected {needed} {what}, got {got}; pip install 'pml_fewshot[{extra}]'") from error


def check_at_least_one(name: str, value: int) -> None:
    """Raises a UsageError unless value is an integer of at least 1 (a bool is not)."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"expected {name} to be an integer of at least 1, got {value!r}; give {name} >= 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a UsageError that suggests the closest choice unless value is one of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        do = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise UsageError(f"expected {name} as one of {', '.join(map(repr, choices))}, got {value!r}; {do}")


def check_finite(values: Tensor, what: str, do: str = "") -> None:
    """Raises a UsageError that counts the rows of `values` holding NaN or infinity and names the first."""
    if not values.is_floating_point():
        return
    # A sum instead of a mask of the whole tensor: NaN and infinity survive it, and only then are rows searched. In
    # blocks, because torch's sum copies when it changes the dtype, and `values` may be a memory map larger than memory.
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = [block.sum(dtype=dtype) for block in values.split(BLOCK_ROWS)]
    if torch.isfinite(torch.stack(sums)).all():
        return
    finite = torch.cat([torch.isfinite(block.flatten(1)).all(dim=1) for block in values.unsqueeze(1).split(BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:  # empty if the sum of finite values overflowed
        got = f"got NaN or infinity in {len(bad)} of {len(values)} rows, first in row {bad[0]}"
        do = do or "look at what produced them (a diverged training, a division by zero)"
        raise UsageError(f"expected finite {what}, {got}; {do}")


def check_floats(images: Tensor) -> None:
    """Raises a UsageError for images as they are stored, integers up to 255, which a network would take as they are."""
    if not images.is_floating_point():
        do = "take floats from dataset.floats(...), or embed the set: encode(embedder, dataset)"
        raise UsageTypeError(f"expected images as floats from 0 to 1, got {images.dtype}; {do}")


def as_labels(labels: Any, length: int, what: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as an int64 tensor (length,) and, if they are strings, their class names, numbered alphabetically.

    Args:
        labels: integers or strings, as a tensor, NumPy array, list, or anything that NumPy accepts as an array.
        length: the required number of labels.
        what: whose labels they are, for messages: "the bank's".

    Raises:
        UsageError: the wrong type (UsageTypeError) or number of labels, or an integer that does not fit in int64.
    """
    names: tuple[str, ...] = ()
    if not isinstance(labels, Tensor) or labels.dtype == torch.uint64:
        try:
            array = np.asarray(labels)
        except ValueError as error:  # from nested lists
            got = f"a {type(labels).__name__} of {type(labels[0]).__name__}s of different lengths"
            raise UsageError(f"expected one of {what} labels for each item, got {got}; give one each") from error
        if array.dtype == object and all(isinstance(label, str) for label in array.flat):
            array = array.astype(str)
        elif array.dtype.kind in "US" and not isinstance(labels, np.ndarray):  # NumPy makes all strings if one is
            for row, label in enumerate(labels):
                if not isinstance(label, str | bytes) or isinstance(label, str) != (array.dtype.kind == "U"):
                    got = f"{label!r} in row {row} beside texts"
                    raise UsageTypeError(f"expected {what} labels as integers or texts, got {got}; convert them")
        if array.dtype.kind == "S":
            array = np.char.decode(array, "utf-8")
        if array.dtype.kind == "U":
            distinct, array = np.unique(array, return_inverse=True)
            names = tuple(map(str, distinct))
        if array.dtype.kind not in "iu":
            got = f"{type(labels).__name__} of {array.dtype}"
            raise UsageTypeError(f"expected {what} labels as integers or texts, got {got}; convert them")
        if array.dtype.kind == "u" and array.size and array.max() > torch.iinfo(torch.int64).max:
            raise UsageError(f"expected {what} labels below 2**63, got {array.max()}; number the classes from 0")
        labels = torch.from_numpy(array.astype(np.int64))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        do = "convert them"
        raise UsageTypeError(f"expected {what} labels as integers or texts, got a tensor of {labels.dtype}; {do}")
    if labels.shape != (length,):
        raise UsageError(f"expected {what} labels of shape ({length},), got shape {tuple(labels.shape)}; give one each")
    return labels.long(), names


def as_names(class_names: Any) -> tuple[str, ...]:
    """Class names in order, from a sequence or from a mapping of names to numbers or numbers to names.

    Raises:
        UsageError: a set, which has no order (UsageTypeError), a repeated name, or numbers that do not count from 0.
    """
    if isinstance(class_names, Mapping):
        number_of = {name: number for name, number in class_names.items() if isinstance(number, Integral)}
        by_number = {number: name for name, number in number_of.items()} if number_of else dict(class_names)
        if set(by_number) != set(range(len(class_names))):
            got = f"got {dict(class_names)!r}"[:100]
            raise UsageError(f"expected class names with the numbers from 0 on, each once, {got}; give a list of names")
        class_names = [by_number[number] for number in range(len(by_number))]
    if isinstance(class_names, Set):
        raise UsageTypeError(f"expected class names in order, got the set {class_names!r}; give a list"[:200])
    names = tuple(map(str, class_names))
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"expected different class names, got {repeated[:3]} more than once; rename them")
    return names


def renumbered(labels: Tensor, texts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Converts labels from indices into `texts` to indices into `names`, which must contain all of `texts`."""
    place = {name: number for number, name in enumerate(names)}
    if unknown := [name for name in texts if name not in place]:
        raise UsageError(f"expected labels among the class names, got {unknown[0]!r}; add it to class_names")
    return torch.tensor([place[name] for name in texts], device=labels.device)[labels]


def check_enough_items(labels: Tensor, counts: Tensor, needed: int, what: str, class_names: Sequence[str] = ()) -> None:
    """Raises a UsageError naming the first class (by its label if there are no names) with too few items."""
    short = (counts < needed).nonzero().flatten()
    if len(short):
        count, label = int(counts[short[0]]), int(labels[short[0]])
        name = repr(class_names[label]) if class_names else label
        raise UsageError(
            f"expected at least {needed} items ({what}) in every class, got {count} in class {name} ({len(short)} of "
            f"{len(counts)} classes have too few); ask for fewer shots or queries, or leave the small classes out"
        )


def check_disjoint(groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raises a UsageError naming a class that is in two of the (group name, class names) pairs."""
    owner: dict[str, str] = {}
    for group, names in groups:
        for name in names:
            if owner.setdefault(name, group) != group:
                got = f"class {name!r} in {owner[name]} and in {group}"
                do = "put each class into one split, or say shared_classes=True"
                raise UsageError(f"expected splits without a common class, got {got}; {do}")
