"""miniImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle 2017: 64 / 16 / 20 classes of 600 images."""

import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pml_fewshot.checks import require
from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.data.image_file import image_names, is_image_name
from pml_fewshot.data.image_folder import SPLIT_FOLDERS, Classes, ImageFiles, read_splits, splits_by_folder
from pml_fewshot.zip_archive import member_names, open_zip, read_member

CLASSES = {"train": 64, "val": 16, "test": 20}
IMAGES = 600  # of each class
LISTING = 2**26  # bytes of a list; Ravi and Larochelle's train.csv has 1.3 MB

# Which classes those of Ravi and Larochelle are, as a digest of their sorted WordNet ids, one a line
RAVI_LAROCHELLE = {"train": "e4359033c57ddd69", "val": "3d0231d10e3306dc", "test": "3035a236f674b287"}

WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
FILE_OF_CLASS = re.compile(r"(n\d{8})\d{8}\.jpe?g", re.ASCII)  # the usual file names start with their class

SUBFOLDERS = ("", "miniimagenet", "mini_imagenet", "mini-imagenet", "miniImageNet", "miniimagenet_150")


def load_mini_imagenet(
    root: str | Path, image_size: int = 84, memory_map: bool = False, cache_dir: str | Path | None = None
) -> Splits:
    """Reads miniImageNet from a zip, from split folders, or from one folder of images with Ravi and Larochelle's lists.

    Looked for in root, then in its subfolders miniimagenet, mini_imagenet, mini-imagenet, miniImageNet and
    miniimagenet_150; in each of them, in this order:

    - folders train/<wnid>/*.jpg, val/<wnid>/*.jpg, test/<wnid>/*.jpg;
    - a folder `images` with all files, and beside it train.csv, val.csv and test.csv (columns filename,label). Files
      that no list names are passed over;
    - the one zip that holds such split folders, directly or below one top folder. It is read in memory, never unpacked.

    Args:
        root: the folder to look in, or the zip itself.
        image_size: height and width in pixels; 84 as in every paper, the size of the usual files, which then pass
            unchanged.
        memory_map: leave the images in the cache's file and read only what is asked for; else the three sets are
            copied into memory, 1.3 GB for all 60,000 images.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits of 64 / 16 / 20 classes named by their WordNet ids, images in the order of their file names. Where the
        classes do not have their 600 images, all three sets say so in `note`: "150 of 600 images a class".

    Raises:
        FileNotFoundError: none of the layouts is there, or a list names a missing file.
        ValueError: a broken zip, list or image, several zips that fit, another number of classes, or (where all are
            named by WordNet ids) other classes for a split than Ravi and Larochelle's.
    """
    root = Path(root).resolve()
    if root.is_file():
        return _load_zip(root, image_size, memory_map, cache_dir)
    for place in (root / subfolder for subfolder in SUBFOLDERS):
        if (place / "train").is_dir():
            folders = [folder for folder in SPLIT_FOLDERS if (place / folder).is_dir()]
            names = [f"{folder}/{name}" for folder in folders for name in image_names(place / folder)]
            splits = _checked(splits_by_folder(names, place), place)
            images = ImageFiles(place, splits, place.joinpath, [place / name for name in names])
        elif (place / "images").is_dir() and (place / "train.csv").is_file():
            images = _listed_images(place)
        elif zips := _fitting_zips(place):
            got = ", ".join(candidate.name for candidate in zips)
            require(len(zips) == 1, f"one zip of miniImageNet in {place}", got, "give the one you mean as root")
            return _load_zip(zips[0], image_size, memory_map, cache_dir)
        else:
            continue
        return _read(images, image_size, memory_map, cache_dir)
    raise FileNotFoundError(
        f"expected miniImageNet in {root} or in its subfolder {', '.join(SUBFOLDERS[1:])}: folders train, val and "
        "test, or images with train.csv, val.csv and test.csv, or a zip, got none of them; name another root "
        "(--data-root or PML_FEWSHOT_DATA)"
    )


def _read(images: ImageFiles, image_size: int, memory_map: bool, cache_dir: str | Path | None) -> Splits:
    counts = [len(names) for classes in images.splits.values() for names in classes.values()]
    low, high = min(counts), max(counts)
    found = str(low) if low == high else f"{low} to {high}"
    note = "" if low == high == IMAGES else f"{found} of {IMAGES} images a class"
    return read_splits("mini_imagenet", images, image_size, 3, False, memory_map, cache_dir, note=note)


