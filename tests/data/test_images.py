"""read_image: every mode, against values computed by hand from the pixels written; read_images and open_images."""

import struct
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pml_fewshot.checks import UsageError
from pml_fewshot.data import images
from pml_fewshot.data.images import BrokenImageError, Form, open_images, read_image, read_images
from tests.data.loading import noise

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    if (kind, image.mode) == ("PPM", "I;16"):  # which Pillow 10 does not write
        return b"P5 %d %d 65535\n" % image.size + np.asarray(image).astype(">u2").tobytes()
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_an_image_of_the_right_size_passes_unchanged_with_channels_first():
    pixels = noise(84, 84, 3)
    image = read_image(saved(Image.fromarray(pixels)), Form.of(84, 3), "f")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))
    gray = saved(Image.fromarray(pixels[:, :, 0]))
    np.testing.assert_array_equal(read_image(gray, Form.of(84, 1), "f"), pixels[None, :, :, 0])
    np.testing.assert_array_equal(read_image(gray, Form.of(84, 3), "f"), np.stack([pixels[:, :, 0]] * 3))
    bits = pixels[:, :, 0] > 127
    np.testing.assert_array_equal(
        read_image(saved(Image.fromarray(bits)), Form.of(84, 1), "f")[0], bits * np.uint8(255)
    )


@pytest.mark.parametrize(
    ("mode", "color", "kind", "options", "expected"),
    [
        ("P", 1, "GIF", {}, GREEN),
        ("P", 1, "PNG", {"transparency": 1}, WHITE),
        ("P", 1, "PNG", {"transparency": bytes([255, 51])}, (204, 255, 204)),  # 51 / 255 = a fifth, four fifths white
        ("RGBA", (*RED, 51), "PNG", {}, (255, 204, 204)),
        ("LA", (0, 51), "PNG", {}, (204, 204, 204)),
        ("RGB", RED, "PNG", {"transparency": RED}, WHITE),
        ("CMYK", (0, 255, 255, 0), "TIFF", {}, RED),
    ],
)
def test_palettes_are_looked_up_transparent_parts_laid_on_white_and_cmyk_converted(
    mode: str, color: tuple[int, ...], kind: str, options: dict[str, object], expected: tuple[int, ...]
):
    image = Image.new(mode, (2, 2), color)
    if mode == "P":
        image.putpalette([*RED, *GREEN, *BLUE])
    content = saved(image, kind, **options)
    assert tuple(read_image(content, Form.of(2, 3), "f")[:, 0, 0]) == expected
    luma = expected[0] * 0.299 + expected[1] * 0.587 + expected[2] * 0.114
    assert read_image(content, Form.of(2, 1), "f")[0, 0, 0] == pytest.approx(luma, abs=1)


SIXTEEN = np.array([[0, 257, 128], [129, 32768, 65535], [65406, 65407, 300]], dtype=np.uint16)
EIGHT = np.array([[0, 1, 0], [1, 128, 255], [254, 255, 1]])  # nearest to value / 257


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "32-bit TIFF"])  # Pillow opens the first two as I;16, then as I
def test_sixteen_bit_gray_is_scaled_and_not_clipped(kind: str):
    deep = SIXTEEN.astype(np.int32) if kind.startswith("32") else SIXTEEN
    content = saved(Image.fromarray(deep), kind.split()[-1])
    np.testing.assert_array_equal(read_image(content, Form.of(3, 1), "f"), EIGHT[None])
    np.testing.assert_array_equal(read_image(content, Form.of(3, 3), "f"), np.stack([EIGHT] * 3))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn it clockwise
    content = saved(Image.fromarray(SIXTEEN), exif=exif)
    np.testing.assert_array_equal(read_image(content, Form.of(3, 1), "f")[0], np.rot90(EIGHT, -1))
    corners = np.kron([[0, 80], [160, 240]], np.ones((16, 16))).astype(np.uint8)
    photo = read_image(saved(Image.fromarray(corners), "JPEG", exif=exif, quality=100), Form.of(32, 1), "f")[0]
    np.testing.assert_allclose(photo, np.rot90(corners, -1), atol=3)


