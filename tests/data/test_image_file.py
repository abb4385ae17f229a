"""read_image: every mode, against values computed by hand from the pixels written."""

import os
import struct
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pml_fewshot.data.image_file import BrokenImageError, image_names, is_image_name, read_image, read_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def corner(content: bytes, channels: int = 3) -> tuple[int, ...]:
    return tuple(read_image(content, 2, channels, "f")[:, 0, 0].tolist())


def test_rgb_of_the_right_size_passes_unchanged_with_channels_first():
    pixels = noise(84, 84, 3)
    image = read_image(saved(Image.fromarray(pixels)), 84, 3, "f")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))


def test_a_path_reads_as_its_bytes_do(tmp_path: Path):
    file = tmp_path / "ä b.png"
    file.write_bytes(saved(Image.fromarray(noise(9, 9, 3))))
    np.testing.assert_array_equal(read_image(file, 9, 3, "f"), read_image(file.read_bytes(), 9, 3, "f"))


def test_a_missing_path_stays_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png", 9, 3, "f")


def test_grey_is_repeated_for_three_channels_and_colours_become_luma_for_one():
    pixels = noise(6, 6)
    content = saved(Image.fromarray(pixels))
    np.testing.assert_array_equal(read_image(content, 6, 1, "f"), pixels[None])
    np.testing.assert_array_equal(read_image(content, 6, 3, "f"), np.stack([pixels] * 3))
    assert corner(saved(Image.new("RGB", (2, 2), GREEN)), channels=1) == (round(0.587 * 255),)


def test_one_bit_becomes_0_and_255():
    pixels = noise(6, 6) > 127
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(pixels)), 6, 1, "f")[0], pixels * np.uint8(255))


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


def test_palette_colours_are_looked_up():
    assert corner(saved(palette_image())) == GREEN
    assert corner(saved(palette_image(), "GIF")) == GREEN


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(1, WHITE), (0, GREEN), (bytes([255, 0]), WHITE), (bytes([255, 51]), (204, 255, 204))],
)
def test_transparent_palette_entries_are_laid_on_white(transparency: int | bytes, expected: tuple[int, ...]):
    assert corner(saved(palette_image(), transparency=transparency)) == expected


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), WHITE),
        ("RGBA", (*RED, 51), (255, 204, 204)),  # 51 / 255 = a fifth red, four fifths white
        ("LA", (0, 51), (204, 204, 204)),
        ("LA", (100, 255), (100, 100, 100)),
    ],
)
def test_alpha_is_laid_on_white(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]):
    assert corner(saved(Image.new(mode, (2, 2), colour))) == expected


def test_a_transparent_colour_of_rgb_is_laid_on_white():
    assert corner(saved(Image.new("RGB", (2, 2), RED), transparency=RED)) == WHITE


SIXTEEN = np.array([[0, 257, 128], [129, 32768, 65535], [65406, 65407, 300]], dtype=np.uint16)
EIGHT = np.array([[0, 1, 0], [1, 128, 255], [254, 255, 1]])  # nearest to value / 257


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])  # Pillow opens the first two as I;16, the third as I
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind: str):
    image = read_image(saved(Image.fromarray(SIXTEEN), kind), 3, 1, "f")
    np.testing.assert_array_equal(image, EIGHT[None])
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(SIXTEEN), kind), 3, 3, "f"), np.stack([EIGHT] * 3))


@pytest.mark.parametrize(("value", "scaled"), [(65535, 255), (257 * 7, 7)])
def test_32_bit_whole_numbers_count_as_sixteen_bit_grey(value: int, scaled: int):
    assert corner(saved(Image.fromarray(np.full((2, 2), value, dtype=np.int32)), "TIFF"), 1) == (scaled,)


@pytest.mark.parametrize(
    "pixels", [np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.ones((2, 2), "f4")]
)
def test_pixels_of_no_known_range_are_an_error(pixels: np.ndarray):
    with pytest.raises(ValueError, match=r"expected a readable image at deep\.tif, got expected .*save it with 8 bits"):
        read_image(saved(Image.fromarray(pixels), "TIFF"), 2, 1, "deep.tif")