def _checked(splits: dict[str, Classes] | None, place: Path) -> dict[str, Classes]:
    splits = splits or {}
    got = {split: len(classes) for split, classes in splits.items()}
    require(
        got == CLASSES,
        f"{_counts(CLASSES)} classes of miniImageNet in {place}",
        _counts(got) or "none",
        "fetch the missing ones, or read another set with load_image_folder",
    )
    by_id = any(WORDNET_ID.fullmatch(name) for classes in splits.values() for name in classes)
    for split, classes in splits.items() if by_id else ():  # under other names nobody can tell
        digest = hashlib.blake2b("\n".join(sorted(classes)).encode(), digest_size=8).hexdigest()
        require(
            digest == RAVI_LAROCHELLE[split],
            f"Ravi and Larochelle's {CLASSES[split]} classes for {split} in {place}",
            f"others ({', '.join(sorted(classes)[:3])}, ...)",
            "fetch the set or its lists again, or read another set with load_image_folder",
        )
        for name, files in classes.items():
            for file in files:
                named = FILE_OF_CLASS.fullmatch(file.split("/")[-1])
                right = named is None or named[1] == name
                require(right, f"the class that {file} is named after", f"{name} in {place}", "fetch the set again")
    return splits


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def _listed_images(place: Path) -> ImageFiles:
    present = set(image_names(place / "images"))
    splits: dict[str, Classes] = {}
    taken: set[str] = set()
    for split in CLASSES:
        listing = place / f"{split}.csv"
        classes: Classes = {}
        for where, file, label in _lines(listing):
            if file not in present:
                raise FileNotFoundError(
                    f"expected the image {file} of {where} in {place / 'images'}, got no such file; fetch it, or "
                    "take the line out"
                )
            require(file not in taken, "each image in one line of the lists", f"{file} again in {where}", "drop it")
            taken.add(file)
            classes.setdefault(label, []).append(f"images/{file}")
        splits[split] = {label: sorted(names) for label, names in sorted(classes.items())}
    files = [place / name for classes in splits.values() for names in classes.values() for name in names]
    listings = [place / f"{split}.csv" for split in CLASSES]
    return ImageFiles(place, _checked(splits, place), place.joinpath, [*files, *listings])


def _lines(listing: Path) -> Iterator[tuple[str, str, str]]:
    """Where each line of a list stands, and its filename and label."""
    if not listing.is_file():
        raise FileNotFoundError(f"expected the list {listing}, got none; fetch it")
    size = listing.stat().st_size
    require(size <= LISTING, f"a list of at most {LISTING:,} bytes at {listing}", f"{size:,}", "fetch it again")
    try:
        rows = csv.DictReader(io.StringIO(listing.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        columns = rows.fieldnames or ()
        require({"filename", "label"} <= set(columns), f"columns filename,label in {listing}", columns, "add them")
        for row in rows:
            where = f"line {rows.line_num} of {listing}"
            whole = row["filename"] and row["label"] and None not in row
            require(bool(whole), f"a filename and a label in {where}", row, "complete the line")
            yield where, row["filename"], row["label"]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected a list of images at {listing}, got a broken one ({error}); fetch it again"
        ) from error


def _load_zip(place: Path, image_size: int, memory_map: bool, cache_dir: str | Path | None) -> Splits:
    with open_zip(place) as archive:

        def content(name: str) -> bytearray:
            return read_member(archive, full_names[name])

        full_names = _names_below_top(archive)
        splits = _checked(splits_by_folder(list(full_names), place), place)
        return _read(ImageFiles(place, splits, content, [place]), image_size, memory_map, cache_dir)


def _fitting_zips(place: Path) -> list[Path]:
    """The zips of a folder that hold train and test folders. A broken zip is an error when no other one fits."""
    fitting, broken = [], None
    for candidate in sorted(place.glob("*.zip")):
        try:
            with open_zip(candidate) as archive:
                folders = {name.split("/")[0] for name in _names_below_top(archive)}
        except ValueError as error:
            broken = error
            continue
        if {"train", "test"} <= folders:
            fitting.append(candidate)
    if broken is not None and not fitting:
        raise broken
    return fitting


def _names_below_top(archive: zipfile.ZipFile) -> dict[str, str]:
    """The images' names without a top folder common to all -> their full names, sorted."""
    full = member_names(archive, is_image_name)
    tops = {name.split("/")[0] for name in full}
    drop = len(tops) == 1 and not tops & set(SPLIT_FOLDERS)
    return {name.split("/", 1)[-1] if drop else name: name for name in sorted(full)}
