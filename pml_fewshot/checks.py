"""Errors for a user's mistake, and the checks that many places need: "expected .., got ..; do .."."""

import difflib
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

BLOCK_ROWS = 2**14


class UsageError(ValueError):
    """What was given cannot be used; the message says what was expected, what came and what to do.

    Commands show it as one line. The classes below are also the built-in error that Python programs would catch.
    """


class UsageTypeError(UsageError, TypeError):
    """An argument of another type."""


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that should be there is not."""


class ExistingFileError(UsageError, FileExistsError):
    """A file or folder that must not be overwritten."""


class LockedError(UsageError, BlockingIOError):
    """Another process is writing there."""


def check_at_least_one(name: str, value: int) -> None:
    """Raises a UsageError unless value is an integer of at least 1 (a bool is not)."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"expected {name} to be an integer of at least 1, got {value!r}; give {name} >= 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a UsageError that suggests the nearest choice unless value is one of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        do = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise UsageError(f"expected {name} as one of {', '.join(map(repr, choices))}, got {value!r}; {do}")


def check_finite(values: Tensor, what: str, do: str = "") -> None:
    """Raises a UsageError that counts the rows of `values` holding NaN or infinity and names the first."""
    if not values.is_floating_point():
        return
    # One sum instead of a mask of the whole tensor: NaN and infinity survive it, and only then are rows searched. In
    # blocks, because torch's sum copies where it changes the type, and `values` may be a memory map larger than memory.
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = [block.sum(dtype=dtype) for block in values.split(BLOCK_ROWS)]
    if torch.isfinite(torch.stack(sums)).all():
        return
    finite = torch.cat([torch.isfinite(block.flatten(1)).all(dim=1) for block in values.unsqueeze(1).split(BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:  # none: the sum of finite values overflowed
        got = f"got NaN or infinity in {len(bad)} of {len(values)} rows, first in row {bad[0]}"
        do = do or "look at what produced them (a diverged training, a division by zero)"
        raise UsageError(f"expected finite {what}, {got}; {do}")


def check_labels(labels: Tensor, length: int, what: str) -> None:
    """Raises a UsageError unless labels are int64, of shape (length,)."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = f"a tensor of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise UsageTypeError(
            f"expected {what} labels as an int64 tensor, got {got}; use torch.as_tensor(labels).long()"
        )
    if labels.shape != (length,):
        raise UsageError(f"expected {what} labels of shape ({length},), got shape {tuple(labels.shape)}; give one each")


def check_enough_items(labels: Tensor, counts: Tensor, needed: int, what: str, class_names: Sequence[str] = ()) -> None:
    """Raises a UsageError naming the first class (by its label, where there are no names) with too few items."""
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
                raise UsageError(f"expected splits without a common class, got {got}; put each class into one split")
