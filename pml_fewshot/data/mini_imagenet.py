"""miniImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle 2017: 64 / 16 / 20 classes of 600 images."""

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.cache import Source, cached_images
from pml_fewshot.data.class_lists import ROLES
from pml_fewshot.data.dataset import FewShotDataset, Splits, joined_notes
from pml_fewshot.data.image_folder import split_folders
from pml_fewshot.data.images import Form, Size, fit_image, open_images
from pml_fewshot.data.listing import Classes, Listing, by_folder
from pml_fewshot.data.pickles import read_plain_pickle

CLASSES = {"train": 64, "val": 16, "test": 20}
IMAGES = 600  # of each class

# Ravi and Larochelle's classes, as digests of their sorted WordNet ids, one per line
RAVI_LAROCHELLE = {"train": "e4359033c57ddd69", "val": "3d0231d10e3306dc", "test": "3035a236f674b287"}

PICKLE = r"mini-imagenet-cache-(train|val|test)(\.pkl|\.pickle)"

SUBFOLDERS = ("", "miniimagenet", "mini_imagenet", "mini-imagenet", "miniImageNet", "miniimagenet_150")


def load_mini_imagenet(
    root: str | Path, image_size: Size = 84, memory_map: bool = False, cache_dir: str | Path | None = None
) -> Splits:
    """Reads miniImageNet from a zip, from split folders, or from one folder of images with Ravi and Larochelle's lists.

    It is looked for in root, then in its subfolders miniimagenet, mini_imagenet, mini-imagenet, miniImageNet and
    miniimagenet_150; in each of them, in this order:

    - folders train/<wnid>/*.jpg, val/<wnid>/*.jpg, test/<wnid>/*.jpg;
    - a folder `images` with all files, and next to it train.csv, val.csv and test.csv (columns filename,label);
    - the pickles mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl, read without running any code they may hold;
    - the one zip that holds such split folders. It is read in memory, never unpacked.

    Args:
        root: the folder to look in, or the zip or one of the pickles itself.
        image_size: height and width in pixels, or one number for both; 84 as in every paper, the size of the usual
            files, which pass unchanged.
        memory_map: leave the images in the cache's file and read only the requested ones, not 1.3 GB for all 60,000.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits of 64 / 16 / 20 classes named by their WordNet ids, images in the order of their file names. If the
        classes do not have their 600 images, all three sets say so in `note`: "150 of 600 images a class". 6 images are
        in both a train and a val class, as in the original.

    Raises:
        MissingFileError: none of the layouts is found, or a list names a missing file.
        UsageError: a broken zip, list or image, several matching zips, or classes other than Ravi and Larochelle's
            (only their numbers are compared if the names are not WordNet ids); for pickles, which nothing else reads,
            the note says so instead.
    """
    form = Form.of(image_size)
    root = Path(root).resolve()
    path = root if root.is_file() else _find(root)
    if match := re.fullmatch(PICKLE, path.name):
        return _from_pickles(path.parent, match[2], form, memory_map, cache_dir)
    with open_images(path) as found:
        full = _in_splits(found.names)
        listed = not full and (path / "train.csv").is_file()
        lists, unlisted = [path / f"{split}.csv" for split in CLASSES if listed], set(found.names)
        for listing in lists:
            full |= _listed(listing, unlisted)
        by_split = split_folders(sorted(full), path, 0, [])
        splits = {split: by_folder(names, path, [], depth=1) for split, names in by_split.items()}
        splits = {split: {c: [full[n] for n in own] for c, own in part.items()} for split, part in splits.items()}
        if wrong := _other_classes(splits):
            do = "fetch the set again, or read it with load_image_folder"
            raise UsageError(f"expected miniImageNet in {path}, got {wrong}; {do}")
        files = [path] if path.is_file() else [*lists, *map(path.joinpath, full.values())]
        sets = Listing(path, list(full.values()), splits, found.read, files).sets(
            "mini_imagenet", form, memory_map=memory_map, cache_dir=cache_dir, note=_images_a_class(splits)
        )
    return Splits.of(sets)


def _from_pickles(folder: Path, ending: str, form: Form, memory_map: bool, cache_dir: str | Path | None) -> Splits:
    files = {split: folder / f"mini-imagenet-cache-{split}{ending}" for split in CLASSES}
    for path in files.values():
        if not path.is_file():
            raise MissingFileError(f"expected {path.name} in {folder} beside the others, got none; fetch it")
    notes: dict[str, Any] = {split: {} for split in CLASSES}  # class -> number of images

    def items() -> Iterator[np.ndarray]:
        for split, path in files.items():
            images, classes = _in_pickle(path)
            for name, index in sorted(classes.items()):
                notes[split][name] = len(index)
                for image in images[index]:
                    yield fit_image(Image.fromarray(image), form)

    key = (folder, *form)
    total = sum(CLASSES.values()) * IMAGES

    def source() -> Source:
        return Source(items(), total, form.shape, notes)

    stored = cached_images("mini_imagenet", key, files.values(), source, cache_dir, memory_map)
    note = joined_notes(_other_classes(stored.notes), _images_a_class(stored.notes))
    sets, start = {}, 0
    for split, counts in stored.notes.items():
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values())))
        part = slice(start, start + len(labels))
        images = stored.images[part] if memory_map else stored.images[part].clone()
        sets[split] = FewShotDataset(images, labels, list(counts), note)
        sets[split].mapped = memory_map
        sets[split].digests = stored.digests[part]
        start = part.stop
    return Splits.of(sets)


