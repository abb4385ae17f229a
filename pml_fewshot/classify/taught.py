"""Taught: the examples that a classifier was taught, in an order that does not depend on when they came."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError, check_choice
from pml_fewshot.evaluation.support import Support

SAME = 1e-4  # relative difference of one photo embedded twice: other batch sizes round differently, by about 1e-6
MARKS = 4
MOST_BLOCKS = 64
WINDOW = 4  # of consecutive examples by their first mark, among which duplicates are searched for


@dataclass(frozen=True, eq=False)
class Taught:
    """Examples of W classes, sorted by class and within a class by their marks, so independent of when they came.

    Teaching one class more to a thousand takes milliseconds, because nothing of the others is copied: examples stay in
    the blocks in which they came, and what is known of each class is kept.

    Args:
        classes: (W,) sorted labels, either numbers or strings.
        sizes: number of examples of each class, S in total.
        blocks: S embeddings in total, (n, D) each, float32 or float64.
        order: (S,) the row of each example in the concatenated blocks.
        marks: (S, 4) products of each with fixed directions, to find equal ones without comparing all.
        sources: S strings, where each came from; empty if not known.
        means: (W, D) mean of each class.
    """

    classes: np.ndarray
    sizes: tuple[int, ...]
    blocks: tuple[Tensor, ...]
    order: np.ndarray
    marks: np.ndarray
    sources: tuple[str, ...]
    means: Tensor

    @staticmethod
    def of(items: Tensor, labels: np.ndarray, sources: Sequence[str]) -> "Taught":
        """Created from examples (n, D), labels (n,) and n sources."""
        nothing = np.empty(0, np.int64)
        empty = Taught(labels[:0], (), (items[:0],), nothing, np.empty((0, MARKS)), (), items[:0])
        return empty.plus(items, labels, sources)

    def plus(self, items: Tensor, labels: np.ndarray, sources: Sequence[str]) -> "Taught":
        """A new Taught with more examples; this one is not changed.

        Raises:
            UsageError: embeddings of another width, or labels of another kind (UsageTypeError).
        """
        known = len(self.classes) > 0
        if items.shape[1] != self.means.shape[1]:
            width = f"{self.means.shape[1]} dimensions, as taught, got {items.shape[1]}"
            raise UsageError(f"expected embeddings of {width}; use the same embedder")
        if known and kind_of(labels) != kind_of(self.classes):
            got = f"{labels.tolist()[0]!r} beside {self.classes.tolist()[0]!r}"
            raise UsageTypeError(f"expected labels of one kind, numbers or texts, got {got}; convert them")
        classes = np.unique(np.concatenate([self.classes, labels]))
        own, new = np.searchsorted(classes, self.classes), np.searchsorted(classes, labels)
        number = np.concatenate([own.repeat(self.sizes), new]).astype(np.int64)
        marks = np.concatenate([self.marks, (items @ directions(items.shape[1]).to(items.dtype)).numpy()])
        order = np.lexsort((marks[:, 0], number))
        every = [*self.sources, *sources]
        sizes = np.bincount(number, minlength=len(classes))
        blocks = (*self.blocks, items) if known else (items,)
        dtype = torch.promote_types(self.means.dtype, items.dtype)
        rows = np.concatenate([self.order, sum(map(len, blocks[:-1])) + np.arange(len(items))])[order]
        means = self.means.new_empty(len(classes), items.shape[1], dtype=dtype)
        means[own] = self.means.to(dtype)
        changed = np.unique(new)
        among = np.isin(number[order], changed)
        place = torch.from_numpy(np.searchsorted(changed, number[order][among]))
        # in sequence, whichever classes change together: the same bits in any order of teaching
        sums = means.new_zeros(len(changed), means.shape[1]).index_add_(
            0, place, rows_of(blocks, rows[among]).to(dtype)
        )
        means[changed] = sums / torch.from_numpy(sizes[changed]).to(dtype)[:, None]
        if len(blocks) > MOST_BLOCKS:
            blocks, rows = (rows_of(blocks, rows),), np.arange(len(rows))
        taught = tuple(every[place] for place in order)
        return Taught(classes, tuple(sizes.tolist()), blocks, rows, marks[order], taught, means)

    def without(self, label: object) -> "Taught":
        """A new Taught without a class; a UsageError if there is no such class, or no other."""
        names = self.classes.tolist()
        if label not in names:
            check_choice("a class to remove", label, [str(name) for name in names])
        if len(names) == 1:
            raise UsageError(f"expected another class beside {label!r}, got none; teach one, or make a new classifier")
        gone = names.index(label)
        keep = self.labels.numpy() != gone
        return Taught(
            np.delete(self.classes, gone),
            (*self.sizes[:gone], *self.sizes[gone + 1 :]),
            (rows_of(self.blocks, self.order[keep]),),
            np.arange(keep.sum()),
            self.marks[keep],
            tuple(source for source, stays in zip(self.sources, keep, strict=True) if stays),
            torch.cat([self.means[:gone], self.means[gone + 1 :]]),
        )

    @cached_property
    def items(self) -> Tensor:
        """(S, D) embeddings, gathered on first access."""
        return rows_of(self.blocks, self.order)

    @cached_property
    def support(self) -> Support:
        return Support(self._in_one_problem, self.sizes, self.means[None])

    def _in_one_problem(self) -> Tensor:  # (a lambda would not pickle)
        return self.items[None]

    @property
    def labels(self) -> Tensor:
        """(S,) class of each example, from 0 to W - 1."""
        return self.support.labels

    def twins(self) -> list[tuple[int, int]]:
        """Pairs of examples of different classes that are the same photo, up to rounding."""
        order, labels, pairs = np.argsort(self.marks[:, 0], kind="stable"), self.labels.numpy(), []
        bound = SAME * np.linalg.norm(self.marks, axis=1)
        for step in range(1, WINDOW):
            first, second = order[:-step], order[step:]
            near = (np.abs(self.marks[second] - self.marks[first]) <= bound[second, None]).all(axis=1)
            for a, b in zip(*(part[near & (labels[first] != labels[second])] for part in (first, second)), strict=True):
                one, other = rows_of(self.blocks, self.order[[a, b]])
                if torch.dist(one, other) <= SAME * torch.linalg.vector_norm(other):
                    pairs.append((int(min(a, b)), int(max(a, b))))
        return sorted(pairs)


def rows_of(blocks: Sequence[Tensor], rows: np.ndarray) -> Tensor:
    """(n, D) the given rows of the concatenated blocks."""
    if len(blocks) == 1:
        return blocks[0][torch.from_numpy(rows)]
    dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
    found, start = blocks[0].new_empty(len(rows), blocks[0].shape[1], dtype=dtype), 0
    for block in blocks:
        inside = np.flatnonzero((rows >= start) & (rows < start + len(block)))
        found[inside] = block[torch.from_numpy(rows[inside] - start)].to(dtype)
        start += len(block)
    return found


@lru_cache
def directions(dims: int) -> Tensor:
    """(D, 4) fixed random directions."""
    return torch.randn(dims, MARKS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def kind_of(labels: np.ndarray) -> str:
    """Whether labels are texts or numbers."""
    is_text = labels.dtype.kind == "U" or (labels.dtype.kind == "O" and all(isinstance(each, str) for each in labels))
    return "texts" if is_text else "numbers"
