"""Preprocessing: from an image of any size to the pixels that a trunk was trained on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.data.images import to_8_bits

Resampling = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """How images of any size become a trunk's input; normalization by mean and deviation is the trunk's own first step.

    The pixels are those of torchvision's Resize and CenterCrop on a PIL image, which timm uses too, up to rounding.

    Args:
        size: (H, W) in pixels of the center crop that is kept.
        scale_to: length to which the shorter side is scaled first, keeping the aspect ratio; or (H, W), to which the
            image is stretched. At least `size`, as nothing is padded.
        resampling: how it is scaled; shrinking averages over the area, as in Pillow.
        channels: 3 (RGB; gray images become colors) or 1 (gray).

    Raises:
        UsageError: another resampling or number of channels, or sizes that are invalid or do not fit.
    """

    size: tuple[int, int]
    scale_to: int | tuple[int, int]
    resampling: Resampling = "bilinear"
    channels: int = 3

    def __post_init__(self) -> None:
        check_choice("resampling", self.resampling, ("nearest", "bilinear", "bicubic", "lanczos"))
        if self.channels not in (1, 3):
            raise UsageError(f"expected channels 3 (RGB) or 1 (gray), got {self.channels!r}; choose one of them")
        scale_to = self.scale_to if isinstance(self.scale_to, tuple | list) else (self.scale_to,) * 2
        for name, sides in (("size", self.size), ("scale_to", scale_to)):
            if not isinstance(sides, tuple | list) or len(sides) != 2:
                raise UsageError(f"expected {name} as (height, width), got {sides!r}; give two numbers")
            for side in sides:
                check_at_least_one(name, side)
        if self.size[0] > scale_to[0] or self.size[1] > scale_to[1]:
            got = f"size={self.size} of scale_to={self.scale_to}"
            raise UsageError(f"expected a part of the scaled image to be kept, got {got}; scale to more or keep less")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An upright image of any mode and size -> (channels, H, W) uint8.

        16-bit gray, palettes, CMYK and transparency become 8 bits as everywhere else (`data.images.read_image`).
        """
        if not min(image.size):
            raise UsageError(f"expected an image with pixels, got {image.height} x {image.width}; leave it out")
        image = to_8_bits(image, "L" if self.channels == 1 else "RGB")
        if isinstance(self.scale_to, int):
            shorter = min(image.size)
            full = [int(self.scale_to * side / shorter) for side in (image.height, image.width)]
        else:
            full = list(self.scale_to)
        top, left = (round((side - kept) / 2) for side, kept in zip(full, self.size, strict=True))
        bottom, right = top + self.size[0], left + self.size[1]
        resampling = Image.Resampling[self.resampling.upper()]
        if max(full) <= 16 * min(full):
            image = image.resize((full[1], full[0]), resampling).crop((left, top, right, bottom))
        else:  # a strip of 1 x 65,000 would become one of 256 x 16 million, for the few pixels in its middle
            y, x = image.height / full[0], image.width / full[1]
            box = (left * x, top * y, min(image.width, right * x), min(image.height, bottom * y))
            image = image.resize((self.size[1], self.size[0]), resampling, box)
        kept = np.asarray(image)
        return np.ascontiguousarray(kept[None] if self.channels == 1 else kept.transpose(2, 0, 1))
