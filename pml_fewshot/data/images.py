"""Image files: finding them in a folder or zip (open_images), and decoding them to (C, H, W) pixels (read_images)."""

import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, features

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice

# The usual ones of Pillow's formats: its EPS reader starts a program
HAS_AVIF = "avif" in features.modules and bool(features.check("avif"))  # Pillow 11.3, if built with it
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", *(["AVIF"] if HAS_AVIF else []))
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".pnm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
IGNORED = ("thumbs.db", "desktop.ini", "__macosx")  # what systems put next to images, like their hidden files
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the GIL: photos keep all cores busy ...
THREADED_BYTES = 2**13  # ... but for Omniglot's 200-byte files, waiting for the GIL takes twice as long as all else
AHEAD = 64  # images decoded ahead at most: 1.4 MB at 84 x 84

Read = Callable[[str], bytes]  # returns the content of a named image
Size = int | Sequence[int]  # height and width, or one number for both
Resize = Literal["crop", "pad", "stretch"]
Resampling = Image.Resampling
T = TypeVar("T")
R = TypeVar("R")


class BrokenImageError(UsageError):
    """A file that cannot be read as an image; loaders that skip broken images skip only on this error."""


class Form(NamedTuple):
    """The target format of images: one size, number of channels and bit depth for all."""

    height: int
    width: int
    channels: int
    resize: Resize = "crop"
    depth: int = 8

    @classmethod
    def of(cls, image_size: Size, channels: int = 3, resize: Resize = "crop", depth: int = 8) -> "Form":
        """Builds a Form; raises a UsageError that names an invalid argument."""
        sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(sides) != 2:
            raise UsageError(f"expected image_size as one number or (height, width), got {image_size!r}; give two")
        for side in sides:
            check_at_least_one("image_size", side)
        if not isinstance(channels, Integral) or channels not in (1, 3):
            raise UsageError(f"expected channels 3 (RGB) or 1 (gray), got {channels!r}; choose one of them")
        check_choice("resize", resize, ("crop", "pad", "stretch"))
        if not isinstance(depth, Integral) or depth not in (8, 16) or (depth == 16 and channels == 3):
            got = f"{depth!r} with {channels} channels"
            raise UsageError(f"expected depth 8, or 16 of gray images (channels=1), got {got}; choose one of them")
        return cls(int(sides[0]), int(sides[1]), int(channels), resize, int(depth))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.depth == 16 else np.uint8


class ImageFiles(NamedTuple):
    """The files of a folder or zip."""

    path: Path
    names: list[str]  # of images, sorted, with "/"
    others: list[str]  # of files with other extensions, and of folders, which end with "/"
    read: Read
    repeated: int = 0  # entries of a zip that a later one of the same name replaces

    @property
    def files(self) -> list[Path]:
        """The files the images are read from: the zip, or each file."""
        return [self.path] if self.path.is_file() else [self.path / name for name in self.names]


@contextmanager
def open_images(path: Path) -> Iterator[ImageFiles]:
    """Yields the names of all files below a folder or in a zip, images separately, and a function that reads one.

    Hidden files and folders are ignored, links to folders are followed. A zip is never unpacked; any error that zipfile
    finds in it, also while an image is read, is raised as a UsageError.
    """
    if path.is_dir():
        yield ImageFiles(path, *_images(_walk(path)), lambda name: (path / name).read_bytes())
        return
    if path.suffix.lower() != ".zip" and path.is_file() and not zipfile.is_zipfile(path):
        raise UsageError(f"expected a folder or a zip at {path}, got another file; name the folder of the classes")
    with _named_if_broken(path):
        archive = zipfile.ZipFile(path)

    def read(name: str) -> bytes:
        with _named_if_broken(path):
            return archive.read(entry[name])  # which verifies checksums

    with archive:
        # some tools write "./a.png" or backslashes
        entry = {name.replace("\\", "/").removeprefix("./"): name for name in archive.namelist()}
        yield ImageFiles(path, *_images(entry), read, len(archive.namelist()) - len(entry))


def _walk(root: Path) -> Iterator[str]:
    """Yields files and folders below a folder, following links except those that lead to a folder above themselves."""

    def fail(error: OSError) -> None:  # a folder that cannot be listed must not vanish
        raise error

    for parent, folders, files in os.walk(root, followlinks=True, onerror=fail):
        place = Path(parent)
        links = [name for name in folders if (place / name).is_symlink()]
        for name in links:
            if place.resolve().is_relative_to((place / name).resolve()):
                folders.remove(name)
        yield from ((place / name).relative_to(root).as_posix() for name in files)
        yield from ((place / name).relative_to(root).as_posix() + "/" for name in folders)


