"""Labeled images in one tensor (FewShotDataset) and their division into classes to train and evaluate on (Splits)."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_fewshot.checks import UsageError, UsageTypeError, check_disjoint, check_labels


class FewShotDataset(Dataset[tuple[Tensor, int]]):
    """uint8 images in one tensor with int64 labels and class names.

    Args:
        images: (M, C, H, W) uint8, a tensor on any device or a numpy array. Of a memory map (`numpy.load(...,
            mmap_mode="c")` or "r") only the images that are asked for are read, but `to`, `select_classes`,
            `with_rotations_as_classes` and `concat` copy into memory, as does giving a slice of a read-only map.
        labels: (M,) int64, indices into class_names.
        class_names: one for each class.
        note: what readers of figures from this set must know ("150 of 600 images a class"); kept with the results.

    Raises:
        UsageError: another type (UsageTypeError), shape or number of images or labels, a label that is no index into
            the class names, a repeated name, or a class without an image.
    """

    recorded_checksum = ""  # what `checksum` gave when a loader stored the images in its cache

    def __init__(self, images: Tensor | np.ndarray, labels: Tensor, class_names: Sequence[str], note: str = "") -> None:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(_writable(images))
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        if images.dtype != torch.uint8:
            raise UsageTypeError(f"expected uint8 images, got {got}; scale floats in [0, 1] by 255, round, and convert")
        if images.ndim != 4 or len(images) == 0:
            raise UsageError(f"expected images of shape (M, C, H, W), M > 0, got {got}; add images or the missing axis")
        check_labels(labels, len(images), "the data set's")
        low, high, classes = int(labels.min()), int(labels.max()), len(class_names)
        if low < 0 or high >= classes:
            wanted, do = f"indices into the {classes} class names", "number the classes from 0 and name each"
            raise UsageError(f"expected labels as {wanted}, got labels from {low} to {high}; {do}")
        if repeated := [name for name, count in Counter(class_names).items() if count > 1]:
            raise UsageError(f"expected different class names, got {repeated[:3]} more than once; rename them")
        if empty := (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist():
            got = f"none in {len(empty)} of {classes}, first {class_names[empty[0]]!r}"
            raise UsageError(
                f"expected an image in every class, got {got}; add images or leave out empty classes' names"
            )
        self.images, self.labels = images, labels
        self.class_names, self.note = tuple(class_names), note

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Image (C, H, W) as floats in [0, 1], and its label, for any DataLoader; `floats` is faster."""
        return self.images[item].to(torch.float32).div_(255), int(self.labels[item])

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.item_shape))
        note = f", {self.note}" if self.note else ""
        return f"FewShotDataset({len(self)} images of {shape}, {len(self.class_names)} classes{note})"

    @property
    def item_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "FewShotDataset":
        """Returns the set with images and labels on `device` (itself when they are there already)."""
        if self.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved

    def floats(self, index: Tensor) -> Tensor:
        """The images at `index`, of any shape and device, as floats in [0, 1] on the set's: (*index.shape, C, H, W)."""
        flat = self.images[index.to(self.device).flatten()]
        return flat.to(torch.float32).div_(255).reshape(*index.shape, *self.item_shape)

    def first(self, count: int) -> "FewShotDataset":
        """The first images, to try things out on, all in one class: the labels do not matter."""
        images = self.images[:count]
        return FewShotDataset(images, torch.zeros(len(images), dtype=torch.int64, device=self.device), ["any"])

    def fingerprint(self) -> str:
        """16 hex digits of class names, item shape and labels: which set this is, without reading its images."""
        digest = hashlib.blake2b(repr((self.class_names, self.item_shape)).encode(), digest_size=8)
        digest.update(self.labels.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    def checksum(self, recompute: bool = False) -> str:
        """16 hex digits of the whole set, images included: what a loader recorded, else computed at 1.3 GB a second.

        Another value with recompute means that the memory-mapped file is damaged, or the images were changed since.
        """
        if self.recorded_checksum and not recompute:
            return self.recorded_checksum
        digest = hashlib.blake2b(self.fingerprint().encode(), digest_size=8)
        for images in self.images.split(max(1, 2**24 // self.images[0].numel())):  # 16 MiB
            digest.update(images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def select_classes(self, classes: Sequence[int]) -> "FewShotDataset":
        """Returns the items of the numbered classes, relabeled from 0 in the order given."""
        if not len(classes):
            raise UsageError("expected at least one class, got none; give the indices of the classes to keep")
        new_label = torch.full((len(self.class_names),), -1, device=self.device)
        new_label[torch.as_tensor(classes, device=self.device)] = torch.arange(len(classes), device=self.device)
        labels = new_label[self.labels]
        keep = (labels >= 0).nonzero().flatten()
        return FewShotDataset(self.images[keep], labels[keep], [self.class_names[c] for c in classes], self.note)

    def with_rotations_as_classes(self) -> "FewShotDataset":
        """Returns four times the classes, as in Omniglot papers since Santoro et al. 2016.

        Class c rotated by 90 r degrees is a class of its own, of label 4 c + r and name "<name>/rot000" and so on.
        """
        images = torch.cat([self.images.rot90(r, dims=(2, 3)) for r in range(4)])
        labels = torch.cat([self.labels * 4 + r for r in range(4)])
        names = [f"{name}/rot{90 * r:03d}" for name in self.class_names for r in range(4)]
        return FewShotDataset(images, labels, names, self.note)


def concat(datasets: Iterable[FewShotDataset]) -> FewShotDataset:
    """Returns one set with the items and classes of all, in the order given; no class name may be in two of them."""
    datasets = list(datasets)
    starts = np.cumsum([0, *(len(d.class_names) for d in datasets[:-1])]).tolist()
    return FewShotDataset(
        torch.cat([d.images for d in datasets]),
        torch.cat([d.labels + start for d, start in zip(datasets, starts, strict=True)]),
        [name for d in datasets for name in d.class_names],
        "; ".join(dict.fromkeys(d.note for d in datasets if d.note)),
    )


@dataclass(frozen=True)
class Splits:
    """Training, validation and test classes: three sets without a common class.

    Args:
        train: classes to learn from.
        val: classes to choose a checkpoint by, or None where the published split has none.
        test: classes to report figures on.

    Raises:
        UsageError: a class name is in two of the sets.
    """

    train: FewShotDataset
    val: FewShotDataset | None
    test: FewShotDataset

    def __post_init__(self) -> None:
        check_disjoint([(name, part.class_names) for name, part in vars(self).items() if part is not None])


def _writable(images: np.ndarray) -> np.ndarray:
    """torch wants writable memory: a read-only map is opened again copy-on-write, so its file stays as it is."""
    if images.flags.writeable:
        return images
    is_slice = isinstance(images.base, np.memmap)  # its place in the file is not known
    if isinstance(images, np.memmap) and images.filename and images.flags.c_contiguous and not is_slice:
        return np.memmap(images.filename, images.dtype, "c", images.offset, images.shape)
    return images.copy()
