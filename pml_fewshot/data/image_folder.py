"""Your own images, a folder a class (load_image_folder), and what loaders of image files share (read_splits)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pml_fewshot.checks import check_disjoint, require
from pml_fewshot.data.cache import Source, cached_images, files_state
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.image_file import IMAGE_SUFFIXES, check_form, image_names, read_images

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Classes = dict[str, list[str]]  # class name -> names of its images, below one place, with "/" between folders


@dataclass(frozen=True)
class ImageFiles:
    """Which images a set consists of, and how to get at them.

    Args:
        place: the folder or zip that holds them.
        splits: "train", "val" (may be missing) and "test", each with its classes; their order is the stored order.
        content: gives the bytes or the path behind an image's name.
        files: the files on disk whose change makes a cached copy stale.
    """

    place: Path
    splits: dict[str, Classes]
    content: Callable[[str], bytes | bytearray | Path]
    files: Sequence[Path]


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

    Where root holds `train` and `test`, those are the splits (`val`, `valid` or `validation` as you like). Else the
    classes are split by `seed`. Images in deeper subfolders belong to the class above them; hidden files, `__MACOSX`,
    files of other kinds, and subfolders without an image are passed over.

    Args:
        root: the folder.
        image_size: height and width in pixels, 84 as in miniImageNet; see `read_image` for the scaling.
        channels: 3 (RGB) or 1 (grey).
        val_fraction: share of the classes for val, rounded, at least one class; 0 for no val. Not used where root
            holds the splits; the same goes for the next two.
        test_fraction: share of the classes for test, rounded, at least one class.
        seed: of the generator that draws the classes; the same seed and class names give the same split everywhere.
        skip_broken: leave out images that cannot be read, with a warning that counts and names them and a note on the
            sets; else the first one is an error.
        memory_map: leave the images in the cache's file and read only what is asked for, for sets larger than memory;
            else they are copied into memory.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits with the subfolders' names as class names, sorted in each split; val is None where there is none.

    Raises:
        FileNotFoundError: root is no folder.
        ValueError: no images, images outside of class folders, too few classes for the splits, a class in two splits,
            a broken image (with skip_broken: a class of broken images only), or a folder reached twice over a link.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of images at {root}, got no folder there; name another root")
    names = image_names(root)
    splits = splits_by_folder(names, root)
    drawn: tuple[object, ...] = ()
    if splits is None:
        splits = _drawn_splits(_by_first_folder(names, root), val_fraction, test_fraction, seed)
        drawn = (val_fraction, test_fraction, seed)
    images = ImageFiles(root, splits, lambda name: root / name, [root / name for name in names])
    return read_splits("image_folder", images, image_size, channels, skip_broken, memory_map, cache_dir, drawn)


def splits_by_folder(names: Sequence[str], place: Path) -> dict[str, Classes] | None:
    """Returns split -> class -> image names when the first folders are train, test and perhaps val; None when not.

    Raises:
        ValueError: a split is missing or there twice, or images lie beside the splits or outside of class folders.
    """
    folders = {name.split("/")[0] for name in names}
    known, others = sorted(folders & set(SPLIT_FOLDERS)), sorted(folders - set(SPLIT_FOLDERS))
    if not known or (others and not {"train", "test"} <= folders):
        return None  # a folder `train` among others may well hold pictures of trains
    roles = [SPLIT_FOLDERS[folder] for folder in known]
    require(
        not others and sorted(roles) in (["test", "train"], ["test", "train", "val"]),
        f"images in {place} in the folders train, test and perhaps val only",
        f"them in {', '.join((others + known)[:10])}",
        "rename or move the others, or put all classes side by side to have them split by seed",
    )
    below = {SPLIT_FOLDERS[folder]: [name for name in names if name.startswith(f"{folder}/")] for folder in known}
    return {split: _by_first_folder(below[split], place, 1) for split in ("train", "val", "test") if split in below}


def _by_first_folder(names: Iterable[str], place: Path, depth: int = 0) -> Classes:
    classes: Classes = {}
    for name in sorted(names):
        parts = name.split("/")
        require(len(parts) > depth + 1, f"images of {place} in class folders", f"{name} in none", "move it into one")
        classes.setdefault(parts[depth], []).append(name)
    require(bool(classes), f"images in class folders below {place}", "none", f"give files {', '.join(IMAGE_SUFFIXES)}")
    return dict(sorted(classes.items()))


def _drawn_splits(classes: Classes, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Classes]:
    require(
        0 <= val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1,
        "val_fraction >= 0 and test_fraction > 0, together below 1",
        f"{val_fraction} and {test_fraction}",
        "leave a share for train",
    )
    val, test = (max(1, round(share * len(classes))) if share else 0 for share in (val_fraction, test_fraction))
    require(
        val + test < len(classes),
        f"more than {val + test} classes, for train beside {val} of val and {test} of test",
        f"{len(classes)} ({', '.join(list(classes)[:5])})",
        "add classes or lower the fractions",
    )
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    names = list(classes)
    return {split: {names[c]: classes[names[c]] for c in sorted(own)} for split, own in drawn.items() if own}


def read_splits(
    name: str,
    images: ImageFiles,
    image_size: int,
    channels: int,
    skip_broken: bool,
    memory_map: bool,
    cache_dir: str | Path | None,
    drawn: tuple[object, ...] = (),
    note: str = "",
) -> Splits:
    """Returns the splits of image files, decoded once and cached; arguments as in `load_image_folder`.

    The cache holds the images by split and class, so each split is one slice of its memory map.

    Args:
        drawn: what else decides which image stands where; another value is another cache entry.
        note: for the three sets.
    """
    check_form(image_size, channels)
    check_disjoint([(split, tuple(classes)) for split, classes in images.splits.items()])
    cached = cached_images(
        name,
        (images.place, image_size, channels, skip_broken, *drawn),
        files_state(images.files),
        lambda: _source(images, image_size, channels, skip_broken),
        cache_dir,
    )
    broken = cached.about["broken"]
    if broken:
        count = f"{len(broken)} broken image{'s' if len(broken) > 1 else ''} skipped"
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        warnings.warn(f"{count} in {images.place}: {', '.join(broken[:10])}{more}", stacklevel=3)
        note = f"{note}; {count}" if note else count
    sets, label = {}, 0
    for split, class_names in cached.about["splits"].items():
        start, end = torch.searchsorted(cached.labels, torch.tensor([label, label + len(class_names)])).tolist()
        part = cached.images[start:end]
        part = part if memory_map else part.clone()
        sets[split] = FewShotDataset(part, cached.labels[start:end] - label, class_names, note)
        label += len(class_names)
    return Splits(sets["train"], sets.get("val"), sets["test"])


def _source(images: ImageFiles, image_size: int, channels: int, skip_broken: bool) -> Source:
    splits = {split: list(classes) for split, classes in images.splits.items()}
    by_class = [names for classes in images.splits.values() for names in classes.values()]
    wanted = [(name, label) for label, names in enumerate(by_class) for name in names]
    broken: list[str] = []

    def items() -> Iterator[tuple[np.ndarray, int]]:
        found = set()
        wanted_names = [name for name, _ in wanted]
        decoded = read_images(wanted_names, images.content, image_size, channels, f"{images.place}/", skip_broken)
        for (name, label), image in zip(wanted, decoded, strict=True):
            if image is None:
                broken.append(name)
            else:
                found.add(label)
                yield image, label
        for label, names in enumerate(by_class):
            do = "replace the files or remove the class"
            require(label in found, f"a readable image in each class of {images.place}", f"none like {names[0]}", do)

    about = {"splits": splits, "broken": broken}  # broken grows while the items are read
    return Source(items(), len(wanted), (channels, image_size, image_size), lambda: about)