def test_cmyk_is_converted():
    assert corner(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")) == RED
    red, green, blue = corner(saved(Image.new("CMYK", (8, 8), (255, 255, 0, 0)), "JPEG", quality=100))
    assert red < 4
    assert green < 4
    assert blue > 251


# Where the stored pixels stand in the picture seen, from the EXIF standard's table of orientations.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),  # stored lying on its left side: turn it clockwise
    7: lambda a: np.rot90(np.transpose(a), 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation: int):
    pixels = noise(5, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(content, 5, 1, "f")[0], UPRIGHT[orientation](pixels))


def test_exif_orientation_is_applied_to_jpeg_and_sixteen_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((16, 16), np.uint8)
    halves[:, 8:] = 255  # stored: black left, white right; seen, turned clockwise: black above, white below
    seen = read_image(saved(Image.fromarray(halves), "JPEG", exif=exif, quality=100), 16, 1, "f")[0]
    np.testing.assert_allclose(seen, halves.T, atol=3)
    deep = saved(Image.fromarray(SIXTEEN), "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(deep, 3, 1, "f")[0], np.rot90(EIGHT, -1))


@pytest.mark.parametrize(("height", "width"), [(10, 17), (17, 10), (10, 10)])
def test_the_centre_square_is_kept(height: int, width: int):
    pixels = noise(height, width)
    top, left = (height - 10) // 2, (width - 10) // 2
    image = read_image(saved(Image.fromarray(pixels)), 10, 1, "f")
    np.testing.assert_array_equal(image[0], pixels[top : top + 10, left : left + 10])


def test_scaling_keeps_shape_and_place():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:150] = RED  # the left half of the centre square
    for size in (20, 250):
        image = read_image(saved(Image.fromarray(pixels)), size, 3, "f")
        assert image.shape == (3, size, size)
        assert image[0, :, : size // 2 - 2].min() == 255
        assert image[0, :, size // 2 + 2 :].max() == 0


def test_shrinking_averages_and_a_strip_stays_cheap():
    board = (np.indices((80, 80)).sum(0) % 2 * 255).astype(np.uint8)  # nearest neighbour would give 0 or 255
    inner = read_image(saved(Image.fromarray(board)), 10, 1, "f")[0, 1:-1, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() <= 3
    assert read_image(saved(Image.new("L", (100_000, 1), 9)), 84, 1, "f").tolist() == np.full((1, 84, 84), 9).tolist()


PNG = saved(Image.fromarray(noise(30, 30, 3)))
JPEG = saved(Image.fromarray(noise(30, 30, 3)), "JPEG")


@pytest.mark.parametrize(
    "content", [b"", b"no image", PNG[:200], PNG[:20], JPEG[:300], JPEG[:10], b"\x89PNG\r\n\x1a\n"]
)
def test_broken_content_names_the_file(content: bytes):
    with pytest.raises(
        ValueError, match=r"expected a readable image at a/b\.png, got .+; replace the file or take"
    ) as error:
        read_image(content, 30, 3, "a/b.png")
    assert isinstance(error.value, BrokenImageError)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("shift", range(0, len(JPEG), 37))
def test_damage_anywhere_gives_an_image_or_the_named_error(shift: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a damaged head may claim more: that takes seconds
    for whole in (JPEG, PNG, saved(Image.fromarray(SIXTEEN), "TIFF")):
        content = bytearray(whole)
        content[shift % len(content)] ^= 0xFF
        # any other error would fail here
        for image in read_images(["f"], lambda _, damaged=bytes(content): damaged, 5, 3, "", skip_broken=True):
            assert image is None or image.shape == (3, 5, 5)


def bomb(width: int, height: int) -> bytes:
    """A BMP of 54 bytes that claims width x height pixels."""
    head = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("side", [10_000, 40_000])  # Pillow warns from 89 million pixels, refuses from 179 million
@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_a_decompression_bomb_names_the_file(side: int, warned: str):
    with warnings.catch_warnings():
        warnings.simplefilter(warned)
        with pytest.raises(ValueError, match=r"readable image at bomb\.bmp, got .*pixels.*; replace"):
            read_image(bomb(side, side), 8, 3, "bomb.bmp")


def test_more_pixels_than_are_read_name_the_file_whatever_pillow_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BrokenImageError, match=r"67,117,056 pixels, more than the 67,108,864 that are read"):
        read_image(bomb(8192, 8193), 8, 3, "bomb.bmp")
    webp = saved(Image.new("RGB", (8192, 4097)), "WEBP", lossless=True, method=0)  # some hundred bytes
    with pytest.raises(BrokenImageError, match=r"more than the 33,554,432 that are read"):
        read_image(webp, 8, 3, "bomb.webp")


READER = """
import sys
from pathlib import Path
from pml_fewshot.data.image_file import read_images
def peak():  # not getrusage, which counts what the process that started this one held
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1000
before = peak()
for image in read_images(["f"] * 4, lambda _: Path(sys.argv[1]), 8, 3, ""):
    assert image.shape == (3, 8, 8) and image.min() == image.max() == int(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize(("mode", "value"), [("I;16", 0), ("RGBA", 255)])
def test_a_few_small_files_of_many_pixels_take_little_memory(mode: str, value: int, tmp_path: Path):
    """Four of nine million pixels each: one after the other at 3 and 8 bytes a pixel, not all at once at 18."""
    side = 3000
    deep = Image.fromarray(np.zeros((side, side), np.uint16))
    (tmp_path / "f.png").write_bytes(saved(deep if mode == "I;16" else Image.new(mode, (side, side))))
    assert (tmp_path / "f.png").stat().st_size < 50_000
    command = [sys.executable, "-c", READER, str(tmp_path / "f.png"), str(value)]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 10 < megabytes < 160


@pytest.mark.parametrize(("size", "channels"), [(0, 3), (-1, 3), (2.5, 3), (8, 2), (8, 4)])
def test_wrong_sizes_and_channels_are_errors_of_the_call_and_not_of_the_file(size: int, channels: int):
    with pytest.raises(ValueError, match=r"expected (image_size|channels)") as error:
        read_image(PNG, size, channels, "f")
    assert not isinstance(error.value, BrokenImageError)


def test_names_of_images_are_found_by_suffix_and_hidden_ones_passed_over(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    for name in (
        "b/x.JPG",
        "a/deep/y.jpeg",
        "a/notes.txt",
        "a/._z.png",
        ".git/q.png",
        "__MACOSX/a/._y.png",
        "top.webp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    (tmp_path / "linked" / "x.JPG").touch()
    assert image_names(tmp_path) == ["a/deep/y.jpeg", "b/x.JPG", "linked/x.JPG", "top.webp"]
    assert is_image_name("a.TIFF")
    assert not is_image_name("a.npy")
    with pytest.raises(FileNotFoundError):
        image_names(tmp_path / "none")


@pytest.mark.parametrize("target", [".", "a", "a/b"])
def test_a_link_that_would_count_images_again_is_named(tmp_path: Path, target: str):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"expected every folder of images .* by one way, got .*; remove the link"):
        image_names(tmp_path)


def test_a_wrong_checksum_in_a_png_is_seen():
    content = bytearray(PNG)
    place = content.index(b"IDAT") + 1500  # in the pixels, where Pillow alone sees nothing
    content[place] ^= 1
    with pytest.raises(BrokenImageError, match=r"a wrong one of its part b'IDAT'"):
        read_image(content, 30, 3, "f")


def test_other_formats_than_the_known_ones_are_not_opened():
    for kind in ("EPS", "ICNS", "PDF"):
        content = saved(Image.fromarray(noise(32, 32, 3)), kind) if kind != "ICNS" else b"icns" + bytes(100)
        with pytest.raises(BrokenImageError, match="cannot identify image file"):
            read_image(content, 30, 3, "f")


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe.png", "device.png", "large.png"):
        with pytest.raises(BrokenImageError, match=r"expected a file of at most .* bytes"):
            read_image(tmp_path / name, 30, 3, name)


def test_many_images_keep_their_order_and_the_look_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pml_fewshot.data.image_file.CHUNK", 4)
    asked = []

    def content(name: str) -> bytes:
        asked.append(name)
        return b"" if name == "7" else saved(Image.new("L", (2, 2), int(name)))

    images = read_images([str(i) for i in range(30)], content, 2, 1, "place/", skip_broken=True)
    first = next(images)
    assert first is not None
    assert first.max() == 0
    assert len(asked) <= 4
    values = [None if image is None else int(image.max()) for image in images]
    assert values == [None if i == 7 else i for i in range(1, 30)]
    with pytest.raises(BrokenImageError, match="at place/7, got"):
        list(read_images([str(i) for i in range(30)], content, 2, 1, "place/"))
