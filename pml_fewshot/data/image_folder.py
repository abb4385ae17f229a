"""Your own images, a folder a class (load_image_folder), and what loaders of image files share (read_splits)."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pml_fewshot.checks import MissingFileError, UsageError, check_disjoint
from pml_fewshot.data.cache import Source, cached_sets
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.images import IMAGE_SUFFIXES, Read, open_images, read_images

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Classes = dict[str, list[str]]  # class name -> names of its images, below one folder or zip, with "/" between folders


def load_image_folder(
    root: str | Path,
    image_size: int = 84,
    channels: int = 3,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    skip_broken: bool = False,
    memory_map: bool = False,
    cache_dir: str | Path | None = None,
) -> Splits:
    """Reads a folder of images, a subfolder a class: root/<class>/*.jpg or root/{train,val,test}/<class>/*.jpg.

    Where root holds `train` and `test`, those are the splits (with `val`, `valid` or `validation` as you like).
    Otherwise the classes are split by `seed`. Images in deeper subfolders belong to the class above them; hidden files,
    files of other kinds, and subfolders without an image are ignored. Class names are the subfolders', sorted in each
    split; val is None where there is none.

    Args:
        image_size: height and width in pixels, 84 as in miniImageNet; see `read_image` for the scaling.
        channels: 3 (RGB) or 1 (gray).
        val_fraction: share of the classes for val, rounded, at least one class; 0 for no val.
        test_fraction: share of the classes for test, rounded, at least one class.
        seed: of the draw of classes; the same seed, fractions and class names give the same split everywhere.
        skip_broken: leave out images that cannot be read, with a warning that names them and a note on the sets;
            otherwise the first one is an error.
        memory_map: leave the images in the cache's file and read only what is asked for, for sets larger than memory
            (`FewShotDataset.checksum` can verify them); otherwise they are copied into memory.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Raises:
        UsageError: no folder (MissingFileError), no images, images outside of class folders, too few classes for the
            splits, a class in two splits, or a broken image (with skip_broken: a class of broken images only).
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise MissingFileError(f"expected a folder of images at {root}, got no folder there; name another root")
    with open_images(root) as (names, read):
        given, fractions = splits_by_folder(names, root), (val_fraction, test_fraction, seed)
        splits = given or _drawn_splits(_by_folder(names, root), *fractions)
        key = ("image_folder", root, image_size, channels, skip_broken, () if given else fractions)
        return read_splits(*key, splits, read, map(root.joinpath, names), memory_map, cache_dir)


def splits_by_folder(names: Sequence[str], path: Path) -> dict[str, Classes] | None:
    """Returns split -> class -> image names when the first folders are train, test and perhaps val; None when not."""
    folders = sorted({name.split("/")[0] for name in names})
    roles = [SPLIT_FOLDERS.get(folder, "") for folder in folders]
    if not any(roles) or ("" in roles and not {"train", "test"} <= set(roles)):
        return None  # a folder `train` among others may well hold pictures of trains
    if sorted(roles) not in (["test", "train"], ["test", "train", "val"]):
        raise UsageError(
            f"expected images in {path} in the folders train, test and perhaps val only, got them in "
            f"{', '.join(folders[:10])}; move the others, or put all classes side by side to have them split"
        )
    below = {role: [n for n in names if SPLIT_FOLDERS[n.split("/")[0]] == role] for role in ("train", "val", "test")}
    return {split: _by_folder(found, path, depth=1) for split, found in below.items() if found}


def _by_folder(names: Sequence[str], path: Path, depth: int = 0) -> Classes:
    classes: Classes = {}
    for name in names:
        parts = name.split("/")
        if len(parts) < depth + 2:
            raise UsageError(f"expected images of {path} in class folders, got {name} in none; move it into one")
        classes.setdefault(parts[depth], []).append(name)
    if not classes:
        raise UsageError(f"expected images in class folders in {path}, got none; add files {', '.join(IMAGE_SUFFIXES)}")
    return dict(sorted(classes.items()))


def _drawn_splits(classes: Classes, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Classes]:
    names = list(classes)
    val, test = (max(1, round(share * len(names))) if share else 0 for share in (val_fraction, test_fraction))
    if val_fraction < 0 or test_fraction <= 0 or val + test >= len(names):
        raise UsageError(
            f"expected val_fraction >= 0 and test_fraction > 0 that leave classes for train, got {val_fraction} and "
            f"{test_fraction} of {len(names)} classes ({', '.join(names[:5])}); add classes or lower the fractions"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    return {split: {names[c]: classes[names[c]] for c in sorted(own)} for split, own in drawn.items() if own}


def read_splits(
    name: str,
    path: Path,
    image_size: int,
    channels: int,
    skip_broken: bool,
    drawn: tuple[float, ...],
    splits: dict[str, Classes],
    read: Read,
    files: Iterable[Path],
    memory_map: bool,
    cache_dir: str | Path | None,
    note: str = "",
) -> Splits:
    """Returns the splits "train", perhaps "val", and "test" of the images in a folder or zip, decoded once and cached.

    `drawn` is what the splits were drawn by; as with the arguments before it, another value is another cache entry.
    """
    check_disjoint([(split, tuple(classes)) for split, classes in splits.items()])
    by_class = [names for classes in splits.values() for names in classes.values()]
    labels = {name: label for label, names in enumerate(by_class) for name in names}  # in the order to store
    broken: list[str] = []

    def items() -> Iterator[tuple[np.ndarray, int]]:
        decoded = read_images(list(labels), read, image_size, channels, path, skip_broken)
        for (name, label), image in zip(labels.items(), decoded, strict=True):
            if image is None:
                broken.append(name)
            else:
                yield image, label

    class_names = {split: list(classes) for split, classes in splits.items()}
    source = Source(items(), len(labels), (channels, image_size, image_size), class_names, {"broken": broken})
    key = (path, image_size, channels, skip_broken, *drawn)
    sets, notes = cached_sets(name, key, files, lambda: source, cache_dir, memory_map)
    if skipped := notes["broken"]:
        count = f"{len(skipped)} broken image{'s' if len(skipped) > 1 else ''} skipped"
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        warnings.warn(f"{count} in {path}: {', '.join(skipped[:10])}{more}", stacklevel=3)
        note = f"{note}; {count}" if note else count
    for part in sets.values():
        part.note = note
    return Splits(sets["train"], sets.get("val"), sets["test"])
