"""Converts drawings and photos of writing to images like those the glyph network was trained on: 28 x 28, ink high."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from pml_fewshot.checks import UsageError
from pml_fewshot.data.images import to_8_bits
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.io.checkpoint import load_embedder

# The embedder of `python -m experiments.quickstart`, seed 0: ProtoNet, 600 steps on Latin and Cyrillic letters.
WEIGHTS = Path(__file__).with_name("glyphs.safetensors")
FRAME = 28  # side of the network's input
FINE = 8  # a letter is drawn this many times larger, then area-averaged
FAINT = 24  # of 255: less contrast than that to the paper is not ink
SPECK = 0.02  # of the largest blot's pixels: smaller blots are dirt
LARGEST = 512  # longest side of the picture in which the ink is found


class NoInkError(UsageError):
    """A picture with nothing drawn on it."""


@dataclass(frozen=True)
class InkPreprocessing(Preprocessing):
    """Finds the ink of a drawing or a photo of writing, and gives it the place, size and stroke of a training letter.

    Ink may be dark on light paper or light on dark, according to the border. On Omniglot's 659 evaluation characters,
    drawn with a mouse by 20 people, 5-way 2-shot accuracy is 96.9 %, and 93.7 % if the whole picture is scaled.

    Args:
        letter: pixels of a letter's longer side in the frame; training letters have 18 to 26, 23 in the middle.
        stroke: width in pixels of a pen's stroke in it; training letters have 2.2 to 4.2.
    """

    size: tuple[int, int] = (FRAME, FRAME)
    scale_to: int | tuple[int, int] = (LARGEST, LARGEST)
    channels: int = 1
    letter: int = 22
    stroke: float = 2.6

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(1, 28, 28) uint8.

        Raises:
            NoInkError: there is no ink.
        """
        gray = to_8_bits(image, "L")
        gray.thumbnail((LARGEST, LARGEST))
        ink = ink_of(np.asarray(gray, dtype=np.float32))
        return framed(with_stroke(scaled(ink, self.letter * FINE), self.stroke * FINE))[None]


def ink_of(gray: np.ndarray) -> np.ndarray:
    """The ink, from 0 to 1, in the letter's bounding box (h, w) of a gray picture (H, W), 0 to 255."""
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    paper = float(np.median(border))
    darker, lighter = paper - gray, gray - paper
    # the side with more contrast is ink: on a photo of writing the light may vary, but most of it is paper
    ink = darker if _sum_beyond(darker) >= _sum_beyond(lighter) else lighter
    if ink.max() < FAINT:
        raise NoInkError("expected a picture with something drawn on it, got an empty one; draw first")
    threshold = max(FAINT / 2, _otsu(ink.clip(0)))
    blots, number = ndimage.label(ink > threshold, structure=np.ones((3, 3)))
    areas = np.bincount(blots.ravel(), minlength=number + 1)
    areas[0] = 0
    kept = (areas >= SPECK * areas.max())[blots] & (blots > 0)
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # edges stay gray, so that a stroke's width is known to better than a pixel
    near = ndimage.binary_dilation(kept[box])
    return np.where(near, (ink[box] / (2 * threshold)).clip(0, 1), 0)


def scaled(ink: np.ndarray, side: int) -> np.ndarray:
    """The ink, scaled so that its longer side has `side` pixels."""
    height, width = (max(1, round(length * side / max(ink.shape))) for length in ink.shape)
    image = Image.fromarray(ink.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def with_stroke(ink: np.ndarray, width: float) -> np.ndarray:
    """The ink with strokes of the given average width, padded by as much.

    A small drawing has thick strokes once it is enlarged, a large one thin ones. The edge of the ink is moved along
    its signed distance; within a stroke of width w the mean distance to the edge is w / 4.
    """
    ink = np.pad(ink, int(width)) > 0.5
    if not ink.any():  # a hairline lost in scaling
        ink[ink.shape[0] // 2, ink.shape[1] // 2] = True
    inside, outside = ndimage.distance_transform_edt(ink), ndimage.distance_transform_edt(~ink)
    move = min((4 * inside[ink].mean() - width) / 2, inside.max() / 2)  # the middle of the thickest stroke stays
    return (np.where(ink, inside - 0.5, 0.5 - outside) - move + 0.5).clip(0, 1)


def framed(ink: np.ndarray) -> np.ndarray:
    """(28, 28) uint8 image of ink that is FINE times as large, centered."""
    side = FRAME * FINE
    canvas = np.zeros((side, side), np.float32)
    height, width = min(side, ink.shape[0]), min(side, ink.shape[1])
    top, left = (ink.shape[0] - height) // 2, (ink.shape[1] - width) // 2
    down, right = (side - height) // 2, (side - width) // 2
    canvas[down : down + height, right : right + width] = ink[top : top + height, left : left + width]
    fine = canvas.reshape(FRAME, FINE, FRAME, FINE)
    return (255 * fine.mean(axis=(1, 3))).round().astype(np.uint8)


def glyph_embedder() -> ImageEmbedder:
    """The network that ships with the package, 576-d."""
    embedder = Embedder(Conv4(in_channels=1))
    load_embedder(WEIGHTS, embedder)
    return ImageEmbedder(embedder.eval(), InkPreprocessing(), progress=False)


def _sum_beyond(values: np.ndarray) -> float:
    return float(values[values >= FAINT].sum())


def _otsu(values: np.ndarray) -> float:
    """The threshold that splits values from 0 to 255 into two groups with the least variance within (Otsu 1979)."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(np.float64)
    below, levels = counts.cumsum(), np.arange(256)
    total, sums = below[-1], (counts * levels).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(np.nan_to_num(between, posinf=0).argmax()) + 0.5
