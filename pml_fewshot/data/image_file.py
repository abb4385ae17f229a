"""Image files of any common kind: which they are (image_names), and how one is read as (C, H, W) uint8 (read_image)."""

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import cast

import numpy as np
from PIL import Image, ImageOps

from pml_fewshot.checks import check_at_least_one, require
from pml_fewshot.data.png_checksums import check_png

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of these suffixes; Pillow's EPS starts a program
LARGEST = 2**28  # bytes of a file that is read
LARGE = 2**24  # bytes of a file of which only one is held at a time
# 200 kB can unpack to any number of pixels, which take 4 to 12 bytes each, by WebP's decoder 16. So that no set of
# files takes more than about a GB, large images go one by one. Cameras of 60 million pixels stay below the limit.
MOST_PIXELS, MOST_PIXELS_WEBP, LARGE_PIXELS = 2**26, 2**25, 2**22
ROWS = 256  # converted at a time, so that no second and third copy of a large image is made

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
        BrokenImageError: (a ValueError) the content is broken, cut off, no image, has more than 67,108,864 pixels
            (WebP: 33,554,432) or than Pillow's `Image.MAX_IMAGE_PIXELS` (a decompression bomb), has grey values of no
            known range, or is no regular file or one of more than 256 MiB. Of a PNG all checksums are verified; other
            formats have none, so damage in them can pass as another picture.
        ValueError: image_size < 1, or channels neither 1 nor 3.
    """
    return _read(content, image_size, channels, name)


def read_images(
    names: Sequence[str],
    content: Callable[[str], bytes | bytearray | Path],
    image_size: int,
    channels: int,
    place: str,
    skip_broken: bool = False,
) -> Iterator[np.ndarray | None]:
    """Yields `read_image` of each name in turn, decoded in threads, at most CHUNK images ahead.

    Images of more than LARGE_PIXELS are decoded by one thread, one after the other: a second and a third at the same
    time could take a small machine's memory.

    Args:
        content: gives the bytes or the path behind a name.
        place: what stands before a name in messages.
        skip_broken: yield None for an image that cannot be read, else that is an error.
    """

    large_file = threading.Lock()
    large_images, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(THREADS)

    def read(name: str) -> np.ndarray | None:
        try:
            return _read(content(name), image_size, channels, place + name, large_file, large_images)
        except BrokenImageError:
            if not skip_broken:
                raise
            return None

    with large_images, pool:  # the second ends first, and may still want the other
        for start in range(0, len(names), CHUNK):
            yield from pool.map(read, names[start : start + CHUNK])


def _read(
    content: bytes | bytearray | Path,
    image_size: int,
    channels: int,
    name: str,
    large_file: AbstractContextManager[object] | None = None,
    large_images: Executor | None = None,
) -> np.ndarray:
    check_form(image_size, channels)
    try:
        with ExitStack() as held:
            if isinstance(content, Path):
                if _size(content) > LARGE and large_file is not None:
                    held.enter_context(large_file)
                content = content.read_bytes()
            check_png(content)
            image = held.enter_context(Image.open(BytesIO(content), formats=FORMATS))
            if _pixels(image) > LARGE_PIXELS and large_images is not None:
                pixels = large_images.submit(_decoded, image, image_size, channels).result()
            else:
                pixels = _decoded(image, image_size, channels)
    except (FileNotFoundError, PermissionError):
        raise
    except PILLOW_ERRORS as error:
        raise BrokenImageError(
            f"expected a readable image at {name}, got {error or type(error).__name__}; replace the file or take it out"
        ) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decoded(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """The centre square, scaled, as (H, W) or (H, W, 3)."""
    ImageOps.exif_transpose(image, in_place=True)
    _check_values(image)
    square = _eight_bits(_centre(image), channels)
    return np.asarray(square.resize((image_size, image_size), Image.Resampling.BILINEAR))


def _size(file: Path) -> int:
    stat = file.stat()
    regular = S_ISREG(stat.st_mode)  # a named pipe would wait, a device would never end
    require(regular and stat.st_size <= LARGEST, f"a file of at most {LARGEST:,} bytes", "another", "make it smaller")
    return stat.st_size


def _pixels(image: Image.Image) -> int:
    """How many an image has, before it is decoded.

    Pillow only warns up to twice its limit. Warning filters belong to all threads, so none is set here.
    """
    most = MOST_PIXELS_WEBP if image.format == "WEBP" else MOST_PIXELS
    pixels, limit = image.width * image.height, min(most, Image.MAX_IMAGE_PIXELS or most)
    if pixels > limit:
        raise Image.DecompressionBombError(f"{pixels:,} pixels, more than the {limit:,} that are read")
    return pixels


def _check_values(image: Image.Image) -> None:
    require(image.mode != "F", "whole numbers as pixels", "floats, of no known range", "save it with 8 bits")
    if image.mode == "I":  # 32 bits, Pillow's mode for 16-bit PGM and some TIFF
        low, high = cast(tuple[int, int], image.getextrema())
        require(low >= 0 and high <= 65535, "grey values from 0 to 65535", f"{low} to {high}", "save it with 8 bits")


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    if image.size == (side, side):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and not image.has_transparency_data:
        return image
    converted = Image.new(mode, image.size)
    for top in range(0, image.height, ROWS):
        rows = image.crop((0, top, image.width, min(top + ROWS, image.height)))
        converted.paste(_converted(rows, mode), (0, top))
    return converted


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # also "I;16" and its byte orders
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
