"""Reads torch and Hugging Face datasets into one tensor of images with labels (FewShotDataset.from_dataset)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from pml_fewshot.checks import UsageError, UsageTypeError, as_labels, as_names, renumbered
from pml_fewshot.data.images import Form, Resize, Size, fit_image

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


def collect(
    source: Any,
    image_size: Size | None,
    image: str | None,
    label: str | None,
    class_names: Sequence[str] | None,
    resize: Resize,
    workers: int,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Returns images (M, C, H, W) uint8, labels (M,) int64 and class names of a dataset, read once, item by item."""
    columns = getattr(source, "column_names", None)
    if isinstance(columns, dict):
        do = f"give one of them, as source[{next(iter(columns))!r}]"
        raise UsageTypeError(f"expected one data set, got a dictionary of {', '.join(columns)}; {do}")
    if isinstance(source, Mapping | str | Path) or not (hasattr(source, "__getitem__") or hasattr(source, "__iter__")):
        do = "give a torch or Hugging Face data set of (image, label)"
        raise UsageTypeError(f"expected a data set, got {type(source).__name__}; {do}")
    if workers < 0:
        raise UsageError(f"expected workers of at least 0, got {workers}; 0 is for none beside this process")
    is_stream = isinstance(source, IterableDataset) or not hasattr(source, "__getitem__")
    if workers and is_stream:
        got = f"workers={workers} for a stream ({type(source).__name__})"
        raise UsageError(f"expected workers=0, as each of several would read all of it, got {got}; leave it out")
    if columns is not None:
        image = _column(image, "image", IMAGE_COLUMNS, source, "Image")
        label = _column(label, "label", LABEL_COLUMNS, source, "ClassLabel")
        if class_names is None:
            class_names = getattr((source.features or {}).get(label), "names", None)
    total = len(source) if hasattr(source, "__len__") else None
    items = source  # an iterator is read as it is
    if not is_stream:
        own = torch.Generator()  # it would draw the seed of its workers from the global one
        items = DataLoader(source, batch_size=None, num_workers=workers, collate_fn=_itself, generator=own)
    images: np.ndarray = np.empty(0, np.uint8)
    labels: list[Any] = []
    # delay: a set that is read within two seconds needs no progress bar
    for place, item in enumerate(tqdm(items, "reading", total, unit="image", delay=2, mininterval=1)):
        picture, value = _pair(item, image, label, source)
        pixels = _pixels(picture, place, image_size, resize)
        if place == 0:
            images = np.empty((total or 1, *pixels.shape), np.uint8)
        elif place == len(images):  # a stream without a length
            images = np.concatenate([images, np.empty_like(images)])
        if len(pixels) > images.shape[1]:  # gray images before the first color one
            images = np.repeat(images, len(pixels), axis=1)
        if pixels.shape[1:] != images.shape[2:]:
            got = " and ".join("x".join(map(str, shape)) for shape in (images.shape[2:], pixels.shape[1:]))
            raise UsageError(f"expected images of one size, got {got} (item {place}); give image_size=84")
        images[place] = pixels
        if isinstance(value, Tensor | np.ndarray | np.generic):
            if any(length != 1 for length in value.shape):
                got = f"shape {tuple(value.shape)} (item {place})"
                raise UsageTypeError(f"expected one number or text as a label, got {got}; take its argmax")
            value = value.item()
        labels.append(value)
    if not labels:
        raise UsageError(f"expected items, got none from {type(source).__name__}; give a set with items")
    numbers, texts = as_labels(labels, len(labels), "the data set's")
    names = _names_of(source) if class_names is None else as_names(class_names)
    return torch.from_numpy(images[: len(labels)]), *_named(numbers, texts, names)


def _pair(item: Any, image: str | None, label: str | None, source: Any) -> tuple[Any, Any]:
    """Returns the image and label of an item: a pair, or a dictionary with these columns."""
    if isinstance(item, Mapping):
        pairs = ((image, IMAGE_COLUMNS), (label, LABEL_COLUMNS))
        keys = [next((key for key in ((given,) if given else usual) if key in item), None) for given, usual in pairs]
        if None in keys:
            wanted, got = f"{image or IMAGE_COLUMNS[0]!r} and {label or LABEL_COLUMNS[0]!r}", ", ".join(map(str, item))
            raise UsageError(f"expected items with {wanted}, got {got}; name yours as image=, label=")
        return item[keys[0]], item[keys[1]]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        got = f"{type(item).__name__} of {len(item)}" if hasattr(item, "__len__") else type(item).__name__
        raise UsageTypeError(f"expected pairs (image, label) from {type(source).__name__}, got a {got}; wrap it")
    return item[0], item[1]


