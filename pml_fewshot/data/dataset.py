"""Labeled images or features in one tensor (FewShotDataset), and training, validation and test sets (Splits)."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pml_fewshot.checks import UsageError, UsageTypeError, as_labels, as_names, check_disjoint, check_finite, renumbered
from pml_fewshot.data.class_lists import ClassLists, divide_classes
from pml_fewshot.data.from_dataset import collect
from pml_fewshot.data.images import Resize, Size
from pml_fewshot.embedders.modes import widened

HIGHEST = {torch.uint8: 255, torch.uint16: 65535}  # the value mapped to 1
BLOCK_BYTES = 2**24  # read at a time: 16 MiB


class FewShotDataset(Dataset[tuple[Tensor, int]]):
    """Items in one tensor, usually uint8 images, with int64 labels and class names.

    Args:
        images: (M, C, H, W) uint8, or uint16 (16-bit gray), a tensor on any device or a numpy array; or floats of any
            shape (M, *item) that a network takes as they are: features of a frozen trunk. From a memory map
            (`numpy.load(..., mmap_mode="c")` or "r") only the requested items are read, but `to`, `images` of a
            selection, `concat`, rotations and mirror images as classes, and `transformed` by more than a crop copy it.
        labels: (M,) integers, indices into class_names; or strings, from which the class names are derived. Lists,
            numpy arrays and other integer types are converted.
        class_names: one per class; the labels themselves when None.
        note: what readers of results on this set must know ("150 of 600 images a class"); kept with the results.
        rows: (M,) int64, the rows of `images`, a memory map, that are its items; all when None.

    Raises:
        UsageError: a wrong type (UsageTypeError), shape or number of images or labels, a label that is not an index
            into the class names, a repeated name, or a class without images.
    """

    digests: Tensor | None = None  # (M,) int64 digest of each item's values, if a loader has it from its cache

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Any,
        class_names: Sequence[str] | None = None,
        note: str = "",
        rows: Tensor | None = None,
    ) -> None:
        self.mapped = rows is not None  # whether its items are in a file; selections leave them there
        if isinstance(images, np.ndarray):
            images = _readable(images)
            self.mapped |= isinstance(images, np.memmap)
            images = torch.from_numpy(images)
        if not isinstance(images, Tensor):
            got = f"got {type(images).__name__}; use FewShotDataset.from_dataset, or stack them into one"
            raise UsageTypeError(f"expected images as a tensor or a numpy array, {got}")
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        is_image = images.dtype in HIGHEST
        if not is_image and not images.is_floating_point():
            raise UsageTypeError(f"expected uint8 images, or floats, got {got}; convert them")
        if (images.ndim != 4 if is_image else images.ndim < 2) or len(images) == 0:
            wanted = "images of shape (M, C, H, W)" if is_image else "features of shape (M, D)"
            raise UsageError(f"expected {wanted}, M > 0, got {got}; add items or the missing axis")
        if is_image and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            raise UsageError(f"expected the channels before height and width, got {got}; permute to (M, C, H, W)")
        if not is_image:
            check_finite(images, "features")
        labels, names = as_labels(labels, len(images) if rows is None else len(rows), "the data set's")
        if class_names is None and not names:
            values, labels = torch.unique(labels, return_inverse=True)
            names = tuple(map(str, values.tolist()))
        if class_names is not None:
            given = as_names(class_names)
            labels, names = renumbered(labels, names, given) if names else labels, given
        low, high, classes = int(labels.min()), int(labels.max()), len(names)
        if low < 0 or high >= classes:
            wanted, do = f"indices into the {classes} class names", "number the classes from 0 and name each"
            raise UsageError(f"expected labels as {wanted}, got labels from {low} to {high}; {do}")
        if empty := (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist():
            got = f"none in {len(empty)} of {classes}, first {names[empty[0]]!r}"
            raise UsageError(
                f"expected an image in every class, got {got}; add images or leave out empty classes' names"
            )
        self._stored, self._rows = images, rows
        self.labels, self.class_names, self.note = labels.to(images.device), names, note

    @classmethod
    def from_dataset(
        cls,
        source: Any,
        image_size: Size | None = None,
        image: str | None = None,
        label: str | None = None,
        class_names: Sequence[str] | None = None,
        resize: Resize = "crop",
        workers: int = 0,
        note: str = "",
    ) -> "FewShotDataset":
        """Reads a dataset of (image, label) pairs, like torchvision's, or with such columns, like Hugging Face's.

        Args:
            source: a torch or Hugging Face dataset, or any iterator. Images are PIL images, tensors (C, H, W) or (H, W)
                of uint8 or of floats in [0, 1], or numpy arrays with the channels last; labels are integers or strings.
                Its own transforms are applied once, as items are read: leave out random ones and Normalize. 16-bit
                images are reduced to 8 bits.
            image_size: height and width, or one number for both; as in load_image_folder. When None, the images keep
                their size, which must be the same for all. Gray images among color ones get three channels.
            image: the image column; when None, `image`, `img` or the only image column.
            label: the label column; when None, `label`, `labels`, `fine_label` or the only column of class labels.
            class_names: when None, the source's own (`classes`, or the column's), else the labels as text. Those
                without items are left out.
            resize: "crop", "pad" or "stretch", as in load_image_folder.
            workers: number of processes that read it; 0 to read in this one.
            note: kept with the results.

        Raises:
            UsageError: a missing column, images of different sizes, floats outside [0, 1], or another kind of item.
        """
        return cls(*collect(source, image_size, image, label, class_names, resize, workers), note)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Returns an item as floats, images (C, H, W) in [0, 1], and its label for a DataLoader; `floats` is faster."""
        return self.floats(torch.tensor(range(len(self))[item])), int(self.labels[item])

    def __repr__(self) -> str:
        shape, kind = "x".join(map(str, self.item_shape)), "images" if self._stored.dtype in HIGHEST else "items"
        note = f", {self.note}" if self.note else ""
        return f"FewShotDataset({len(self)} {kind} of {shape}, {len(self.class_names)} classes{note})"

    @property
    def images(self) -> Tensor:
        """The stored items (M, *item); for a selection from a memory map, a copy in memory."""
        return self._items(slice(None)) if self._rows is not None else self._stored

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one item, (C, H, W) for images."""
        return tuple(self._stored.shape[1:])

    @property
    def nbytes(self) -> int:
        """The size of all items in bytes."""
        return len(self) * self._stored[:1].nbytes

    @property
    def device(self) -> torch.device:
        return self._stored.device

    def to(self, device: torch.device | str) -> "FewShotDataset":
        """Returns the set with images and labels on `device` (itself when they are there already)."""
        if self.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved._stored, moved._rows, moved.labels = self.images.to(device), None, self.labels.to(device)
        moved.mapped = False
        return moved

    def floats(self, index: Tensor | slice, device: torch.device | str | None = None) -> Tensor:
        """Returns the items at `index`, of any shape and device, as float32, images in [0, 1]: (*index.shape, *item).

        They are on `device`, by default the set's own.
        """
        shape = index.shape if isinstance(index, Tensor) else None
        if isinstance(index, Tensor):
            index = index.to(self.device).flatten()
        items = as_floats(self._items(index).to(device or self.device)).float()
        return items if shape is None else items.reshape(*shape, *self.item_shape)

    def first(self, count: int) -> "FewShotDataset":
        """Returns the first items, for trial runs, all in one class: the labels do not matter."""
        items = self._items(slice(count))
        return FewShotDataset(items, torch.zeros(len(items), dtype=torch.int64, device=self.device), ["any"])

    def fingerprint(self) -> str:
        """Returns 16 hex digits of class names, item shape and labels, to identify the set without reading images."""
        digest = hashlib.blake2b(repr((self.class_names, self.item_shape)).encode(), digest_size=8)
        digest.update(self.labels.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    def checksum(self, recompute: bool = False) -> str:
        """Returns 16 hex digits of the whole set with its images: as recorded by a loader, else read at 1 GB/s.

        A different value with recompute means that the memory-mapped file is damaged or the images were changed since.
        """
        digests = self.digests
        if digests is None or recompute:
            parts = (self._items(part).cpu().contiguous().numpy() for part in self._blocks())
            digests = torch.cat([digests_of(part) for part in parts])
        digest = hashlib.blake2b(self.fingerprint().encode(), digest_size=8)
        digest.update(digests.numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    def _items(self, index: Tensor | slice) -> Tensor:
        return items_at(self._stored, index if self._rows is None else self._rows[index])

    def _blocks(self) -> Iterator[slice]:
        size = max(1, BLOCK_BYTES // max(1, self._stored[:1].nbytes))
        return (slice(start, start + size) for start in range(0, len(self), size))

    def select_classes(self, classes: Sequence[int | str]) -> "FewShotDataset":
        """Returns the items of the given classes (numbers or names), relabeled from 0 in the order given."""
        if not len(classes):
            raise UsageError("expected at least one class, got none; give the indices of the classes to keep")
        number = {name: number for number, name in enumerate(self.class_names)}
        known = {*range(len(number)), *number}
        if unknown := [c for c in classes if isinstance(c, bool) or c not in known]:
            there = f"{', '.join(map(repr, self.class_names[:3]))}, .., {len(number)} in all"
            raise UsageError(f"expected names or numbers of classes of {there}, got {unknown[:3]}; choose among them")
        numbers = [number[c] if isinstance(c, str) else c for c in classes]
        new_label = torch.full((len(self.class_names),), -1, device=self.device)
        new_label[torch.as_tensor(numbers, device=self.device)] = torch.arange(len(numbers), device=self.device)
        labels = new_label[self.labels]
        keep = (labels >= 0).nonzero().flatten()
        if self.mapped:  # stays in its file
            stored, rows = self._stored, keep if self._rows is None else self._rows[keep]
        else:
            stored, rows = self._items(keep), None
        note = self.note
        if note and len(set(numbers)) < len(number) and " (of all " not in note:
            note += f" (of all {len(number)} classes)"  # its counts are of the set that was loaded
        selected = FewShotDataset(stored, labels[keep], [self.class_names[c] for c in numbers], note, rows)
        selected.mapped = self.mapped
        selected.digests = None if self.digests is None else self.digests[keep.cpu()]
        return selected

    def without_small_classes(self, least: int) -> "FewShotDataset":
        """Returns the set without classes that have fewer than `least` items; its note counts them."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names))
        kept = (counts >= least).nonzero().flatten().tolist()
        if len(kept) == len(counts):
            return self
        if not kept:
            raise UsageError(f"expected a class of at least {least} items, got at most {int(counts.max())}; lower it")
        selected, lost = self.select_classes(kept), int(counts[counts < least].sum())
        left_out = f"{len(counts) - len(kept)} of {len(counts)} classes with fewer than {least} items left out"
        selected.note = joined_notes(self.note, f"{left_out} ({lost} items)")
        return selected

    def with_rotations_as_classes(self) -> "FewShotDataset":
        """Returns the set with four times the classes, as in Omniglot papers since Santoro et al. 2016.

        Class c rotated by 90 r degrees becomes a separate class with label 4 c + r and name "<name>/rot000" and so on.
        """
        if len(self.item_shape) != 3 or self.item_shape[1] != self.item_shape[2]:
            do = "load them with one number as image_size"
            raise UsageError(f"expected square images to rotate, got {self}; {do}")
        stored = self.images.view(torch.int16) if self.images.dtype == torch.uint16 else self.images  # as in items_at
        images = torch.cat([torch.rot90(stored, r, dims=(2, 3)) for r in range(4)]).view(self.images.dtype)
        labels = torch.cat([self.labels * 4 + r for r in range(4)])
        names = [f"{name}/rot{90 * r:03d}" for name in self.class_names for r in range(4)]
        return FewShotDataset(images, labels, names, self.note)

    def with_mirrors_as_classes(self) -> "FewShotDataset":
        """Returns the set with twice the classes: class c mirrored left to right becomes a class with label C + c.

        Its name is "<name>/mirrored". Meant for characters, whose mirror images count as different characters; after
        `with_rotations_as_classes` each has its eight symmetries. A selection from a memory map is read into memory.
        """
        if len(self.item_shape) != 3:
            raise UsageError(f"expected images to mirror, got {self}; load images")
        stored = self.images.view(torch.int16) if self.images.dtype == torch.uint16 else self.images  # as in items_at
        images = torch.cat([stored, stored.flip(3)]).view(self.images.dtype)
        labels = torch.cat([self.labels, self.labels + len(self.class_names)])
        names = [*self.class_names, *(f"{name}/mirrored" for name in self.class_names)]
        return FewShotDataset(images, labels, names, self.note)

    def transformed(self, transform: Any) -> "FewShotDataset":
        """Returns the set with `transform` applied once to its images, in memory: `v2.CenterCrop(84)` before tests.

        Args:
            transform: called with stored items (B, *item), 16 MiB at a time; it must not be random. A result that is a
                view of them, such as a crop, takes no extra memory.

        Raises:
            UsageError: it does not return a tensor with as many items of the same type.
        """

        def applied(items: Tensor) -> Tensor:
            kind = items.dtype, items.ndim, len(items)
            result = transform(items)
            if not isinstance(result, Tensor) or (result.dtype, result.ndim, len(result)) != kind or not result.numel():
                got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                wanted = f"a transform from {items.dtype} (B, *item) to the same, here {tuple(items.shape)}"
                raise UsageError(f"expected {wanted}, got {got} from {transform}; leave out what converts or selects")
            return result

        few = self._items(slice(2)).clone()  # two, because a transform of one may return one whatever it is given
        version = few._version
        first = applied(few)
        changed = copy.copy(self)
        changed.digests = None
        is_view = first.untyped_storage().data_ptr() == few.untyped_storage().data_ptr() and few._version == version
        if is_view:
            changed._stored = applied(self._stored)
            return changed
        changed._stored, changed._rows = first.new_empty(len(self), *first.shape[1:]), None
        changed.mapped = False
        for part in self._blocks():
            changed._stored[part] = applied(self._items(part).clone())
        return changed

    def split(
        self,
        splits: ClassLists | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> "Splits":
        """Divides the classes into train, val and test, by lists of names or by a draw; see load_image_folder."""
        lists, note = divide_classes(self.class_names, splits, val_fraction, test_fraction, seed)
        parts = {split: self.select_classes(own) for split, own in lists.items()}
        for part in parts.values():
            part.note = joined_notes(part.note, note)
        return Splits.of(parts)


def as_dataset(data: Any, name: str = "data") -> FewShotDataset:
    """Returns a set unchanged, or an EmbeddingBank as a set."""
    if isinstance(data, FewShotDataset):
        return data
    if hasattr(data, "as_dataset"):
        return data.as_dataset()
    do = "use FewShotDataset.from_dataset for data sets of torch and Hugging Face"
    raise UsageTypeError(f"expected {name} as a FewShotDataset or an EmbeddingBank, got {type(data).__name__}; {do}")


def items_at(stored: Tensor, index: Tensor | slice) -> Tensor:
    """Returns `stored[index]`; uint16 is indexed as int16, which every version of torch supports."""
    return stored.view(torch.int16)[index].view(torch.uint16) if stored.dtype == torch.uint16 else stored[index]


def as_floats(items: Tensor) -> Tensor:
    """Returns stored items as a network takes them: images in [0, 1], floats unchanged, in at least float32."""
    highest = HIGHEST.get(items.dtype)
    return widened(items) if highest is None else items.to(torch.float32).div_(highest)


def digests_of(items: np.ndarray) -> Tensor:
    """Returns an int64 hash (n,) of each item's values; equal items have equal hashes."""
    digests = (hashlib.blake2b(np.ascontiguousarray(item).data, digest_size=8).digest() for item in items)
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").astype(np.int64))


def joined_notes(*notes: str) -> str:
    """Joins several notes into one, each once."""
    return "; ".join(dict.fromkeys(filter(None, notes)))


def concat(datasets: Iterable[FewShotDataset]) -> FewShotDataset:
    """Returns one set with the items of all sets, in the order given; classes of the same name are merged."""
    datasets = list(datasets)
    if len(shapes := dict.fromkeys((part.item_shape, part._stored.dtype) for part in datasets)) > 1:
        got = " and ".join(f"{dtype} {shape}" for shape, dtype in shapes)
        raise UsageError(f"expected sets of one item shape and type to join, got {got}; load them alike")
    number = {name: c for c, name in enumerate(dict.fromkeys(name for part in datasets for name in part.class_names))}
    labels = [torch.tensor([number[n] for n in d.class_names], device=d.device)[d.labels] for d in datasets]
    images = torch.cat([part.images for part in datasets])
    return FewShotDataset(images, torch.cat(labels), list(number), joined_notes(*(part.note for part in datasets)))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test sets, with no class in common unless `shared_classes` is set.

    Args:
        train: classes to train on. Each part may be an EmbeddingBank, to train a projection on; it becomes a set.
        val: classes to select a checkpoint on, or None if the published split has none.
        test: classes to report results on. If there are none, the val set itself: results are then on val, and
            nothing is left to select a checkpoint on.
        shared_classes: train and test have the same classes, with different images of each: not few-shot
            classification of unseen classes but, say, retrieval among seen ones. Tables say so.

    Raises:
        UsageError: a class name is in two of the sets and shared_classes is False.
    """

    train: FewShotDataset
    val: FewShotDataset | None
    test: FewShotDataset
    shared_classes: InitVar[bool] = False

    def __post_init__(self, shared_classes: bool) -> None:
        if self.test is None:
            object.__setattr__(self, "test", self.val)
        if self.train is None or self.test is None:
            got = ", ".join(name for name, part in vars(self).items() if part is not None) or "none"
            raise UsageError(f"expected train and test or val, got {got}; a set alone is evaluated as it is")
        made = {id(part): as_dataset(part, name) for name, part in vars(self).items() if part is not None}
        for name, part in vars(self).copy().items():
            object.__setattr__(self, name, made.get(id(part)))
        if not shared_classes:
            parts = [("train", self.train), ("val", None if self.test_is_val else self.val), ("test", self.test)]
            check_disjoint([(name, part.class_names) for name, part in parts if part is not None])

    @classmethod
    def of(cls, parts: Mapping[str, FewShotDataset], shared_classes: bool = False) -> "Splits":
        """Builds Splits from parts by name; test or val may be missing."""
        test = parts.get("test", parts.get("val"))
        if test is None or "train" not in parts:
            raise UsageError(f"expected parts train and test or val, got {', '.join(parts) or 'none'}; name them so")
        return cls(parts["train"], parts.get("val"), test, shared_classes)

    @property
    def test_is_val(self) -> bool:
        """Whether there is no test set, so that val takes its place."""
        return self.test is self.val

    def map(self, function: Callable[[FewShotDataset], FewShotDataset]) -> "Splits":
        """Returns Splits with a function applied to each part."""
        made = {id(part): function(part) for part in vars(self).values() if part is not None}
        val = None if self.val is None else made[id(self.val)]
        return Splits(made[id(self.train)], val, made[id(self.test)], shared_classes=True)

    def seen_in_training(self, part: str) -> bool:
        """Whether a part, val or test, has a class in common with train."""
        return part != "train" and not set(self.train.class_names).isdisjoint(getattr(self, part).class_names)


def _readable(images: np.ndarray) -> np.ndarray:
    """torch needs writable memory, so a read-only map is reopened copy-on-write and its file stays unchanged; it also
    needs native byte order and no negative strides."""
    if any(stride < 0 for stride in images.strides) or not images.dtype.isnative:
        return np.ascontiguousarray(images, images.dtype.newbyteorder("="))
    if images.flags.writeable:
        return images
    is_slice = isinstance(images.base, np.memmap)  # its place in the file is not known
    if isinstance(images, np.memmap) and images.filename and images.flags.c_contiguous and not is_slice:
        return np.memmap(images.filename, images.dtype, "c", images.offset, images.shape)
    return images.copy()
