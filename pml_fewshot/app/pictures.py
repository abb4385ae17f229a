"""Pictures as they are stored, and the embedder that reads them."""

import threading
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pml_fewshot.app.drawings import InkPreprocessing, glyph_embedder
from pml_fewshot.classify.trunks import trunk_of
from pml_fewshot.data.images import BrokenImageError, opened_image, to_8_bits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.io.tensors import checksum_of

MOST_PIXELS = 50_000_000
SIDE = 512  # of a stored picture, at most; twice the embedder's if that is more
SMALL_PNG = 100_000  # bytes up to which a picture is stored losslessly; drawings have 10,000, photos 400,000
GRAY = ("1", "L", "LA", "I", "I;16", "F")


class Picture(NamedTuple):
    """A stored image file, which is shown, saved and embedded, so that saving changes no embedding."""

    content: bytes
    suffix: str  # ".png" or ".jpg"

    def read_bytes(self) -> bytes:  # so that ImageEmbedder reads it like a file
        return self.content

    @property
    def media_type(self) -> str:
        return "image/png" if self.suffix == ".png" else "image/jpeg"


class PictureEmbedder:
    """Turns uploads into pictures, and embeds pictures one at a time, so that the embedding is always the same.

    Args:
        name: its name on the page.
        embedder: the network.
    """

    def __init__(self, name: str, embedder: ImageEmbedder) -> None:
        self.name, self.embedder = name, embedder
        network: Any = embedder.embedder
        form: Preprocessing = embedder.preprocessing or network.preprocessing
        self.reads_ink = isinstance(form, InkPreprocessing)
        longer = max(form.scale_to) if isinstance(form.scale_to, tuple) else form.scale_to
        self.side = SIDE if self.reads_ink else max(SIDE, 2 * longer)
        weights = {key: value.detach().cpu() for key, value in network.state_dict().items()}
        self.fingerprint = f"{checksum_of(weights)} {form!r}"
        self._decoding = threading.Lock()
        self._lock = threading.Lock()  # two threads sharing the cores would take longer than one after the other

    @classmethod
    def of(cls, text: str, checkpoint: Path | None = None, image_size: int | None = None) -> "PictureEmbedder":
        """From "glyphs", "timm/NAME", "torchvision/NAME" or the folder of a run; see `classify.trunks.trunk_of`."""
        if text == "glyphs" and checkpoint is None and image_size is None:
            return cls(text, glyph_embedder())
        trunk = trunk_of(text, checkpoint, image_size)
        if isinstance(trunk, ImageEmbedder):
            trunk.progress = False
            return cls(text, trunk)
        return cls(text, ImageEmbedder(Embedder(trunk, normalize=True).eval(), progress=False))

    def picture(self, content: bytes, name: str) -> Picture:
        """The stored form of an uploaded file: upright, 8 bits, no larger than needed.

        Raises:
            BrokenImageError: it is not an image, is broken, or has too many pixels.
        """
        try:
            # one at a time: 50 million pixels are 0.2 GB, and there may be 40 threads
            with self._decoding, opened_image(content, name, at_least=self.side) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
                image.load()
                if image.mode in ("L", "LA", "RGB", "RGBA"):
                    image.thumbnail((self.side, self.side))  # before it is copied
                plain = to_8_bits(image, "L" if image.mode in GRAY else "RGB")
        except BrokenImageError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                got = "a file of another kind" if content else "an empty file"
                raise BrokenImageError(f"expected an image, got {got}: {name}; choose a JPEG, PNG or WebP") from error
            raise
        plain.thumbnail((self.side, self.side))
        return encoded(plain)

    def __call__(self, picture: Picture) -> np.ndarray:
        """(D,) float32; the glyph embedder raises a NoInkError if nothing is drawn."""
        with self._lock:
            return self.embedder.transform([picture])[0]


def encoded(image: Image.Image) -> Picture:
    """The image as PNG if that is small, otherwise as JPEG."""
    file = BytesIO()
    image.save(file, "PNG")
    if file.tell() <= SMALL_PNG:
        return Picture(file.getvalue(), ".png")
    file = BytesIO()
    image.save(file, "JPEG", quality=92)
    return Picture(file.getvalue(), ".jpg")
