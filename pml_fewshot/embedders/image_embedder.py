"""ImageEmbedder: embeddings of photos, arrays and tensors of any size, as a scikit-learn transformer."""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError, check_at_least_one, check_finite
from pml_fewshot.data.images import THREADS, BrokenImageError, opened_image, work_ahead
from pml_fewshot.embedders.embedder import check_rows, images_at_a_time
from pml_fewshot.embedders.modes import evaluating, widened
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.environment import keep_memory

AHEAD_PIXELS = 2**22  # of images decoded ahead of the trunk, at most: 83 of 224 x 224, 12 MB
ORIENTATION = 0x0112  # EXIF's tag for how a camera was held

_moving = threading.Lock()


class ImageEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Embeds images of any size, from files or memory: a scikit-learn transformer that learns nothing.

    Images keep their size until the trunk's own preprocessing. While the trunk computes, threads decode the next
    images, only so far ahead that memory does not grow with their number. Several threads may call `transform` at once.

    Args:
        embedder: an Embedder, a trunk, or any callable from floats (B, C, H, W) in [0, 1] to (B, D). A module is used
            in eval mode, without autocast, and its own modes are restored afterwards.
        preprocessing: turns images into the trunk's input; when None, the embedder's own `preprocessing`.
        batch_size: images embedded at a time; when None, `images_at_a_time`. It affects results only by rounding.
        device: where to compute; a module is moved there and stays there. When None, where it is.
        progress: show a bar if it takes longer than three seconds.

    The `X` of `transform` is a list or other iterable of images, in any mix:

    - paths or PIL images, which are rotated as EXIF says;
    - NumPy arrays (H, W), (H, W, C) or, if that cannot be meant, (C, H, W), with 1, 3 or 4 channels: uint8, floats in
      [0, 1], or uint16 of (H, W);
    - torch tensors (H, W) or (C, H, W), uint8 or floats in [0, 1];

    or one array or tensor with 4 axes, or a single path or PIL image. JPEG files that are at least six times as large
    as the trunk's input are decoded at half their size or less (`read_photo`).

    Source: the figures behind the defaults are in experiments/speed/embed_photos.py.
    """

    def __init__(
        self,
        embedder: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        self.embedder = embedder
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.device = device
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> "ImageEmbedder":
        """Does nothing: there is nothing to learn."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def _n_features_out(self) -> int:
        """D, from a blank image; scikit-learn uses it to name the columns imageembedder0, imageembedder1, .."""
        return self._embedded([Image.new("RGB", (8, 8))], progress=False).shape[1]

    def transform(self, X: Any) -> np.ndarray:
        """Embeds images to (n, D) float32.

        Raises:
            MissingFileError: there is no such file.
            BrokenImageError: a file is not a readable image; the error names it.
            UsageError: no image, no known preprocessing, pixels in another form, or an embedding that is not finite.
        """
        return self._embedded(X, self.progress)

    def _embedded(self, X: Any, progress: bool) -> np.ndarray:
        embedder, items = self.embedder, as_items(X)
        preprocessing = self.preprocessing or getattr(embedder, "preprocessing", None)
        if not isinstance(preprocessing, Preprocessing):
            wanted = f"an embedder that says which images it takes, got {type(embedder).__name__}"
            do = "for 84 x 84 give preprocessing=Preprocessing(size=(84, 84), scale_to=84)"
            raise UsageError(f"expected {wanted}, which does not; {do}")
        modules = [embedder] if isinstance(embedder, nn.Module) else []
        if modules and self.device is not None:
            with _moving:
                modules[0].to(self.device)
        weights = (weight for module in modules for weight in module.parameters() if weight.is_floating_point())
        weight = next(weights, torch.empty((), device=self.device))
        size = self.batch_size
        if size is None:
            size = images_at_a_time(preprocessing.size[0] * preprocessing.size[1], weight.device)
        check_at_least_one("batch_size", size)
        keep_memory(weight.device)
        total = len(items) if isinstance(items, Sized) else None
        rows: list[np.ndarray] = []
        bar = tqdm(total=total, desc="embedding", unit="image", delay=3, mininterval=1, disable=not progress)
        with evaluating(*modules), closing(prepared(items, preprocessing)) as images, bar:
            while batch := list(islice(images, size)):
                floats = torch.from_numpy(np.stack(batch)).to(weight.device).float().div_(255).to(weight.dtype)
                part = check_rows(embedder(floats), modules[0] if modules else nn.Identity())
                rows.append(widened(part).float().cpu().numpy())
                bar.update(len(batch))
        if not rows:
            raise UsageError("expected at least one image, got none; look into the list or folder")
        embeddings = np.concatenate(rows)
        check_finite(torch.from_numpy(embeddings), "embeddings")
        return embeddings


