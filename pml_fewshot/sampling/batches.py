"""Ordinary labeled batches: their size (BatchSpec) and the batch itself (Batch).

Letters in shapes: B items of a batch, C H W image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, as_labels, check_at_least_one
from pml_fewshot.sampling.moving import moved


@dataclass(frozen=True)
class BatchSpec:
    """The size of a batch: `classes` classes with `per_class` items each, as PML's pair and triplet losses need.

    Raises:
        UsageError: fewer than 2 classes, less than 1 item per class, or other than 1 or 2 views.
    """

    classes: int
    per_class: int
    views: int = 1
    """2 for two augmented views of each item, for SelfSupervisedLoss and VICRegLoss"""

    def __post_init__(self) -> None:
        for name in ("classes", "per_class"):
            check_at_least_one(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # JSON rejects numpy's integers
        if self.classes < 2:
            raise UsageError(
                f"expected at least 2 classes in a batch, got {self.classes}; there is none to compare with"
            )
        if self.views not in (1, 2):
            raise UsageError(f"expected 1 or 2 views, got {self.views}; use 2 for self-supervised losses, else 1")

    @property
    def size(self) -> int:
        """Items in a batch."""
        return self.classes * self.per_class

    def __str__(self) -> str:
        return f"{self.classes} classes with {self.per_class} items each"


@dataclass(frozen=True)
class Batch:
    """Labeled images, or other items.

    Args:
        images: (B, C, H, W) floats in [0, 1], or other items (B, *item).
        labels: (B,) int64, the dataset's own; other integers are converted.
        other_view: (B, *item), the same images augmented a second time, or None.
    """

    images: Tensor
    labels: Tensor
    other_view: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.ndim < 2:
            got = tuple(self.images.shape)
            raise UsageError(f"expected images (B, C, H, W), or items (B, *item), got {got}; stack them")
        object.__setattr__(self, "labels", as_labels(self.labels, len(self.images), "a batch's")[0])

    @property
    def classes(self) -> Tensor:
        """The classes of its items, for messages."""
        return self.labels

    def to(self, device: torch.device | str) -> "Batch":
        other = moved(self.other_view, device) if self.other_view is not None else None
        return Batch(moved(self.images, device), moved(self.labels, device), other)
