"""Your own images, one folder per class: divided into splits (load_image_folder), or as one set (load_images)."""

from collections.abc import Sequence
from pathlib import Path

from pml_fewshot.checks import MissingFileError, UsageError, check_disjoint
from pml_fewshot.data.class_lists import ClassLists, divide_classes, role_of
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.data.images import IMAGE_SUFFIXES, Form, ImageFiles, Resize, Size, open_images
from pml_fewshot.data.listing import Classes, Listing, by_folder, common_folder, note_twins, what_is_left_out

ROLE_NAMES = ["test", "train", "val"]


def load_image_folder(
    root: str | Path,
    image_size: Size = 84,
    channels: int = 3,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    skip_broken: bool = False,
    memory_map: bool = False,
    cache_dir: str | Path | None = None,
    splits: ClassLists | None = None,
    resize: Resize = "crop",
    depth: int = 8,
    shared_classes: bool = False,
) -> Splits:
    """Reads a folder of images, one subfolder per class: root/<class>/*.jpg or root/{train,val,test}/<class>/*.jpg.

    Classes are divided by `splits`. Without them, folders `train` and `test` or `val` (`valid`, `validation`) in root
    are the splits (results are on val if `test` is missing); otherwise the classes are drawn with `seed`. Images in
    deeper subfolders belong to the class above them; hidden files are ignored. Class names are those of the subfolders,
    sorted within each split; val is None if there is none.

    A warning counts what is left out or interpreted differently than it looks: files with other extensions in class
    folders, folders without images, deeper folders, a folder `train` among others. Copies of images, and how many of
    them are in another class or split, are counted in the sets' notes, which tables show.

    Args:
        root: the folder, or a zip of one, which is never unpacked. If all images are below one subfolder (`images`, as
            in CUB), the classes are the folders in it.
        image_size: height and width, or one number for both, in pixels; 84 as in miniImageNet.
        channels: 3 (RGB) or 1 (gray).
        val_fraction: fraction of the classes for val, rounded, at least one class; 0 for no val.
        test_fraction: fraction of the classes for test, rounded, at least one class.
        seed: seed for drawing classes; the same seed, fractions and class names give the same split everywhere.
        skip_broken: leave out images that cannot be read, with a warning that names up to ten and a note on the sets;
            otherwise the first one raises an error.
        memory_map: leave the images in the cache's file and read only the requested ones, for sets larger than memory
            (`FewShotDataset.checksum(recompute=True)` can verify them); otherwise they are copied into memory.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.
        splits: class names of each split, `{"train": [...], "val": [...], "test": "test.txt"}`, or a folder with
            train.txt, val.txt, test.txt (one name per line; also .csv and .json, as published for CUB, CIFAR-FS and
            tieredImageNet). Classes in no list are left out and counted in the sets' notes.
        resize: "crop" scales the largest central part with the right aspect ratio, "pad" the whole image, with black
            borders, "stretch" each side independently.
        depth: bits per pixel; 16 keeps the full depth of 16-bit gray images (channels=1).
        shared_classes: train and test have the same classes, with different images, on purpose; see Splits.

    Raises:
        UsageError: no folder (MissingFileError), no images, images outside class folders, too few classes for the
            splits, a class in two splits, or a broken image (with skip_broken: a class with only broken images).
    """
    form, root = Form.of(image_size, channels, resize, depth), existing(root)
    with open_images(root) as found:
        top = common_folder(found.names)
        depth_of_classes = top.count("/")
        said: list[str] = []
        by_split = {} if splits is not None else split_folders(found.names, root, depth_of_classes, said)
        if by_split:
            said += what_is_left_out(found, top, depth_of_classes + 1)
            own = {split: by_folder(names, root, said, depth_of_classes + 1) for split, names in by_split.items()}
            note = "" if "test" in own else "no test classes: val's in their place"
        else:
            said += what_is_left_out(found, top, depth_of_classes)
            own, note = divided(classes_in(found, top, said), splits, val_fraction, test_fraction, seed)
        if not shared_classes:
            check_disjoint([(split, tuple(classes)) for split, classes in own.items()])
        listing = Listing(root, found.names, own, found.read, found.files, said)
        sets = listing.sets("image_folder", form, skip_broken, memory_map, cache_dir, note)
    note_twins(sets)
    listing.warn()
    return Splits.of(sets, shared_classes)


def load_images(
    root: str | Path,
    image_size: Size = 84,
    channels: int = 3,
    skip_broken: bool = False,
    memory_map: bool = False,
    cache_dir: str | Path | None = None,
    resize: Resize = "crop",
    depth: int = 8,
) -> FewShotDataset:
    """Reads a folder or zip of images, one subfolder per class, as one set; arguments as in load_image_folder."""
    form, root = Form.of(image_size, channels, resize, depth), existing(root)
    with open_images(root) as found:
        top = common_folder(found.names)
        said = what_is_left_out(found, top, top.count("/"))
        classes = classes_in(found, top, said)
        if len(roles := [name for name in classes if role_of(name)]) > 1:
            do = f"use load_image_folder, or give {root.name}/{roles[0]} as root"
            raise UsageError(f"expected class folders in {root}, got those of splits, {', '.join(roles)}; {do}")
        listing = Listing(root, found.names, {"all": classes}, found.read, found.files, said)
        sets = listing.sets("image_folder", form, skip_broken, memory_map, cache_dir)
    note_twins(sets)
    listing.warn()
    return sets["all"]


def split_folders(names: Sequence[str], path: Path, depth: int, said: list[str]) -> dict[str, list[str]]:
    """Returns split -> image names if the folders at `depth` are train and test, val or both; else nothing."""
    below: dict[str, list[str]] = {}
    for name in names:
        below.setdefault(name.split("/")[depth] if name.count("/") > depth else "", []).append(name)
    roles = {folder: role for folder in below if (role := role_of(folder))}
    if len(roles) < 2:
        if roles:  # a folder `train` among others may well hold pictures of trains
            said.append(f"folder {next(iter(roles))} is taken as a class, among {len(below) - 1} others")
        return {}
    if "" in below:
        raise UsageError(f"expected images of {path} in class folders, got {below[''][0]} in none; move it into one")
    if len(roles) < len(below) or sorted(roles.values()) not in (["test", "train"], ["train", "val"], ROLE_NAMES):
        raise UsageError(
            f"expected images in {path} in the folders train, test and val, or train and one of them, got them in "
            f"{', '.join(sorted(below)[:10])}; move the others, or put all classes side by side to have them split"
        )
    by_role = {role: below[folder] for folder, role in roles.items()}
    return {role: by_role[role] for role in ("train", "val", "test") if role in by_role}


def divided(
    classes: Classes, splits: ClassLists | None, val_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, Classes], str]:
    """Returns the classes of each split, by lists or a draw, and a note if some are in no list."""
    lists, note = divide_classes(list(classes), splits, val_fraction, test_fraction, seed)
    return {split: {name: classes[name] for name in listed} for split, listed in lists.items()}, note


def classes_in(found: ImageFiles, top: str, said: list[str]) -> Classes:
    if not found.names:
        others = sum(not name.endswith("/") for name in found.others)
        got = f"got none among {others} other files"
        raise UsageError(
            f"expected images in class folders in {found.path}, {got}; add files {', '.join(IMAGE_SUFFIXES)}"
        )
    return by_folder(found.names, found.path, said, top.count("/"))


def existing(root: str | Path) -> Path:
    path = Path(root).resolve()
    if not path.exists():
        raise MissingFileError(f"expected a folder of images at {path}, got none there; name another root")
    return path
