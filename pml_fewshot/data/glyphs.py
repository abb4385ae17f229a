"""Glyphs: the dataset that needs no download, letters and digits drawn from the typefaces that ship with matplotlib.

Each class is a character; its 20 images are drawings of it in different typefaces, each slightly rotated, slanted,
scaled and shifted. Training, validation and test classes are different scripts, just as Omniglot's are alphabets.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from math import cos, radians, sin, tan
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, features

from pml_fewshot.checks import MissingFileError
from pml_fewshot.data.cache import Source, cached_images
from pml_fewshot.data.dataset import FewShotDataset, Splits

DRAWINGS = 20  # of each class
IMAGE_SIZE = 28
FINE = 4  # drawn this many times larger, then area-averaged, so that edges come out gray
RECIPE = 2  # part of the cache's key: raise it when the set of characters or their drawings change

# Computer Modern predates Unicode: beyond ASCII its tables refer to other shapes (a Greek Gamma at U+00C0).
ASCII_FACES = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *ASCII_FACES,
)
MIN_FACES = 12

# The first word of a character's Unicode name decides. Names that begin otherwise (MICRO SIGN, OHM SIGN, PLANCK
# CONSTANT, FEMININE ORDINAL INDICATOR, DOUBLE-STRUCK CAPITAL C, SUPERSCRIPT .., MODIFIER LETTER .., COPTIC ..) are left
# out: most are another letter's shape in a second role, and a Greek mu must not get into training as MICRO SIGN.
SPLITS = {
    "LATIN": "train",
    "CYRILLIC": "train",
    "DIGIT": "train",
    "ARMENIAN": "val",
    "GEORGIAN": "val",
    "GREEK": "test",
}


def load_glyphs(seed: int = 0, cache_dir: str | Path | None = None) -> Splits:
    """Loads the built-in dataset: 28 x 28 gray images of letters and digits, ink high, 20 per class.

    The first call draws the images, 6 seconds on one core; later ones read the cache (0.02 s). The same seed gives the
    same images on every machine with the same Pillow and matplotlib, as both include FreeType.

    Args:
        seed: seed for the faces of each class and the turn, slant, scale and shift of each image.
        cache_dir: where the drawn images are kept; `$PML_FEWSHOT_CACHE` or `~/.cache/pml_fewshot` when None.

    Returns:
        Splits of 884 classes (Latin, Cyrillic, digits) for train, 120 (Armenian, Georgian) for val and 303 (Greek) for
        test, with Unicode names: `GREEK SMALL LETTER ALPHA`. No two classes of val or test have the same shape, but 30
        of the Greek letters look like a Latin or Cyrillic one (capital Alpha), as the test set's note says.

    Raises:
        MissingFileError: matplotlib's font folder lacks one of the 21 typefaces.
    """
    faces = _find_faces(_font_folder())
    key = (seed, RECIPE, PIL.__version__, features.version("freetype2"), *faces.values())
    stored = cached_images("glyphs", key, faces.values(), lambda: _read(faces, seed), cache_dir)
    names, twins = stored.notes["names"], stored.notes["twins"]
    labels = torch.arange(len(names)).repeat_interleave(len(stored.images) // len(names))
    everything = FewShotDataset(stored.images, labels, names)
    everything.digests = stored.digests
    roles = [SPLITS[name.split()[0]] for name in names]
    parts = {split: everything.select_classes([c for c, role in enumerate(roles) if role == split]) for split in twins}
    for split, part in parts.items():
        part.note = f"{twins[split]} look like a training class" if twins[split] else ""
    return Splits.of(parts)


def _font_folder() -> Path:
    logger = logging.getLogger("matplotlib")
    logger.setLevel(logging.ERROR)  # it recommends a settings folder if the home folder is missing or read-only
    try:
        import matplotlib
    finally:
        logger.setLevel(logging.NOTSET)
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _find_faces(folder: Path) -> dict[str, Path]:
    faces = {face: folder / f"{face}.ttf" for face in FACES}
    if missing := ", ".join(path.name for path in faces.values() if not path.is_file()):
        do = "install matplotlib 3.11 or newer from its wheel (3.10 has no cmti10, some distributions leave fonts out)"
        raise MissingFileError(f"expected matplotlib's {len(FACES)} typefaces in {folder}, got no {missing}; {do}")
    return faces


def _read(faces: dict[str, Path], seed: int) -> Source:
    holders, twins = _characters(_outlines(faces))
    notes = {"names": [unicodedata.name(character) for character in holders], "twins": twins}
    return Source(_drawings(holders, faces, seed), DRAWINGS * len(holders), (1, IMAGE_SIZE, IMAGE_SIZE), notes)


def _characters(outlines: dict[str, dict[str, bytes]]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Returns the classes in code point order, with the faces that contain each, and the number of twins in each split.

    Nobody can distinguish the Latin A from the Cyrillic one: twins have exactly the same outline in six faces or more.
    A twin of a class in the same split is left out: 53, all in train. Outlines that differ by a hair stay (13 pairs in
    train, such as A with diaeresis). Twins of a training class in val and test stay and are counted, because without
    them there would be fewer than 1,300 classes.
    """
    classes: dict[str, list[str]] = {}
    drawn: dict[tuple[str, str, bytes], str] = {}  # split, face, outline -> class

    def is_twin(character: str, split: str) -> bool:
        alike = Counter(drawn.get((split, *shape)) for shape in outlines[character].items())
        return any(twin and faces >= MIN_FACES // 2 for twin, faces in alike.items())

    for character in sorted(outlines):
        split = SPLITS[unicodedata.name(character).split()[0]]
        if len(outlines[character]) >= MIN_FACES and not is_twin(character, split):
            classes[character] = list(outlines[character])
            for shape in outlines[character].items():
                drawn.setdefault((split, *shape), character)
    twins = Counter(SPLITS[unicodedata.name(c).split()[0]] for c in classes if is_twin(c, "train"))
    return classes, {"train": 0, "val": twins["val"], "test": twins["test"]}


def _outlines(faces: dict[str, Path]) -> dict[str, dict[str, bytes]]:
    """Returns the outline of each letter and digit of our scripts in each face that has ink for it."""
    from matplotlib.ft2font import FT2Font, LoadFlags

    outlines: dict[str, dict[str, bytes]] = {}
    for face, path in faces.items():
        font = FT2Font(str(path))
        for code, glyph in font.get_charmap().items():
            if glyph and _is_letter(chr(code)) and (face not in ASCII_FACES or chr(code).isascii()):
                font.load_char(code, flags=LoadFlags.NO_SCALE)
                if len(vertices := font.get_path()[0]):
                    outlines.setdefault(chr(code), {})[face] = vertices.tobytes()
    return outlines


def _is_letter(character: str) -> bool:
    """Whether it is a letter or decimal digit of our scripts, no modifier letter (Lm, small copies) and no double.

    A double is a character that NFC turns into another one: U+1F71 is U+03AC, OHM SIGN is the Greek Omega. Names, NFC
    and these categories are practically fixed by Unicode's stability policy, so the Python version does not matter.
    """
    kind, script = unicodedata.category(character), unicodedata.name(character, " ").split(" ")[0]
    letter = kind in ("Lu", "Ll", "Lt", "Lo", "Nd") and script in SPLITS
    return letter and unicodedata.is_normalized("NFC", character)


def _drawings(holders: dict[str, list[str]], faces: dict[str, Path], seed: int) -> Iterator[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    # An em as large as the frame: capitals are 20 pixels high and o 16, so that o and O differ; tall letters shrink.
    # BASIC layout, because Raqm is not installed everywhere; single characters do not need it.
    size, basic = IMAGE_SIZE * FINE, ImageFont.Layout.BASIC
    fonts = {face: ImageFont.truetype(path, size, layout_engine=basic) for face, path in faces.items()}
    for character, held_by in holders.items():
        # each face once, in random order, before any is used again
        rounds = [torch.randperm(len(held_by), generator=generator) for _ in range(-(-DRAWINGS // len(held_by)))]
        warps = torch.rand(DRAWINGS, 6, generator=generator, dtype=torch.float64).mul(2).sub(1).tolist()
        for face, warp in zip(torch.cat(rounds)[:DRAWINGS].tolist(), warps, strict=True):
            yield _drawing(fonts[held_by[face]], character, warp)


def _drawing(font: ImageFont.FreeTypeFont, character: str, warp: Sequence[float]) -> np.ndarray:
    """One image (1, S, S); warp holds six numbers in [-1, 1]: turn, slant, width, height, shift right, shift down."""
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)

    # [[a, b], [c, d]] maps the letter into the frame: slant, then scale each side by up to 10 %, then turn.
    turn, slant = radians(10 * warp[0]), tan(radians(10 * warp[1]))
    wide, high = 1 + 0.1 * warp[2], 1 + 0.1 * warp[3]
    a, b = wide * cos(turn), wide * slant * cos(turn) - high * sin(turn)
    c, d = wide * sin(turn), wide * slant * sin(turn) + high * cos(turn)
    # The transformed corners of the ink stay a pixel away from the border: larger letters shrink and shift less.
    room = (IMAGE_SIZE - 2) * FINE
    across, down = abs(a) * width + abs(b) * height, abs(c) * width + abs(d) * height
    shrink = min(1, room / max(across, down))
    x = IMAGE_SIZE * FINE / 2 + warp[4] * min(2 * FINE, (room - shrink * across) / 2)
    y = IMAGE_SIZE * FINE / 2 + warp[5] * min(2 * FINE, (room - shrink * down) / 2)

    # Pillow needs the inverse, from the frame to the letter.
    scale = shrink * (a * d - b * c)
    a, b, c, d = d / scale, -b / scale, -c / scale, a / scale
    back = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    fine = (IMAGE_SIZE * FINE, IMAGE_SIZE * FINE)
    drawn = ink.transform(fine, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR).reduce(FINE)
    return np.asarray(drawn, dtype=np.uint8)[None]
