"""Checks of shape, range and classes. Every message says what was expected, what came and what to do."""

import difflib
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

BLOCK_ROWS = 2**14


def require(condition: bool, expected: str, got: object, do: str) -> None:
    """Raises a ValueError "expected .., got ..; do .." unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got}; {do}")


def check_at_least_one(name: str, value: int) -> None:
    """Raises a ValueError unless value is an integer >= 1 (a bool is none)."""
    is_count = isinstance(value, Integral) and not isinstance(value, bool) and value >= 1
    require(is_count, f"{name} to be an integer of at least 1", repr(value), f"give {name} >= 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ValueError that suggests the nearest choice unless value is one of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        do = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ValueError(f"expected {name} as one of {', '.join(map(repr, choices))}, got {value!r}; {do}")


def check_finite(values: Tensor, what: str, do: str = "") -> None:
    """Raises a ValueError that counts the rows of `values` holding NaN or infinity and names the first."""
    if not values.is_floating_point():
        return
    # One sum instead of a mask of the whole tensor: any NaN or infinity survives it, and only then are rows looked for.
    # In blocks, for torch sums a copy where it changes the type, and `values` may be a memory map larger than memory.
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = [block.sum(dtype=dtype) for block in values.split(BLOCK_ROWS)]
    if torch.isfinite(torch.stack(sums)).all():
        return
    finite = torch.cat([torch.isfinite(block.flatten(1)).all(dim=1) for block in values.unsqueeze(1).split(BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:  # none: the sum of finite values has overflowed
        raise ValueError(
            f"expected finite {what}, got NaN or infinity in {len(bad)} of {len(values)} rows, first in row {bad[0]}; "
            + (do or "look at what produced them (a diverged training, a division by zero)")
        )


def check_labels(labels: Tensor, length: int, what: str) -> None:
    """Raises unless labels are int64, of shape (length,)."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = f"a tensor of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise TypeError(f"expected {what} labels as an int64 tensor, got {got}; use torch.as_tensor(labels).long()")
    require(
        labels.ndim == 1 and len(labels) == length,
        f"{what} labels of shape ({length},), one for each item",
        f"shape {tuple(labels.shape)}",
        "give one label for each item",
    )


def check_enough_items(labels: Tensor, counts: Tensor, needed: int, what: str) -> None:
    """Raises a ValueError naming the first class (by its label) that has fewer than `needed` items."""
    short = (counts < needed).nonzero().flatten()
    if len(short):
        first = short[0]
        raise ValueError(
            f"expected at least {needed} items ({what}) in every class, got {counts[first].item()} in class "
            f"{labels[first].item()} ({len(short)} of {len(counts)} classes have too few); ask for fewer shots or "
            "queries, or leave the small classes out"
        )


def check_disjoint(groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raises a ValueError naming a class that stands in two of the (group name, class names) pairs."""
    owner: dict[str, str] = {}
    for group, names in groups:
        for name in names:
            if owner.setdefault(name, group) != group:
                raise ValueError(
                    f"expected splits without a common class, got class {name!r} in {owner[name]} and in {group}; "
                    "put each class into one split"
                )