def _itself(item: Any) -> Any:
    return item


def _column(given: str | None, argument: str, usual: Sequence[str], source: Any, kind: str) -> str:
    """Returns a column of a Hugging Face dataset: the given one, a usual one, or the only one of that kind."""
    fitting = [name for name, feature in (source.features or {}).items() if type(feature).__name__ == kind]
    if given is not None:  # it may come from a transform of the set
        return given
    for name in [*usual, *(fitting if len(fitting) == 1 else ())]:
        if name in source.column_names:
            return name
    got = ", ".join(source.column_names)
    raise UsageError(f"expected a column {usual[0]!r}, got {got}; name it as {argument}=...")


def _names_of(source: Any) -> Sequence[str] | None:
    """Returns the class names of torchvision's datasets and ours, also of a Subset or of concatenated sets."""
    if getattr(source, "target_transform", None) is not None:  # the labels are different then
        return None
    for attribute in ("classes", "class_names"):
        names = getattr(source, attribute, None)
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return names
    if isinstance(source, ConcatDataset):
        found = [_names_of(part) for part in source.datasets]
        if any(names is None or list(names) != list(found[0] or ()) for names in found) and any(found):
            do = "read each by itself, and join them with pml_fewshot.data.dataset.concat, which goes by names"
            raise UsageError(f"expected data sets of the same classes, got {found[0]} and others; {do}")
        return found[0]
    return _names_of(source.dataset) if isinstance(source, Subset) else None  # other wrappers may change labels


def _named(numbers: Tensor, texts: tuple[str, ...], known: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Returns labels and names of the classes that have items, in the order of the known names."""
    if texts and known:
        numbers = renumbered(numbers, texts, known)
    names = known or texts
    values, labels = torch.unique(numbers, return_inverse=True)
    if names and (int(values[0]) < 0 or int(values[-1]) >= len(names)):
        got = f"labels from {int(values[0])} to {int(values[-1])}"
        do = "give class_names, and leave out items without a label"
        raise UsageError(f"expected indices into the {len(names)} class names, got {got}; {do}")
    return labels, tuple(names[value] if names else str(value) for value in values.tolist())


def _pixels(image: Any, place: int, image_size: Size | None, resize: Resize) -> np.ndarray:
    """Converts one image to (C, H, W) uint8, resized if a size is given."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)  # upright, as image files are read
        if image.mode == "I" and image.format is None and 0 <= image.getextrema()[0] <= image.getextrema()[1] < 256:
            image = image.convert("L")  # 8-bit gray made from 32-bit numbers
        channels = 1 if image.mode in ("1", "L", "I;16", "I", "F") else 3
        size = (image.height, image.width) if image_size is None else image_size
        try:
            return fit_image(image, Form.of(size, channels, resize))
        except ValueError as error:
            raise UsageError(f"expected a readable image, got {error} (item {place}); convert it") from error
    array = image.detach().cpu() if isinstance(image, Tensor) else image
    if isinstance(array, Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3):
        got = f"{type(image).__name__}{f' of shape {tuple(array.shape)}' if isinstance(array, np.ndarray) else ''}"
        do = "leave out transforms that give other things"
        raise UsageTypeError(f"expected images as PIL images, or tensors (C, H, W), got {got} (item {place}); {do}")
    if array.ndim == 3 and not isinstance(image, Tensor):
        array = array.transpose(2, 0, 1)  # numpy images have their channels last
    array = array[None] if array.ndim == 2 else array
    if array.dtype == bool:
        array = array.astype(np.float32)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            got = f"values from {low:.3g} to {high:.3g} (item {place})"
            raise UsageError(f"expected floats in [0, 1], got {got}; leave Normalize out of the set's transform")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or len(array) not in (1, 3):
        got = f"{array.dtype} of {len(array)} channels (item {place})"
        raise UsageTypeError(f"expected images of 8 bits with 1 or 3 channels, got {got}; convert them")
    if image_size is None:
        return array
    picture = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    return fit_image(picture, Form.of(image_size, len(array), resize))
