"""miniImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle 2017: 64 / 16 / 20 classes of 600 images."""

import csv
import hashlib
import re
from pathlib import Path

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.data.image_folder import SPLIT_FOLDERS, Classes, read_splits, splits_by_folder
from pml_fewshot.data.images import open_images

CLASSES = {"train": 64, "val": 16, "test": 20}
IMAGES = 600  # of each class

# Which classes those of Ravi and Larochelle are, as a digest of their sorted WordNet ids, one a line
RAVI_LAROCHELLE = {"train": "e4359033c57ddd69", "val": "3d0231d10e3306dc", "test": "3035a236f674b287"}

SUBFOLDERS = ("", "miniimagenet", "mini_imagenet", "mini-imagenet", "miniImageNet", "miniimagenet_150")


def load_mini_imagenet(
    root: str | Path, image_size: int = 84, memory_map: bool = False, cache_dir: str | Path | None = None
) -> Splits:
    """Reads miniImageNet from a zip, from split folders, or from one folder of images with Ravi and Larochelle's lists.

    Looked for in root, then in its subfolders miniimagenet, mini_imagenet, mini-imagenet, miniImageNet and
    miniimagenet_150; in each of them, in this order:

    - folders train/<wnid>/*.jpg, val/<wnid>/*.jpg, test/<wnid>/*.jpg;
    - a folder `images` with all files, and beside it train.csv, val.csv and test.csv (columns filename,label);
    - the one zip that holds such split folders. It is read in memory, never unpacked.

    Args:
        root: the folder to look in, or the zip itself.
        image_size: height and width in pixels; 84 as in every paper, the size of the usual files, which pass unchanged.
        memory_map: leave the images in the cache's file and read only what is asked for, not 1.3 GB for all 60,000.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits of 64 / 16 / 20 classes named by their WordNet ids, images in the order of their file names. Where the
        classes do not have their 600 images, all three sets say so in `note`: "150 of 600 images a class".

    Raises:
        MissingFileError: none of the layouts is there, or a list names a missing file.
        UsageError: a broken zip, list or image, several zips that fit, or other classes than Ravi and Larochelle's
            (their numbers only where the names are no WordNet ids).
    """
    root = Path(root).resolve()
    path = root if root.is_file() else _find(root)
    with open_images(path) as (names, read):
        full = _in_splits(names)
        listed = not full and (path / "train.csv").is_file()
        lists, unlisted = [path / f"{split}.csv" for split in CLASSES if listed], set(names)
        for listing in lists:
            full |= _listed(listing, unlisted)
        by_folder = splits_by_folder(sorted(full), path) or {}
        splits = {split: {c: [full[n] for n in own] for c, own in part.items()} for split, part in by_folder.items()}
        _check_classes(splits, path)
        counts = sorted({len(images) for classes in splits.values() for images in classes.values()})
        found = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
        note = "" if counts == [IMAGES] else f"{found} of {IMAGES} images a class"
        files = [path] if path.is_file() else [*lists, *map(path.joinpath, full.values())]
        key = ("mini_imagenet", path, image_size, 3, False, ())
        return read_splits(*key, splits, read, files, memory_map, cache_dir, note)


def _find(root: Path) -> Path:
    for folder in (root / subfolder for subfolder in SUBFOLDERS):
        if (folder / "train").is_dir() or ((folder / "images").is_dir() and (folder / "train.csv").is_file()):
            return folder
        zips = []
        for path in sorted(folder.glob("*.zip")):
            with open_images(path) as (names, _):
                zips += [path] if {"train", "test"} <= {name.split("/")[0] for name in _in_splits(names)} else []
        if len(zips) > 1:
            found = ", ".join(path.name for path in zips)
            raise UsageError(f"expected one zip of miniImageNet in {folder}, got {found}; give the right one as root")
        if zips:
            return zips[0]
    raise MissingFileError(
        f"expected miniImageNet in {root} or its {', '.join(SUBFOLDERS[1:])}: folders train, val and test, or images "
        "with train.csv, val.csv and test.csv, or a zip, got none; name another root (--data-root or PML_FEWSHOT_DATA)"
    )


def _in_splits(names: list[str]) -> dict[str, str]:
    """The images in split folders, at any depth: split/class/name -> their full names."""
    found = (re.search(rf"(?:^|/)((?:{'|'.join(SPLIT_FOLDERS)})/.+)", name) for name in names)
    return {match[1]: match.string for match in found if match}


def _listed(path: Path, unlisted: set[str]) -> dict[str, str]:
    """The same for the images in one of Ravi and Larochelle's lists, which it takes out of `unlisted`."""
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


def _check_classes(splits: dict[str, Classes], path: Path) -> None:
    found = {split: len(classes) for split, classes in splits.items()}
    if found != CLASSES:
        do = "fetch the missing ones, or read another set with load_image_folder"
        raise UsageError(f"expected miniImageNet's numbers of classes {CLASSES} in {path}, got {found or 'none'}; {do}")
    for split, classes in splits.items():
        digest = hashlib.blake2b("\n".join(sorted(classes)).encode(), digest_size=8).hexdigest()
        # under other names than WordNet ids nobody can tell
        if digest != RAVI_LAROCHELLE[split] and any(re.fullmatch(r"n\d{8}", name) for name in classes):
            do = "fetch the set again, or read it with load_image_folder"
            wanted, got = f"{CLASSES[split]} classes for {split}", ", ".join(sorted(classes)[:3])
            raise UsageError(f"expected Ravi and Larochelle's {wanted} in {path}, got others ({got}, ...); {do}")
