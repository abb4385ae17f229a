"""Omniglot (Lake et al. 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pml_fewshot.checks import check_at_least_one, check_choice, require
from pml_fewshot.data.cache import Source, cached_images, files_state
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.data.image_file import PILLOW_ERRORS
from pml_fewshot.data.png_checksums import check_png
from pml_fewshot.zip_archive import member_names, open_zip, read_member

PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each part
DRAWINGS = 20  # of each character
DRAWN = (105, 105)  # pixels of a drawing
LARGEST = 2**20  # bytes of a drawing's file; they have some hundred

OFFICIAL_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
OFFICIAL_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}

# The split of Vinyals et al. 2016, as Snell et al. 2017 published it: whole alphabets, but for Gurmukhi, of which the
# first 41 characters are for training and the last 4 for test. All characters not named here are for training.
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

    Args:
        root: folder with images_background and images_evaluation, as zips or folders, in itself or in its subfolder
            `omniglot`.
        image_size: height and width in pixels; 28 as in most papers (the drawings are 105 x 105), area-averaged.
        split: "vinyals" gives 1,028 / 172 / 423 characters for train / val / test (Vinyals et al. 2016);
            "official" the background set's 964 for train, no val, and the evaluation set's 659 for test.
        rotations: each turn by 90 degrees is a class of its own: 4,112 / 688 / 1,692 classes in the Vinyals split.
        download: fetch the official zips (14 MB, md5 checked) into root first where they are missing.
        cache_dir: where the decoded images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits whose class names are `Alphabet/characterNN`, with `/rotDDD` when rotations are classes.

    Raises:
        FileNotFoundError: a part is neither there as a zip nor as a folder.
        ConnectionError: a download failed or had another md5.
        ValueError: a zip or an image is broken or a part has another number of characters or drawings than Omniglot.
    """
    check_at_least_one("image_size", image_size)
    check_choice("split", split, ("vinyals", "official"))
    root = Path(root).resolve()
    if download:
        _download(root)
    parts = {part: _find_part(root, part) for part in PARTS}
    files = [file for part in parts.values() for file in ([part] if part.is_file() else part.rglob("*.png"))]
    cached = cached_images(
        "omniglot",
        (*parts.values(), image_size),
        files_state(files),
        lambda: _read(parts, image_size),
        cache_dir,
    )
    everything = FewShotDataset(cached.images, cached.labels, cached.about["class_names"])

    def characters(wanted: str) -> FewShotDataset:
        chosen = [c for c, name in enumerate(everything.class_names) if _role(c, name, split) == wanted]
        characters = everything.of_classes(chosen)
        return characters.rotated() if rotations else characters

    return Splits(characters("train"), characters("val") if split == "vinyals" else None, characters("test"))


def _role(character: int, name: str, split: str) -> str:
    if split == "official":
        return "train" if character < PARTS["images_background"] else "test"
    alphabet = name.split("/")[0]
    if alphabet in VINYALS_TEST or name in VINYALS_TEST_GURMUKHI:
        return "test"
    return "val" if alphabet in VINYALS_VAL else "train"


def _find_part(root: Path, part: str) -> Path:
    for place in (root / part, root / f"{part}.zip", root / "omniglot" / part, root / "omniglot" / f"{part}.zip"):
        if place.is_file() or place.is_dir():
            return place
    raise FileNotFoundError(
        f"expected Omniglot's {part}.zip or folder {part} in {root} or {root / 'omniglot'}, got neither; name another "
        "root (--data-root or PML_FEWSHOT_DATA), or pass download=True to fetch the official zips"
    )


def _download(root: Path) -> None:
    from torchvision.datasets.utils import download_url

    for part, md5 in OFFICIAL_MD5.items():
        try:
            _find_part(root, part)
        except FileNotFoundError:
            root.mkdir(parents=True, exist_ok=True)
            # fetched beside and moved when its md5 is right, so that a part of a file is never taken for the whole
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=root) as beside:
                url = f"{OFFICIAL_URL}/{part}.zip"
                try:
                    download_url(url, beside, md5=md5)
                except (RuntimeError, OSError) as error:
                    raise ConnectionError(
                        f"expected {part}.zip with md5 {md5} from {url}, got {error}; fetch it by hand into {root}"
                    ) from error
                (Path(beside) / f"{part}.zip").rename(root / f"{part}.zip")


def _read(parts: dict[str, Path], image_size: int) -> Source:
    """Characters in sorted order, background part first; each image (1, S, S)."""
    class_names: list[str] = []
    per_part = [_drawings_by_character(place) for place in parts.values()]
    for (part, place), characters in zip(parts.items(), per_part, strict=True):
        wrong = [name for name, drawings in characters.items() if len(drawings) != DRAWINGS]
        require(
            len(characters) == PARTS[part] and not wrong,
            f"{PARTS[part]} characters of {DRAWINGS} drawings in {place}",
            f"{len(characters)} characters" + (f", {wrong[0]} with another number of drawings" if wrong else ""),
            "unpack or fetch the file again",
        )
        class_names += characters

    def items() -> Iterator[tuple[np.ndarray, int]]:
        label = 0
        for place, characters in zip(parts.values(), per_part, strict=True):
            archive = open_zip(place) if place.is_file() else None
            for drawings in characters.values():
                for name in drawings:
                    yield _drawing(archive, place, name, image_size), label
                label += 1
            if archive is not None:
                archive.close()

    total = DRAWINGS * len(class_names)
    return Source(items(), total, (1, image_size, image_size), lambda: {"class_names": class_names})


def _drawings_by_character(place: Path) -> dict[str, list[str]]:
    """`Alphabet/characterNN` -> the drawings' names, both sorted; reads a zip's directory or walks a folder."""
    if place.is_file():
        with open_zip(place) as archive:
            names = member_names(archive, lambda name: name.endswith(".png") and not name.startswith("__MACOSX"))
    else:
        names = [file.relative_to(place).as_posix() for file in place.rglob("*.png")]
    characters: dict[str, list[str]] = {}
    for name in sorted(names):
        characters.setdefault("/".join(name.split("/")[-3:-1]), []).append(name)
    return characters


def _drawing(archive: zipfile.ZipFile | None, place: Path, name: str, image_size: int) -> np.ndarray:
    try:
        content = read_member(archive, name, LARGEST) if archive is not None else _content(place / name)
        check_png(content)
        with Image.open(BytesIO(content), formats=("PNG",)) as opened:
            require(opened.size == DRAWN, f"{DRAWN[0]} x {DRAWN[1]} pixels", f"{opened.size}", "fetch it again")
            # 105 -> 28 is a factor of 3.75: area averaging keeps thin strokes, nearest neighbour would break them
            drawing = opened.convert("L").resize((image_size, image_size), Image.Resampling.BOX)
    except (*PILLOW_ERRORS, RuntimeError) as error:
        raise ValueError(
            f"expected a drawing at {name} in {place}, got something unreadable ({error}); fetch the file again"
        ) from error
    return 255 - np.asarray(drawing, dtype=np.uint8)[None]


def _content(file: Path) -> bytes:
    require(file.is_file() and file.stat().st_size <= LARGEST, "a small file", "another", "unpack it again")
    return file.read_bytes()