def test_the_center_square_is_kept():
    wide = noise(10, 17)
    for pixels, square in ((wide, wide[:, 3:13]), (wide.T, wide[:, 3:13].T)):
        np.testing.assert_array_equal(read_image(saved(Image.fromarray(pixels)), Form.of(10, 1), "f")[0], square)


def test_scaling_keeps_shape_and_place_and_shrinking_averages():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:150] = RED  # the left half of the center square
    for size in (20, 250):
        image = read_image(saved(Image.fromarray(pixels)), Form.of(size, 3), "f")
        assert image.shape == (3, size, size)
        assert image[0, :, : size // 2 - 2].min() == 255
        assert image[0, :, size // 2 + 2 :].max() == 0
    board = (np.indices((80, 80)).sum(0) % 2 * 255).astype(np.uint8)  # nearest neighbor would give 0 or 255
    inner = read_image(saved(Image.fromarray(board)), Form.of(10, 1), "f")[0, 1:-1, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() <= 3


def torchvision_resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    from torchvision.transforms.v2.functional import resize

    return np.asarray(resize(Image.fromarray(pixels), [height, width], antialias=True))


def test_crop_pad_and_stretch_fill_any_frame():
    """Against torchvision's Resize of the part that each takes."""
    wide, tall = noise(40, 100, 3), noise(100, 40, 3)
    for pixels, form, part in (
        (wide, Form.of((20, 20)), wide[:, 30:70]),
        (wide, Form.of((20, 30)), wide[:, 20:80]),
        (tall, Form.of((20, 10)), tall[10:90]),
        (wide, Form.of((20, 50)), wide),
        (wide, Form.of((24, 10), resize="stretch"), wide),
    ):
        found = read_image(saved(Image.fromarray(pixels)), form, "f")
        np.testing.assert_array_equal(found.transpose(1, 2, 0), torchvision_resized(part, form.height, form.width))
    padded = read_image(saved(Image.fromarray(wide)), Form.of((30, 50), resize="pad"), "f").transpose(1, 2, 0)
    np.testing.assert_array_equal(padded[5:25], torchvision_resized(wide, 20, 50))
    assert padded[:5].max() == padded[25:].max() == 0


def test_sixteen_bits_are_kept_where_they_are_wanted():
    deep = Form.of(3, channels=1, depth=16)
    for kind in ("PNG", "TIFF", "PPM"):
        np.testing.assert_array_equal(read_image(saved(Image.fromarray(SIXTEEN), kind), deep, "f"), SIXTEEN[None])
    shallow = np.array([[0, 1], [128, 255]], np.uint8)
    found = read_image(saved(Image.fromarray(shallow)), Form.of(2, channels=1, depth=16), "f")
    np.testing.assert_array_equal(found, shallow[None].astype(np.uint16) * 257)
    half = read_image(saved(Image.fromarray(np.repeat(SIXTEEN[:2, :2], 8, axis=1))), Form.of((2, 16), 1, depth=16), "f")
    assert half.dtype == np.uint16
    with pytest.raises(UsageError, match=r"depth 8, or 16 of gray images \(channels=1\), got 16 with 3 channels"):
        Form.of(84, 3, depth=16)


PNG = saved(Image.fromarray(noise(30, 30, 3)))
JPEG = saved(Image.fromarray(noise(30, 30, 3)), "JPEG")
BOMB = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)  # a BMP
CUT = [b"", b"no image", PNG[:200], PNG[:20], JPEG[:300], BOMB, saved(Image.new("RGB", (9, 9)), "PCX")]
NO_RANGE = [(70000, np.int32), (-1, np.int32), (1, np.float32)]
NO_RANGE = [saved(Image.fromarray(np.full((2, 2), value, dtype)), "TIFF") for value, dtype in NO_RANGE]


@pytest.mark.parametrize(
    ("content", "got"), [*((c, ".+") for c in CUT), *((c, ".* no known range.*") for c in NO_RANGE)]
)
def test_broken_content_names_the_file(content: bytes, got: str):
    with pytest.raises(BrokenImageError, match=rf"readable image at a/b\.png, got {got}; replace the file or") as error:
        read_image(content, Form.of(30, 3), "a/b.png")
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(("size", "channels"), [(0, 3), (2.5, 3), ((8, 0), 3), ((8, 8, 8), 3), (8, 2), (8, 4)])
def test_wrong_sizes_and_channels_are_errors_of_the_call_and_not_of_the_file(size: object, channels: int):
    with pytest.raises(UsageError, match=r"expected (image_size|channels)") as error:
        read_image(PNG, Form.of(size, channels), "f")
    assert not isinstance(error.value, BrokenImageError)


@pytest.mark.parametrize("in_threads", [False, True])
def test_many_images_keep_their_order_and_are_read_only_a_little_ahead(
    monkeypatch: pytest.MonkeyPatch, in_threads: bool
):
    monkeypatch.setattr(images, "AHEAD", 4)
    monkeypatch.setattr(images, "THREADED_BYTES", 1 if in_threads else 2**20)
    names, asked = [str(i) for i in range(30)], []

    def read(name: str) -> bytes:
        asked.append(name)
        if name == "mine":
            raise PermissionError(13, "not yours", name)
        return b"" if name == "7" else saved(Image.new("L", (2, 2), int(name)))

    found = read_images(names, read, Form.of(2, 1), Path("place"), skip_broken=True)
    assert np.max(next(found)) == 0
    assert len(asked) <= 5
    assert [image if image is None else image.max() for image in found] == [*range(1, 7), None, *range(8, 30)]
    with pytest.raises(BrokenImageError, match="at place/7, got"):
        list(read_images(names, read, Form.of(2, 1), Path("place")))
    with pytest.raises(PermissionError, match="not yours"):  # which is no broken image
        list(read_images(["mine"], read, Form.of(2, 1), Path(), skip_broken=True))


SEEN = ["a/deep/ü y.jpeg", "b/x.JPG", "linked/x.png", "top.webp"]
UNSEEN = ["a/notes.txt", "a/._z.png", ".git/q.png", "__MACOSX/a/y.png", "a.npy"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_are_found_by_suffix_in_folders_and_zips_and_hidden_ones_ignored(tmp_path: Path, kind: str):
    path = tmp_path / kind
    if kind == "folder":
        (tmp_path / "elsewhere").mkdir()
        path.mkdir()
        (path / "linked").symlink_to(tmp_path / "elsewhere")
        for name in SEEN[::-1] + UNSEEN:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(name)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in SEEN[::-1] + UNSEEN:
                archive.writestr(name, name)
    with open_images(path) as found:
        assert found.names == SEEN
        assert [name for name in found.others if not name.endswith("/")] == ["a.npy", "a/notes.txt"]
        assert [found.read(name).decode() for name in found.names] == SEEN
        assert found.files == ([path] if kind == "zip" else [path / name for name in SEEN])
    assert {each.name for each in tmp_path.iterdir()} <= {kind, "elsewhere"}  # nothing is unpacked


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_broken_zip_is_named_when_it_is_opened_or_read(tmp_path: Path, method: int):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.png", PNG)
    whole = path.read_bytes()
    broken = [whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :] for place in (36, 300)]
    for content in (whole[:10], whole[: len(whole) // 2], *broken):
        path.write_bytes(content)
        with (
            pytest.raises(UsageError, match=r"expected a whole zip file at .*a\.zip, got a broken one .*; delete it"),
            open_images(path) as found,
        ):
            found.read(found.names[0])
    with pytest.raises(FileNotFoundError), open_images(tmp_path / "none.zip"):
        pass