@contextmanager
def _named_if_broken(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile raises all kinds of errors on a broken zip
        got = f"a broken one ({str(error) or type(error).__name__})"
        raise UsageError(f"expected a whole zip file at {path}, got {got}; delete it and fetch it again") from error


def _images(names: Iterable[str]) -> tuple[list[str], list[str]]:
    images: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        if not any(part.startswith(".") or part.lower() in IGNORED for part in name.split("/")):
            (images if name.lower().endswith(IMAGE_SUFFIXES) else others).append(name)
    return images, others


def read_images(
    names: Sequence[str],
    read: Read,
    form: Form,
    path: Path,
    skip_broken: bool = False,
    resampling: Resampling = Resampling.BILINEAR,
) -> Iterator[np.ndarray | None]:
    """Yields `read_image` of each name in turn; with skip_broken, None for a broken one. Large files use threads."""

    def decode(name: str) -> np.ndarray | None:
        try:
            return read_image(read(name), form, f"{path}/{name}", resampling)
        except (BrokenImageError, FileNotFoundError):  # the latter for a dangling link
            if not skip_broken:
                raise
            return None

    in_threads = False
    with suppress(OSError):  # decoding will raise it again
        in_threads = bool(names) and len(read(names[0])) >= THREADED_BYTES
    if not in_threads:
        yield from map(decode, names)
        return
    yield from work_ahead(decode, names, AHEAD)


def work_ahead(function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """Yields the result for each item in order; threads compute at most so many ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) == most:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # an error, or the caller stops early
            pool.shutdown(cancel_futures=True)


def read_image(content: bytes, form: Form, name: str, resampling: Resampling = Resampling.BILINEAR) -> np.ndarray:
    """Decodes an image file's content, upright, to the given form: (C, H, W) uint8, or uint16 for depth 16.

    For depth 8, every mode becomes 8 bits: palettes are looked up, CMYK is converted, 16-bit gray divided by 257
    (65,535 becomes 255; Pillow alone would clip it), and transparent parts are put on white. The first frame of an
    animation is used. An image of the right size passes unchanged; others are scaled as described in `fit_image`.

    Args:
        name: the file's name in messages.

    Raises:
        BrokenImageError: the content is broken, truncated or not an image, has gray values of unknown range, or too
            many pixels for Pillow (179 million, twice its `Image.MAX_IMAGE_PIXELS`).
    """
    with opened_image(content, name) as image:
        return fit_image(image, form, resampling)


@contextmanager
def opened_image(content: bytes, name: str, at_least: int | None = None) -> Iterator[Image.Image]:
    """Yields the image in a file's content, upright; any error within is a BrokenImageError, as in `read_image`.

    Args:
        at_least: pixels that both sides need; a JPEG with twice as many or more is decoded at 1/2, 1/4 or 1/8 of its
            size, which is faster. (The frequencies of each block that the smaller image cannot hold are left out.)
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # has no effect on other formats
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors on broken content
        got = error or type(error).__name__
        raise BrokenImageError(
            f"expected a readable image at {name}, got {got}; replace the file or take it out"
        ) from error


def fit_image(image: Image.Image, form: Form, resampling: Resampling = Resampling.BILINEAR) -> np.ndarray:
    """Scales an image to (C, H, W) like torchvision's Resize: bilinear, averaged over the area where it shrinks.

    "crop" takes the largest central part with the right aspect ratio, "pad" puts the whole image on black, "stretch"
    scales each side independently.
    """
    size = form.width, form.height
    if form.resize == "crop":
        width = min(image.width, round(image.height * form.width / form.height))
        height = min(image.height, round(image.width * form.height / form.width))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + max(1, width), top + max(1, height)))
    elif form.resize == "pad":
        scale = min(form.width / image.width, form.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    gray = _gray_16(image) if form.depth == 16 else None
    if gray is None:
        image = to_8_bits(image, "L" if form.channels == 1 else "RGB").resize(size, resampling)
        pixels = np.asarray(image)
    else:  # Pillow scales 32-bit floats, which hold 16 bits exactly
        scaled = np.asarray(Image.fromarray(gray.astype(np.float32)).resize(size, resampling))
        pixels = scaled.round().clip(0, 65535).astype(np.uint16)
    pixels = pixels[None] if form.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if form.resize == "pad" and pixels.shape[1:] != (form.height, form.width):
        padded = np.zeros(form.shape, form.dtype)
        top, left = (form.height - size[1]) // 2, (form.width - size[0]) // 2
        padded[:, top : top + size[1], left : left + size[0]] = pixels
        return padded
    return pixels


def _gray_16(image: Image.Image) -> np.ndarray:
    """Returns gray values (H, W) up to 65,535; 8-bit values are scaled to that range."""
    if image.mode[0] not in "IF":
        return np.asarray(to_8_bits(image, "L")).astype(np.uint16) * 257
    # 16-bit gray is "I;16" or, from PGM and some TIFF, "I", which like "F" has 32 bits
    gray = np.asarray(image)
    if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
        raise ValueError("gray values of no known range; save it with 8 or 16 bits")
    return gray


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Converts an image of any mode to "RGB" or "L", as described in `read_image`."""
    if image.mode[0] in "IF":
        return Image.fromarray(((_gray_16(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
