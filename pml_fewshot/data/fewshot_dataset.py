"""Labelled images in one tensor (FewShotDataset) and their division into classes for training and judging (Splits)."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_fewshot.checks import check_disjoint, check_labels, require


class FewShotDataset(Dataset[tuple[Tensor, int]]):
    """uint8 images in one tensor with int64 labels and class names.

    The whole set lies in memory, on the device of your choice, or in a memory-mapped file: give a `numpy.memmap` (or
    `numpy.load(..., mmap_mode="r")`) and only the images that are asked for are read.

    Args:
        images: (M, C, H, W) uint8, a tensor or a numpy array (a memory map too).
        labels: (M,) int64, indices into class_names.
        class_names: one name for each class.
        note: what a reader of a figure from this set must know ("150 of 600 images a class"), kept with results.

    Raises:
        TypeError: images are not uint8 or labels not int64.
        ValueError: other shapes, labels of another length or outside of the class names, a repeated name, or a
            class without an image.

    A map stays a map until its images are moved or rearranged: `.to(another device)`, `of_classes`, `rotated` and
    `join` copy into memory, and so does a read-only slice of a map (slice one that was opened with mode "c").
    """

    def __init__(self, images: Tensor | np.ndarray, labels: Tensor, class_names: Sequence[str], note: str = "") -> None:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(_writable_view(images))
        if not isinstance(images, Tensor):
            raise TypeError(
                f"expected images as a tensor or a numpy array, got a {type(images).__name__}; convert them"
            )
        if images.dtype != torch.uint8:
            raise TypeError(
                f"expected uint8 images, got {images.dtype}; scale floats in [0, 1] by 255, round, and convert "
                "(NaN and values outside of [0, 1] have no uint8 form)"
            )
        require(
            images.ndim == 4, "images of shape (M, C, H, W)", f"shape {tuple(images.shape)}", "add the missing axis"
        )
        check_labels(labels, len(images), "the data set's")
        require(len(images) > 0, "at least one image", "none", "check the source of the images")
        low, high = int(labels.min()), int(labels.max())
        require(
            low >= 0 and high < len(class_names),
            f"labels from 0 to {len(class_names) - 1}, indices into the {len(class_names)} class names",
            f"labels from {low} to {high}",
            "number the classes from 0 and name each",
        )
        repeated = [name for name, count in Counter(class_names).items() if count > 1]
        require(not repeated, "class names that are all different", f"{repeated[:3]} more than once", "rename them")
        empty = (torch.bincount(labels, minlength=len(class_names)) == 0).nonzero().flatten().tolist()
        require(
            not empty,
            "at least one image in every class",
            f"none in {len(empty)} of {len(class_names)}, first {class_names[empty[0]]!r}" if empty else "",
            "leave out the names of empty classes",
        )
        self.images = images
        self.labels = labels
        self.class_names = tuple(class_names)
        self.note = note

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Image (C, H, W) as floats in [0, 1], and its label: the set is a map-style data set for any DataLoader.

        That is what PML's trainers and testers want. One image at a time is slow; our own streams take `floats`.
        """
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
        return FewShotDataset(self.images.to(device), self.labels.to(device), self.class_names, self.note)

    def floats(self, index: Tensor) -> Tensor:
        """Returns the images at `index`, of any shape, as floats in [0, 1]: shape (*index.shape, C, H, W)."""
        flat = self.images[index.to(self.images.device).flatten()]
        return flat.to(torch.float32).div_(255).reshape(*index.shape, *self.item_shape)

    def fingerprint(self) -> str:
        """16 hex digits of class names, labels and item shape: which set this is, without reading its images."""
        digest = hashlib.blake2b(repr((self.class_names, self.item_shape)).encode(), digest_size=8)
        digest.update(self.labels.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    def checksum(self) -> str:
        """16 hex digits of all that it holds, images too: 1.3 GB a second, a part of the set at a time."""
        digest = hashlib.blake2b(self.fingerprint().encode(), digest_size=8)
        for images in self.images.split(max(1, 2**24 // self.images[0].numel())):  # 16 MiB
            digest.update(images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def of_classes(self, classes: Sequence[int]) -> "FewShotDataset":
        """Returns the items of the numbered classes, relabelled from 0 in the order given."""
        require(len(classes) > 0, "at least one class", "none", "name the classes to keep")
        new_label = torch.full((len(self.class_names),), -1, device=self.device)
        new_label[torch.as_tensor(classes, device=self.device)] = torch.arange(len(classes), device=self.device)
        labels = new_label[self.labels]
        keep = (labels >= 0).nonzero().flatten()
        names = [self.class_names[c] for c in classes]
        return FewShotDataset(self.images[keep], labels[keep], names, self.note)

    def rotated(self) -> "FewShotDataset":
        """Returns four times the classes: each turned by 0, 90, 180 and 270 degrees is a class of its own.

        The custom of Omniglot papers since Santoro et al. 2016. Class c turned by 90 r degrees has label 4 c + r and
        the name "<name>/rot000" and so on.
        """
        images = torch.cat([self.images.rot90(r, dims=(2, 3)) for r in range(4)])
        labels = torch.cat([self.labels * 4 + r for r in range(4)])
        names = [f"{name}/rot{90 * r:03d}" for name in self.class_names for r in range(4)]
        return FewShotDataset(images, labels, names, self.note)


def join(datasets: Iterable[FewShotDataset]) -> FewShotDataset:
    """Returns one set with the items and classes of all, labels moved up in the order given.

    Raises:
        ValueError: a class name stands in two of them.
    """
    datasets = list(datasets)
    starts = np.cumsum([0] + [len(d.class_names) for d in datasets])
    return FewShotDataset(
        torch.cat([d.images for d in datasets]),
        torch.cat([d.labels + int(start) for d, start in zip(datasets, starts, strict=False)]),
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
        ValueError: a class name stands in two of the sets.
    """

    train: FewShotDataset
    val: FewShotDataset | None
    test: FewShotDataset

    def __post_init__(self) -> None:
        sets = (("train", self.train), ("val", self.val), ("test", self.test))
        check_disjoint([(name, part.class_names) for name, part in sets if part is not None])

    def to(self, device: torch.device | str) -> "Splits":
        return Splits(self.train.to(device), self.val.to(device) if self.val else None, self.test.to(device))


def _writable_view(images: np.ndarray) -> np.ndarray:
    """torch wants writable memory: a read-only memory map is opened again copy-on-write, so its file stays as it is."""
    if images.flags.writeable:
        return images
    if isinstance(images, np.memmap) and images.filename is not None and images.base is not None:
        whole = not isinstance(images.base, np.memmap)  # a slice of a map has the map as its base
        if whole and images.flags.c_contiguous:
            return np.memmap(images.filename, images.dtype, "c", images.offset, images.shape, "C")
    return images.copy()
