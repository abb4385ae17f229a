"""Omniglot (Lake et al. 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pml_fewshot.checks import MissingFileError, UsageError, check_at_least_one, check_choice
from pml_fewshot.data.cache import Source, cached_images
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.data.images import Form, open_images, read_images

PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each part
DRAWINGS = 20  # of each character

# The split of Vinyals et al. 2016, as Snell et al. 2017 published it: whole alphabets, except for Gurmukhi, whose
# first 41 characters are for training and last 4 for test. All characters not named here are for training.
VINYALS_VAL = ("Hebrew", "Mkhedruli_(Georgian)", "Armenian", "Early_Aramaic", "Bengali")
VINYALS_TEST = (
    *("Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya"),
    *("Syriac_(Serto)", "Sylheti", "Tengwar", "Tibetan", "ULOG"),
)
VINYALS_TEST_GURMUKHI = tuple(f"Gurmukhi/character{number}" for number in (42, 43, 44, 45))


def load_omniglot(
    root: str | Path,
    image_size: int = 28,
    split: Literal["vinyals", "official"] = "vinyals",
    rotations: bool = True,
    download: bool = False,
    cache_dir: str | Path | None = None,
) -> Splits:
    """Reads Omniglot from its two zips or unpacked folders; ink is high (255), paper 0.

    Class names are `Alphabet/characterNN`, with `/rotDDD` when rotations are classes.

    Args:
        root: folder that holds images_background and images_evaluation, as zips or folders, directly or in `omniglot`;
            or that holds torchvision's `omniglot-py`.
        image_size: height and width in pixels; 28 as in most papers (the drawings are 105 x 105), area-averaged.
        split: "vinyals" gives 1,028 / 172 / 423 characters for train / val / test (Vinyals et al. 2016);
            "official" the background set's 964 for train, no val, and the evaluation set's 659 for test.
        rotations: each rotation by 90 degrees is a separate class: 4,112 / 688 / 1,692 classes in the Vinyals split.
        download: first download the official zips (14 MB), if missing, to `root/omniglot-py`, as torchvision does.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Raises:
        MissingFileError: a part exists neither as a zip nor as a folder.
        UsageError: a zip or an image is broken, or a part does not have Omniglot's number of characters or drawings.
    """
    check_choice("split", split, ("vinyals", "official"))
    check_at_least_one("image_size", image_size)
    parts = {part: _find_part(Path(root).resolve(), part, download) for part in PARTS}
    files = [file for part in parts.values() for file in ([part] if part.is_file() else part.rglob("*.png"))]
    key = (*parts.values(), image_size)
    stored = cached_images("omniglot", key, files, lambda: _read(parts, image_size), cache_dir)
    characters_of_all = stored.notes["characters"]
    labels = torch.arange(len(characters_of_all)).repeat_interleave(DRAWINGS)
    everything = FewShotDataset(stored.images, labels, characters_of_all)
    everything.digests = stored.digests

    def characters(role: str) -> FewShotDataset:
        wanted = [c for c, name in enumerate(everything.class_names) if _role(c, name, split) == role]
        chosen = everything.select_classes(wanted)
        return chosen.with_rotations_as_classes() if rotations else chosen

    return Splits(characters("train"), characters("val") if split == "vinyals" else None, characters("test"))


def _role(character: int, name: str, split: str) -> str:
    if split == "official":
        return "train" if character < PARTS["images_background"] else "test"
    alphabet = name.split("/")[0]
    if alphabet in VINYALS_TEST or name in VINYALS_TEST_GURMUKHI:
        return "test"
    return "val" if alphabet in VINYALS_VAL else "train"


def _find_part(root: Path, part: str, download: bool) -> Path:
    places = [folder / name for folder in (root, root / "omniglot") for name in (f"{part}.zip", part)]
    if download and not any(place.exists() for place in places):
        from torchvision.datasets import Omniglot

        Omniglot(str(root), background=part == "images_background", download=True)  # checks MD5, also of an old file
    theirs = [root / "omniglot-py" / name for name in (part, f"{part}.zip")]  # where torchvision puts them
    for place in (*places, *theirs):
        if place.exists():
            return place
    do = "name another root (--data-root or PML_FEWSHOT_DATA), or pass download=True to fetch the official zips"
    raise MissingFileError(f"expected Omniglot's {part}.zip or folder {part} in {root} or its omniglot, got none; {do}")


def _read(parts: dict[str, Path], image_size: int) -> Source:
    """Reads characters in sorted order, background part first; each image (1, S, S)."""
    class_names: list[str] = []
    form = Form.of(image_size, channels=1)
    for part, path in parts.items():
        with open_images(path) as found:
            counts = Counter("/".join(name.split("/")[-3:-1]) for name in found.names)  # keeps the order
        wrong = [f", {count} drawings of {name}" for name, count in counts.items() if count != DRAWINGS]
        if len(counts) != PARTS[part] or wrong:
            wanted, got = f"{PARTS[part]} characters of {DRAWINGS} drawings", f"{len(counts)} characters"
            raise UsageError(f"expected {wanted} in {path}, got {got}{''.join(wrong[:1])}; unpack or fetch it again")
        class_names += counts

    def items() -> Iterator[np.ndarray]:
        for path in parts.values():
            with open_images(path) as found:
                # 105 -> 28 is a factor of 3.75: area averaging keeps thin strokes, nearest neighbor breaks them
                for drawing in read_images(found.names, found.read, form, path, resampling=Image.Resampling.BOX):
                    yield 255 - np.asarray(drawing)

    return Source(items(), DRAWINGS * len(class_names), form.shape, {"characters": class_names})