def _in_pickle(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns images (N, H, W, 3) uint8, and the indices of each class's images."""
    content = read_plain_pickle(path)
    images, classes = (content.get(key) if isinstance(content, dict) else None for key in ("image_data", "class_dict"))
    if not isinstance(images, np.ndarray) or not isinstance(classes, dict) or not classes:
        got = f"{', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"expected image_data and class_dict in {path}, got {got}; fetch it again")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        got = f"{images.dtype} of shape {images.shape}"
        raise UsageError(f"expected image_data as uint8 (N, H, W, 3) in {path}, got {got}; fetch it again")
    index = {str(name): np.asarray(own) for name, own in classes.items()}
    for name, own in index.items():
        if own.ndim != 1 or own.dtype.kind not in "iu" or not len(own) or own.min() < 0 or own.max() >= len(images):
            raise UsageError(
                f"expected class {name!r} in {path} as indices of {len(images)} images, got others; fetch it again"
            )
    return images, index


def _find(root: Path) -> Path:
    for folder in (root / subfolder for subfolder in SUBFOLDERS):
        if (folder / "train").is_dir() or ((folder / "images").is_dir() and (folder / "train.csv").is_file()):
            return folder
        if (pickle := folder / "mini-imagenet-cache-train.pkl").is_file():
            return pickle
        zips = []
        for path in sorted(folder.glob("*.zip")):
            with open_images(path) as found:
                zips += [path] if {"train", "test"} <= {n.split("/")[0] for n in _in_splits(found.names)} else []
        if len(zips) > 1:
            got = ", ".join(path.name for path in zips)
            raise UsageError(f"expected one zip of miniImageNet in {folder}, got {got}; give the right one as root")
        if zips:
            return zips[0]
    raise MissingFileError(
        f"expected miniImageNet in {root} or its {', '.join(SUBFOLDERS[1:])}: folders train, val and test, or images "
        "with train.csv, val.csv and test.csv, or mini-imagenet-cache-train.pkl, or a zip, got none; name another root "
        "(--data-root or PML_FEWSHOT_DATA)"
    )


def _in_splits(names: list[str]) -> dict[str, str]:
    """Returns the images in split folders, at any depth: split/class/name -> full name."""
    found = (re.search(rf"(?:^|/)((?:{'|'.join(ROLES)})/.+)", name) for name in names)
    return {match[1]: match.string for match in found if match}


def _listed(path: Path, unlisted: set[str]) -> dict[str, str]:
    """Does the same for the images in one of Ravi and Larochelle's lists, and removes them from `unlisted`."""
    if not path.is_file():
        raise MissingFileError(f"expected the list {path}, got none; fetch it")
    full = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("filename") or not row.get("label"):
                raise UsageError(f"expected columns filename,label with values in {path}, got {row}; complete the line")
            name = f"images/{row['filename']}"
            if name not in unlisted:
                wanted, do = f"{path.parent / name}, an image of {path.name}", "fetch it, or take the line out"
                raise MissingFileError(f"expected {wanted}, got no such file or two lines with it; {do}")
            unlisted.remove(name)
            full[f"{path.stem}/{row['label']}/{row['filename']}"] = name
    return full


def _other_classes(splits: Mapping[str, Classes] | Mapping[str, dict[str, int]]) -> str:
    """Returns how the classes differ from Ravi and Larochelle's; "" if they do not, or if it is unknown."""
    found = {split: len(classes) for split, classes in splits.items()}
    if found != CLASSES:
        return f"other numbers of classes ({found or 'none'}) than {CLASSES}"
    for split, classes in splits.items():
        digest = hashlib.blake2b("\n".join(sorted(classes)).encode(), digest_size=8).hexdigest()
        # with names other than WordNet ids it is unknown
        if digest != RAVI_LAROCHELLE[split] and any(re.fullmatch(r"n\d{8}", name) for name in classes):
            return f"other {split} classes than Ravi and Larochelle's ({', '.join(sorted(classes)[:3])}, ..)"
    return ""


def _images_a_class(splits: Mapping[str, Classes] | Mapping[str, dict[str, int]]) -> str:
    """Returns "150 of 600 images a class", or "" if all have 600."""
    each = [images for classes in splits.values() for images in classes.values()]
    counts = sorted({count if isinstance(count, int) else len(count) for count in each})
    found = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    return "" if counts == [IMAGES] else f"{found} of {IMAGES} images a class"
