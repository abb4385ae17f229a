"""Image files of any common kind: which they are (image_names), and how one is read as (C, H, W) uint8 (read_image)."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image, ImageOps

from pml_fewshot.checks import check_at_least_one, require

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of these suffixes; Pillow's EPS starts a program
LARGEST = 2**28  # bytes of a file that is read

THREADS = 4  # Pillow decodes outside of Python's lock, so large files keep several cores busy; 84 x 84 ones hardly do
CHUNK = 256  # 5 MB of images at 84 x 84

# What Pillow's readers raise on broken content, by kind of file and place of the damage.
PILLOW_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Warning),  # a warning comes as an exception where warnings are errors
)


class BrokenImageError(ValueError):
    """A file that cannot be read as an image; loaders that skip broken images skip on this error only."""


def is_image_name(name: str) -> bool:
    """Tells whether a path with "/" names an image, by its suffix in small or capital letters, and nothing hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not any(map(_is_hidden, name.split("/")))


def image_names(folder: Path) -> list[str]:
    """Returns the image files anywhere below a folder, as sorted relative names with "/"; linked folders count too.

    Raises:
        ValueError: a folder is reached by two ways, over a link: its images would count twice, or without end.
    """
    names = []
    reached: dict[tuple[int, int], str] = {}

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        below = Path(parent).relative_to(folder)
        stat = Path(parent).stat()
        first = reached.setdefault((stat.st_dev, stat.st_ino), parent)
        require(
            first == parent,
            f"every folder of images below {folder} to be reached by one way",
            f"{first} again as {parent}",
            "remove the link",
        )
        names += [(below / name).as_posix() for name in files if is_image_name(name)]
    return sorted(names)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def check_form(image_size: int, channels: int) -> None:
    """Raises a ValueError unless images of these channels, image_size x image_size, can be made."""
    check_at_least_one("image_size", image_size)
    require(channels in (1, 3), "channels 3 (RGB) or 1 (grey)", repr(channels), "choose one of them")


def read_image(content: bytes | bytearray | Path, image_size: int, channels: int, name: str) -> np.ndarray:
    """Reads one image, upright, its centre square scaled to image_size x image_size.

    Every mode becomes 8 bits: palettes are looked up, CMYK converted, 16-bit grey divided by 257 (65,535 becomes 255;
    Pillow alone would clip it), transparent parts laid on white. An EXIF orientation is applied. Of a moving picture
    the first frame is taken.

    Args:
        content: the file's bytes, or its path.
        image_size: height and width in pixels. The centre square is cut first and then scaled, which shows the same
            part as scaling the shorter side first, and a strip of 1 x 100,000 pixels stays cheap. Scaling is bilinear,
            averaged over the covered area when it shrinks, as torchvision's Resize does on such images. A picture of
            image_size x image_size passes unchanged.
        channels: 3 (RGB) or 1 (grey; of colours the luma).
        name: what to call the file in messages.

    Returns:
        (channels, image_size, image_size) uint8.

    Raises:
        BrokenImageError: (a ValueError) the content is broken, cut off, no image, has more pixels than Pillow's
            `Image.MAX_IMAGE_PIXELS` (a decompression bomb), has grey values of no known range, or is no regular file
            or one of more than 256 MiB. Of a PNG all checksums are verified; other formats have none, so damage in
            them can pass as another picture.
        ValueError: image_size < 1, or channels neither 1 nor 3.
    """
    check_form(image_size, channels)
    try:
        if isinstance(content, Path):
            content = _content(content)
        check_png(content)
        with Image.open(BytesIO(content), formats=FORMATS) as opened:
            _check_pixels(opened)
            image = _eight_bits(ImageOps.exif_transpose(opened), channels)
        pixels = np.asarray(_square(image, image_size))
    except (FileNotFoundError, PermissionError):
        raise
    except PILLOW_ERRORS as error:
        raise BrokenImageError(
            f"expected a readable image at {name}, got {error or type(error).__name__}; replace the file or take it out"
        ) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_images(
    names: Sequence[str],
    content: Callable[[str], bytes | bytearray | Path],
    image_size: int,
    channels: int,
    place: str,
    skip_broken: bool = False,
) -> Iterator[np.ndarray | None]:
    """Yields `read_image` of each name in turn, decoded in threads, at most CHUNK images ahead.

    Args:
        content: gives the bytes or the path behind a name.
        place: what stands before a name in messages.
        skip_broken: yield None for an image that cannot be read, else that is an error.
    """

    def read(name: str) -> np.ndarray | None:
        try:
            return read_image(content(name), image_size, channels, place + name)
        except BrokenImageError:
            if not skip_broken:
                raise
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), CHUNK):
            yield from pool.map(read, names[start : start + CHUNK])


def _content(file: Path) -> bytes:
    stat = file.stat()
    regular = S_ISREG(stat.st_mode)  # a named pipe would wait, a device would never end
    require(regular and stat.st_size <= LARGEST, f"a file of at most {LARGEST:,} bytes", "another", "make it smaller")
    return file.read_bytes()


def check_png(content: bytes | bytearray) -> None:
    """Raises a ValueError for a PNG with a wrong checksum or cut off: Pillow does not verify those of the pixels.

    What is no PNG passes.
    """
    view = memoryview(content)
    if bytes(view[:8]) != b"\x89PNG\r\n\x1a\n":
        return
    start, kind = 8, b""
    while kind != b"IEND":
        require(len(view) >= start + 12, "a PNG up to its end", "one that is cut off", "fetch it again")
        length, kind = struct.unpack_from(">I4s", view, start)
        end = start + 8 + length
        require(len(view) >= end + 4, "a PNG up to its end", "one that is cut off", "fetch it again")
        right = zlib.crc32(view[start + 4 : end]) == struct.unpack_from(">I", view, end)[0]
        require(right, "a PNG with its checksums right", f"a wrong one of its part {kind!r}", "fetch it again")
        start = end + 4


def _check_pixels(image: Image.Image) -> None:
    """Pillow only warns up to twice its limit. Warning filters belong to all threads, so none is set here."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels} pixels, more than Pillow's limit of {limit}")


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is Pillow's mode for 16-bit PGM and some TIFF
        grey = np.asarray(image).astype(np.int64)
        low, high = grey.min(), grey.max()
        require(low >= 0 and high <= 65535, "grey values from 0 to 65535", f"{low} to {high}", "save it with 8 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert(mode)
    require(image.mode != "F", "whole numbers as pixels", "floats, of no known range", "save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _square(image: Image.Image, image_size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.BILINEAR)