def as_items(X: Any) -> Iterable[Any]:
    """The images in X (see ImageEmbedder), each still in a form that `read_photo` accepts."""
    if isinstance(X, str | os.PathLike | Image.Image):
        return [X]
    if isinstance(X, np.ndarray | Tensor) and X.ndim != 4 and not (isinstance(X, np.ndarray) and X.ndim == 1):
        do = "put a single image into a list"
        raise UsageError(f"expected an array of 4 axes, images first, got shape {tuple(X.shape)}; {do}")
    if not isinstance(X, Iterable):
        raise UsageTypeError(f"expected a list of images, got {X!r}; give paths, PIL images, arrays or tensors")
    return X


def prepared(items: Iterable[Any], preprocessing: Preprocessing) -> Generator[np.ndarray, None, None]:
    """Yields each image as the trunk's input, (C, H, W) uint8, in order; threads decode a limited number ahead."""
    side = max(preprocessing.scale_to) if isinstance(preprocessing.scale_to, tuple) else preprocessing.scale_to

    def prepare(item: Any) -> np.ndarray:
        return preprocessing(read_photo(item, side))

    if isinstance(items, Sized) and len(items) == 1:  # as in a web service: no threads to start
        yield from map(prepare, items)
        return
    most = max(2 * THREADS, AHEAD_PIXELS // (preprocessing.size[0] * preprocessing.size[1]))
    yield from work_ahead(prepare, items, most)


def read_photo(item: Any, side: int | None = None) -> Image.Image:
    """Any image that ImageEmbedder accepts, as an upright, loaded PIL image of its own size and mode.

    Args:
        item: a path, or an object with its `read_bytes`, such as a zipfile.Path; a PIL image, array or tensor.
        side: length in pixels to which it will be scaled. A JPEG file at least six times as large is then decoded at
            1/2, 1/4 or 1/8 of its size, so that its shorter side stays at least three times as long: 12 MP to 256 takes
            70 ms instead of 170. The scaled pixels differ by 0.2 of 255 on average; an EfficientNet-Lite0 embedding
            changes by 1e-5 to 8e-4 (1 - cosine), less than if the photo is saved at JPEG quality 80 instead of 90.

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: it is not a readable image.
        UsageError: an array of another shape or type, or floats outside [0, 1].
    """
    if isinstance(item, Image.Image):
        return _loaded(item)
    if isinstance(item, np.ndarray | Tensor):
        return Image.fromarray(_pixels(item))
    if isinstance(item, str | os.PathLike):
        item = Path(item)
        if not item.is_file():
            got = "a folder" if item.is_dir() else "no such file"
            raise MissingFileError(f"expected an image at {item}, got {got}; give the path of each file")
    elif not hasattr(item, "read_bytes"):
        do = "give a path, PIL image, array or tensor"
        raise UsageTypeError(f"expected an image, got {type(item).__name__}; {do}")
    with opened_image(item.read_bytes(), str(item), None if side is None else 3 * side) as image:
        image.load()
        return image


def _loaded(image: Image.Image) -> Image.Image:
    """A PIL image, loaded and upright; one opened from a broken file raises a BrokenImageError."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers can raise anything on broken content
        where = getattr(image, "filename", "") or "a PIL image"
        raise BrokenImageError(f"expected a readable image, got {error} in {where}; replace or leave it") from error
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def _pixels(given: np.ndarray | Tensor) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4) uint8, or (H, W) uint16, from an array or tensor."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        pixels = (given.float() if given.is_floating_point() else given).numpy()
        channels_first = pixels.ndim == 3
    else:
        pixels = given
        channels_first = pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4)
    if channels_first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)) or not pixels.size:
        kind = "a tensor (H, W) or (C, H, W)" if isinstance(given, Tensor) else "an array (H, W) or (H, W, C)"
        got = f"shape {tuple(given.shape)}"
        raise UsageError(f"expected {kind} with 1, 3 or 4 channels, got {got}; change the order of its axes")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            do = "divide by 255, clip, or give the image before it is normalized"
            raise UsageError(f"expected floats in [0, 1], got {low:.4g} to {high:.4g}; {do}")
        return (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8 and not (pixels.dtype == np.uint16 and pixels.ndim == 2):
        do = "convert them with .astype('uint8')" if isinstance(given, np.ndarray) else "convert them with .byte()"
        raise UsageTypeError(f"expected pixels as uint8 or floats in [0, 1], got {given.dtype}; {do}")
    return np.ascontiguousarray(pixels)
