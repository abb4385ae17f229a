"""Support: the labeled items that a head is fitted to, in classes of equal or different sizes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.modes import widened


class Support:
    """Labeled items of E problems at once, with the same class sizes in each of them.

    Args:
        items: (E, S, D) floats, those of the first class first; or a function that returns them when a head needs them.
        sizes: number of items in each of the W classes, S in total.
        prototypes: (E, W, D) class means, if they are already known.
    """

    def __init__(
        self, items: Tensor | Callable[[], Tensor], sizes: Sequence[int], prototypes: Tensor | None = None
    ) -> None:
        self._items, self.sizes, self._prototypes = items, sizes, prototypes

    @staticmethod
    def of(episodes: Tensor) -> "Support":
        """Builds it from the support (E, W, K, D) of episodes, in float32 at least."""
        if not isinstance(episodes, Tensor):
            do = "stack classes of equally many items; FewShotClassifier takes any numbers"
            raise UsageTypeError(f"expected a support (E, W, K, D), got a {type(episodes).__name__}; {do}")
        if episodes.ndim != 4 or min(episodes.shape[1:3]) < 1:
            wanted, got = "a support (E, W, K, D) of at least one class and shot", tuple(episodes.shape)
            raise UsageError(f"expected {wanted}, got shape {got}; give each class its items")
        return Support(widened(episodes).flatten(1, 2), (episodes.shape[2],) * episodes.shape[1])

    @property
    def items(self) -> Tensor:
        """(E, S, D)"""
        return self._items if isinstance(self._items, Tensor) else self._items()

    @property
    def prototypes(self) -> Tensor:
        """(E, W, D) mean of each class."""
        return self.means(self.items) if self._prototypes is None else self._prototypes

    @property
    def shots(self) -> int | None:
        """K if all classes have K items, else None."""
        return self.sizes[0] if len(set(self.sizes)) == 1 else None

    @property
    def labels(self) -> Tensor:
        """(S,) class of each item, from 0 to W - 1."""
        known = self._items if isinstance(self._items, Tensor) else self.prototypes
        repeats = self.shots or torch.tensor(self.sizes, device=known.device)
        return torch.arange(len(self.sizes), device=known.device).repeat_interleave(repeats)

    def means(self, values: Tensor) -> Tensor:
        """Returns the class means (E, W, D) of one row per item (E, S, D)."""
        if self.shots:
            return values.unflatten(1, (-1, self.shots)).mean(dim=2)
        sums = values.new_zeros(len(values), len(self.sizes), values.shape[2]).index_add_(1, self.labels, values)
        return sums / values.new_tensor(self.sizes)[:, None]

    def by_class(self, values: Tensor, how: Literal["amax", "mean", "logsumexp"]) -> Tensor:
        """Reduces one value per query and item (E, N, S) over the items of each class, to (E, N, W)."""
        if self.shots:
            return getattr(values.unflatten(2, (-1, self.shots)), how)(dim=3)
        classes = self.labels.expand_as(values)
        empty = values.new_full((*values.shape[:2], len(self.sizes)), -torch.inf)
        if how != "logsumexp":
            return empty.scatter_reduce(2, classes, values, how, include_self=False)
        largest = empty.scatter_reduce(2, classes, values, "amax").detach()
        shares = torch.zeros_like(empty).scatter_add(2, classes, (values - largest.gather(2, classes)).exp())
        return shares.log() + largest

    def without(self, left_out: Tensor) -> "Support":
        """Returns the support without the items marked in (S,); at least one item of every class must remain."""
        gone = torch.bincount(self.labels[left_out], minlength=len(self.sizes)).tolist()
        sizes = [size - count for size, count in zip(self.sizes, gone, strict=True)]
        return Support(self.items[:, ~left_out], sizes)

    def class_by_class(self) -> Iterator[tuple[Tensor, "Support"]]:
        """Yields the items (E, K, D) of each class, and the support of the other classes."""
        for number, own in enumerate(self.items.split(list(self.sizes), dim=1)):
            sizes = [*self.sizes[:number], *self.sizes[number + 1 :]]
            yield own, Support(self.items[:, self.labels != number], sizes)
