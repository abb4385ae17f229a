"""Draws without replacement, for thousands of rows at once: numbers, and classes with their items."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, as_labels, check_enough_items

BLOCK = 2**14  # numbers drawn at a time: torch divides larger tensors among threads, which wait for each other
SMALL = 32  # numbers; enough for Omniglot's classes, of 20 items, and episodes of 32 ways
MANY = 1000  # rows; from here on, such sets are shuffled step by step; below, the few calls for slots are faster


def draw_without_replacement(sizes: Tensor, count: int, generator: torch.Generator, largest: int) -> Tensor:
    """Draws `count` distinct numbers below each size (R,), in uniformly random order: (count, R) int64.

    It is a Fisher-Yates shuffle stopped after `count` steps, for all rows at once; no size may be below `count`. Many
    arrays of up to 32 numbers are shuffled. Others are not: the result of each step follows from the slots of the steps
    before it, so time grows with R * count * log count, not with the sizes, and memory is twice the result's. On one
    core, 50,000 rows of 16 take 27 ms (of 16 numbers below 20, 12 ms), one of 1,692 half a millisecond, 1,000 of 100
    numbers below a million 3 ms. The numbers come from the generator's device: a CPU generator gives the same draw on
    any device of `sizes`. No size may be above `largest`, an argument because computing it would wait for a GPU.
    """
    uniform = torch.rand(count, len(sizes), generator=generator, device=generator.device, dtype=torch.float64)
    step = torch.arange(count, device=sizes.device).unsqueeze(1)
    drawn = torch.empty(len(sizes), count, dtype=torch.int64, device=sizes.device)
    shuffles = largest <= SMALL and len(sizes) >= MANY
    rows = BLOCK if shuffles else max(1, BLOCK // max(1, count))
    parts = zip(uniform.to(sizes.device).split(rows, dim=1), sizes.split(rows), drawn.split(rows), strict=True)
    for part, size, result in parts:
        if shuffles:
            _shuffled(part, size.double(), largest, result)
        else:
            _found(_slots(part, size.double(), step).T.contiguous(), result)
    return drawn.T


def _slots(uniform: Tensor, size: Tensor, step: Tensor | int) -> Tensor:
    # float64 holds 53 random bits, so floor(u * n) < n and its bias is below n / 2**53
    return uniform.mul(size - step).long().add_(step)


def _shuffled(uniform: Tensor, size: Tensor, largest: int, result: Tensor) -> None:
    """Writes to `result` (R, count) what steps swap to the front of R arrays; each call handles only R numbers."""
    array = torch.empty(largest, len(size), dtype=torch.int8, device=size.device)
    for number, row in enumerate(array):
        row.fill_(number)
    for step, each in enumerate(uniform):
        slot = _slots(each, size, step).unsqueeze(0)
        result[:, step] = array.gather(0, slot)[0]
        array.scatter_(0, slot, array[step : step + 1].clone())


def _found(slot: Tensor, result: Tensor) -> None:
    """Writes to `result` (R, count) what each step finds when it swaps places `step` and `slot` (R, count) >= step.

    Place `slot` holds its own number unless an earlier step j with the same slot left another there: the one in place
    j. That is j, unless a step i < j has slot j: the last such step left the one in place i. So it is the root of j in
    the trees of these i, found by path doubling. (A step with slot j = step is its own root; none later has slot j.)
    """
    count = slot.shape[1]
    bits, step = max(1, count - 1).bit_length(), torch.arange(count, device=slot.device)
    root = torch.arange(count + 1, device=slot.device).repeat(len(slot), 1)  # the last is for slots past the end
    # ~i is below any j, and lowest for the last i
    root.scatter_reduce_(1, slot.clamp(max=count), (~step).expand_as(slot), "amin")
    root ^= root >> 63  # ~i becomes i
    for _ in range(bits):
        root = root.gather(1, root)
    key = (slot << bits).add_(step)  # steps of one slot, in their order, next to each other
    key = key.sort(dim=1).values if key.is_cuda else torch.from_numpy(np.sort(key.numpy(), axis=1))  # 6 times as fast
    place, at = key >> bits, key & (2**bits - 1)
    result.scatter_(1, at[:, :1], place[:, :1])
    moved = root.gather(1, at[:, :-1])
    result.scatter_(1, at[:, 1:], moved.where(place[:, 1:] == place[:, :-1], place[:, 1:]))


class ClassSampler:
    """Draws distinct classes, and distinct items of each, from labeled items, with batched operations.

    Classes may have different sizes. The same CPU generator state gives the same items on every machine and device.

    Args:
        labels: (M,) class of each item: any integers, or strings.
        classes: number of classes per draw.
        per_class: number of items per class.
        what: what is drawn, for messages.
        class_names: the names that the labels are indices into, if any, for messages.

    Raises:
        UsageError: labels that are neither integers nor strings, too few classes, or a class (which is named) with
            too few items.
    """

    def __init__(self, labels: Any, classes: int, per_class: int, what: str, class_names: Sequence[str] = ()) -> None:
        labels, names = as_labels(labels, len(labels), "the sampler's")
        class_names = class_names or names
        self.classes, self.per_class = classes, per_class
        values, self.counts = torch.unique(labels, return_counts=True)
        if (found := len(values)) < classes:
            do = "ask for fewer, or use a set with more classes"
            raise UsageError(f"expected at least {classes} classes for {what}, got {found} classes; {do}")
        check_enough_items(values, self.counts, per_class, what, class_names)
        self.largest = int(self.counts.max())
        # Items sorted by class: item i of class c is items[starts[c] + i].
        self.items = torch.argsort(labels, stable=True)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, times: int, generator: torch.Generator) -> Tensor:
        """Draws `times` times: (times, classes, per_class) indices into the labels."""
        num_classes = torch.full((times,), len(self.counts), device=self.items.device)
        drawn = draw_without_replacement(num_classes, self.classes, generator, len(self.counts))
        drawn = drawn.T.flatten()  # (times * classes,)
        rank = draw_without_replacement(self.counts[drawn], self.per_class, generator, self.largest)
        place = rank.add_(self.starts[drawn]).T.flatten()
        return self.items.index_select(0, place).unflatten(0, (times, self.classes, self.per_class))
