"""Preprocessing: the pixels of torchvision's and timm's own transforms, of images of every size and mode."""

import numpy as np
import pytest
from PIL import Image

import pml_fewshot  # noqa: F401  before torchvision
from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.preprocessing import Preprocessing, Resampling

SHAPES = [(37, 53), (53, 37), (301, 200), (64, 64), (7, 9), (1, 5), (60, 900)]


def noise_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_are_those_of_torchvisions_resize_and_center_crop(resampling: Resampling):
    from torchvision.transforms import InterpolationMode, v2

    for shape in SHAPES:
        image = noise_image(*shape)
        for size, scale_to in [((32, 32), 36), ((31, 30), 33), ((32, 32), 32), ((32, 30), (36, 33))]:
            resize = v2.Resize(scale_to, InterpolationMode(resampling))
            expected = np.asarray(v2.CenterCrop(size)(resize(image))).transpose(2, 0, 1)
            assert difference(Preprocessing(size, scale_to, resampling)(image), expected) <= 1, (shape, size, scale_to)


def test_a_long_strip_costs_no_more_than_the_part_that_is_kept():
    strip = noise_image(2, 60_000)
    kept = Preprocessing((16, 16), 16, "bilinear")(strip)  # scaled as a whole it would be 16 x 480,000
    middle = strip.crop((29_990, 0, 30_010, 2))
    expected = np.asarray(middle.resize((160, 16), Image.Resampling.BILINEAR))[:, 72:88].transpose(2, 0, 1)
    assert difference(kept, expected) <= 1


def test_every_mode_becomes_eight_bits_in_the_channels_that_the_trunk_takes():
    color, gray = Preprocessing((8, 8), 8), Preprocessing((8, 8), 8, channels=1)
    image = noise_image(8, 8)
    assert np.array_equal(color(image), np.asarray(image).transpose(2, 0, 1))
    assert np.array_equal(gray(image), np.asarray(image.convert("L"))[None])
    assert np.array_equal(color(image.convert("L")), np.repeat(gray(image), 3, axis=0))
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert color(deep).min() == 255
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert color(clear).min() == 255  # transparent on white
    assert color(noise_image(8, 8, "P")).shape == color(noise_image(8, 8, "CMYK")).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8, 8), "scale_to": 6}, r"size=\(8, 8\) of scale_to=6; scale to more"),
        ({"size": (8, 8), "scale_to": (8, 6)}, "a part of the scaled image"),
        ({"size": 8, "scale_to": 8}, r"size as \(height, width\), got 8"),
        ({"size": (8, 0), "scale_to": 8}, "size to be an integer of at least 1, got 0"),
        ({"size": (8, 8), "scale_to": 8, "resampling": "bicubik"}, "did you mean 'bicubic'"),
        ({"size": (8, 8), "scale_to": 8, "channels": 2}, "channels 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        Preprocessing(**options)  # type: ignore[arg-type]


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UsageError, match="an image with pixels, got 5 x 0"):
        Preprocessing((8, 8), 8)(Image.new("RGB", (0, 5)))
