"""Image files: finding them in a folder or zip (open_images), and decoding them to (C, H, W) uint8 (read_images)."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pml_fewshot.checks import UsageError, check_at_least_one

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of these suffixes; Pillow's EPS starts a program
THREADS = 4  # Pillow decodes outside of Python's lock: photos keep several cores busy ...
THREADED_BYTES = 2**13  # ... but for Omniglot's 200-byte files waiting for the lock takes twice as long as all else
CHUNK = 256  # images decoded ahead at most: 5 MB at 84 x 84

Read = Callable[[str], bytes]  # gives the content of the image of that name


class BrokenImageError(UsageError):
    """A file that cannot be read as an image; loaders that skip broken images skip on this error only."""


@contextmanager
def open_images(path: Path) -> Iterator[tuple[list[str], Read]]:
    """Yields the sorted names of all images below a folder or in a zip, with "/", and a function that reads one.

    Hidden files and folders are ignored, links to folders followed. A zip is never unpacked; what zipfile finds wrong
    with it, also when an image is read, is a UsageError.
    """
    if path.is_dir():
        walk = os.walk(path, followlinks=True)
        files = (Path(parent, name).relative_to(path).as_posix() for parent, _, names in walk for name in names)
        yield _images(files), lambda name: (path / name).read_bytes()
        return
    with _named_if_broken(path):
        archive = zipfile.ZipFile(path)

    def read(name: str) -> bytes:
        with _named_if_broken(path):
            return archive.read(name)  # which verifies checksums

    with archive:
        yield _images(archive.namelist()), read


@contextmanager
def _named_if_broken(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # on a broken zip zipfile raises whatever its code happens to meet
        got = f"a broken one ({str(error) or type(error).__name__})"
        raise UsageError(f"expected a whole zip file at {path}, got {got}; delete it and fetch it again") from error


def _images(names: Iterable[str]) -> list[str]:
    visible = (name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    return sorted(name for name in visible if name.lower().endswith(IMAGE_SUFFIXES))


def read_images(
    names: Sequence[str],
    read: Read,
    image_size: int,
    channels: int,
    path: Path,
    skip_broken: bool = False,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Iterator[np.ndarray | None]:
    """Yields `read_image` of each name in turn; with skip_broken, None for a broken one. Large files in threads."""

    def decode(name: str) -> np.ndarray | None:
        try:
            return read_image(read(name), image_size, channels, f"{path}/{name}", resampling)
        except BrokenImageError:
            if not skip_broken:
                raise
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        in_threads = bool(names) and len(read(names[0])) >= THREADED_BYTES
        for start in range(0, len(names), CHUNK):
            yield from (pool.map if in_threads else map)(decode, names[start : start + CHUNK])


def read_image(
    content: bytes,
    image_size: int,
    channels: int,
    name: str,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Decodes an image file's content, upright, its center square scaled: (channels, image_size, image_size) uint8.

    Every mode becomes 8 bits: palettes are looked up, CMYK converted, 16-bit gray divided by 257 (65,535 becomes 255;
    Pillow alone would clip it), transparent parts laid on white. Of an animation the first frame is taken.

    Args:
        image_size: an image of that height and width passes unchanged. Others are scaled as by torchvision's Resize:
            bilinear, averaged over the covered area where they shrink.
        channels: 3 (RGB) or 1 (gray; of colors the luma).
        name: what to call the file in messages.

    Raises:
        BrokenImageError: the content is broken, cut off, no image, has gray values of no known range, or too many
            pixels for Pillow (179 million, twice its `Image.MAX_IMAGE_PIXELS`).
    """
    check_at_least_one("image_size", image_size)
    if channels not in (1, 3):
        raise UsageError(f"expected channels 3 (RGB) or 1 (gray), got {channels!r}; choose one of them")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = _to_8_bits(image.crop((left, top, left + side, top + side)), "L" if channels == 1 else "RGB")
            pixels = np.asarray(square.resize((image_size, image_size), resampling))
    except MemoryError:
        raise
    except Exception as error:  # on broken content Pillow's readers raise whatever their code happens to meet
        got = error or type(error).__name__
        raise BrokenImageError(
            f"expected a readable image at {name}, got {got}; replace the file or take it out"
        ) from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode[0] in "IF":  # 16-bit gray is "I;16" or, from PGM and some TIFF, "I", which like "F" has 32 bits
        gray = np.asarray(image)
        if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError("gray values of no known range; save it with 8 or 16 bits")
        return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
