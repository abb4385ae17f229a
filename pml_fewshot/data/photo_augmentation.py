"""The photo augmentations that most papers train with, for whole batches, with separate random amounts per image.

They are torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter for batches: `draw` returns the amounts
for each image, from the same distributions, and `apply` returns what torchvision returns for them. All are drawn on the
generator's device, so a CPU generator gives the same ones on every device, and nothing waits for a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.data.augmentation import check_images
from pml_fewshot.embedders.modes import no_autocast, widened

TRIES = 10  # as in torchvision, to find a crop that fits


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crops a random part of each image and resizes it to `size`, bilinearly and with antialiasing.

    Args:
        size: size of the result, (height, width), or one number for both.
        scale: bounds of the crop's share of the area.
        ratio: bounds of its aspect ratio (width / height), drawn on a logarithmic scale.

    Source: torchvision.transforms.v2.RandomResizedCrop; Szegedy et al. 2015, section 6.
    """

    size: int | Sequence[int]
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if isinstance(self.size, Sequence) and len(self.size) != 2:
            raise UsageError(f"expected size as one number or (height, width), got {self.size!r}; give two numbers")
        for length in self._height_width():
            check_at_least_one("size", length)
        _check_bounds("scale", self.scale, 0, 1)
        _check_bounds("ratio", self.ratio, 1e-3, 1e3)

    def _height_width(self) -> tuple[int, int]:
        height, width = self.size if isinstance(self.size, Sequence) else (self.size, self.size)
        return height, width

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns (B, C, *size) for images (B, C, H, W)."""
        images = _checked(images)
        return self.apply(images, self.draw(images, generator))

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draws where to crop: top, left, height and width (B, 4) in pixels, int64."""
        height, width = images.shape[2:]
        uniform = _uniform((len(images), 2 * TRIES + 2), generator)
        area = height * width * _between(self.scale, uniform[:, :TRIES])
        ratio = _between([math.log(bound) for bound in self.ratio], uniform[:, TRIES : 2 * TRIES]).exp()
        sizes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=2)  # (B, TRIES, 2)
        limits = sizes.new_tensor([height, width])  # the image's size
        fits = ((sizes > 0) & (sizes <= limits)).all(dim=2)
        first = fits.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, 2)
        size = sizes.gather(dim=1, index=first).squeeze(1)
        corner = (uniform[:, -2:] * (limits - size + 1)).floor()
        # where none of them fits, the largest center crop with a ratio within the bounds
        middle = limits.minimum(limits.new_tensor([round(width / self.ratio[0]), round(height * self.ratio[1])]))
        found = fits.any(dim=1, keepdim=True)
        size = torch.where(found, size, middle)
        corner = torch.where(found, corner, ((limits - middle) / 2).floor())
        return torch.cat([corner, size], dim=1).long()

    def apply(self, images: Tensor, crops: Tensor) -> Tensor:
        """Returns the crops (B, 4) of the images, resized.

        Resizing is two matrix products, and the crop is part of the matrices: there is no loop over images.
        """
        top, left, height, width = crops.to(images.device, non_blocking=True).unbind(dim=1)
        rows, columns = self._height_width()
        down = _resizing(top, height, images.shape[2], rows, images.dtype)
        across = _resizing(left, width, images.shape[3], columns, images.dtype)
        with no_autocast():  # bfloat16 has 8 bits, as few as a pixel
            resized = (images.flatten(1, 2) @ across.mT).unflatten(1, images.shape[1:3])
            return down.unsqueeze(1) @ resized


def _resizing(start: Tensor, length: Tensor, before: int, after: int, dtype: torch.dtype) -> Tensor:
    """Returns matrices (B, after, before) that resize `length` (B,) pixels of each image from `start` (B,) on one axis.

    Each new pixel is a mean of the old ones around its place, weighted by a triangle that is as wide as the new pixel,
    or as an old one where these are wider.

    Source: torch's `_upsample_bilinear2d_aa`, which is Pillow's.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    step = length.to(dtype) / after  # of new pixels, in old ones
    place = (torch.arange(after, device=start.device).view(1, -1, 1) + 0.5) * step  # from the start of the crop
    old = torch.arange(before, device=start.device).view(1, 1, -1) - start
    weights = (1 - (old + 0.5 - place).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((old >= 0) & (old < length))
    return weights / weights.sum(dim=2, keepdim=True)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirrors each image left to right with probability p.

    Raises:
        UsageError: p outside 0 to 1.

    Source: torchvision.transforms.v2.RandomHorizontalFlip.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UsageError(f"expected p from 0 to 1, got {self.p}; give a fraction of the images")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images of the same shape (B, C, H, W)."""
        images = _checked(images)
        return self.apply(images, self.draw(images, generator))

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draws which images are mirrored: bools (B,)."""
        return _uniform((len(images),), generator) < self.p

    def apply(self, images: Tensor, mirrored: Tensor) -> Tensor:
        return torch.where(mirrored.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(3), images)


@dataclass(frozen=True)
class ColorJitter:
    """Changes each image's brightness, contrast, saturation and hue, in a random order, by random amounts.

    Args:
        brightness: the factor is uniform in 1 +- brightness (at least 0), or between the two numbers given.
        contrast: likewise; a factor of 0 turns the whole image its mean gray.
        saturation: likewise; a factor of 0 turns an image gray. Gray images (C = 1) are unchanged.
        hue: the shift is uniform in +- hue (at most 0.5, which is the opposite color), or between the two numbers
            given. Gray images are unchanged.

    Source: torchvision.transforms.v2.ColorJitter.
    """

    brightness: float | Sequence[float] = 0.0
    contrast: float | Sequence[float] = 0.0
    saturation: float | Sequence[float] = 0.0
    hue: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check_bounds(name, self._bounds(name), 0, math.inf)
        _check_bounds("hue", self._bounds("hue"), -0.5, 0.5)

    def _bounds(self, name: str) -> Sequence[float]:
        given = getattr(self, name)
        if isinstance(given, Sequence):
            return given
        if not given >= 0:
            raise UsageError(f"expected {name} >= 0, got {given!r}; both signs are drawn anyway")
        return (-given, given) if name == "hue" else (max(0.0, 1 - given), 1 + given)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images of the same shape (B, C, H, W), C = 1 or 3."""
        images = _checked(images)
        if images.shape[1] not in (1, 3):
            raise UsageError(f"expected images of 1 or 3 channels, got {images.shape[1]}; give gray or RGB images")
        return self.apply(images, *self.draw(images, generator))

    def draw(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws the order of the CHANGES, as their numbers (B, 4) int64, and the amount of each, (B, 4) float64."""
        uniform = _uniform((len(images), 2 * len(CHANGES)), generator)
        bounds = [self._bounds(name) for name in CHANGES]
        amounts = [_between(bound, uniform[:, number]) for number, bound in enumerate(bounds)]
        return uniform[:, len(CHANGES) :].argsort(dim=1), torch.stack(amounts, dim=1)

    def apply(self, images: Tensor, orders: Tensor, amounts: Tensor) -> Tensor:
        """Changes the images by these amounts in these orders: at each place, all with the same change together."""
        places = orders.argsort(dim=0).T.to(images.device, non_blocking=True)  # (4, B) images, those of change 0 first
        counts = F.one_hot(orders, len(CHANGES)).sum(dim=0).tolist()  # of images, for each place and change
        amounts = amounts.to(images.device, images.dtype, non_blocking=True)
        wanted = {name for name in CHANGES if set(self._bounds(name)) != {0.0 if name == "hue" else 1.0}}
        images = images.clone()
        for place, lengths in zip(places, counts, strict=True):
            for number, (group, (name, change)) in enumerate(zip(place.split(lengths), CHANGES.items(), strict=True)):
                if name in wanted and len(group):
                    images[group] = change(images[group], amounts[group, number].view(-1, 1, 1, 1))
        return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images).mean(dim=(2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images), factor) if images.shape[1] == 3 else images


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue h on a circle of length 6; a channel is V - S V clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6."""
    if images.shape[1] == 1:
        return images
    lowest, highest = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    spread = highest - lowest
    red, green, blue = images.split(1, dim=1)
    not_red = torch.where(green == highest, blue - red + 2 * spread, red - green + 4 * spread)
    hue = torch.where(red == highest, green - blue, not_red) / torch.where(spread > 0, spread, 1)
    first = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)  # n of red, green and blue: 5, 3, 1
    k = ((hue + first) / 6 + (1 + shift)).frac_() * 6  # positive values need no remainder_, which is slower
    return highest - spread * torch.minimum(k, 4 - k).clamp_(0, 1)


# numbered as in torchvision
CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _gray(images: Tensor) -> Tensor:
    """Returns (B, 1, H, W), with red, green and blue weighted as in torchvision."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(other, images, share).clamp_(0, 1)


def _checked(images: Tensor) -> Tensor:
    """Checks the images and returns them in at least float32."""
    check_images(images)
    return widened(images)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws from [0, 1) as doubles: a float32 drawn below 1 may be a pixel too far once it is multiplied."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _between(bounds: Sequence[float], uniform: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _check_bounds(name: str, bounds: Sequence[float], least: float, most: float) -> None:
    """Raises a UsageError unless bounds are two numbers within these, the lower one first."""
    if len(bounds) != 2 or not least <= bounds[0] <= bounds[1] <= most:
        raise UsageError(f"expected {name} as two numbers from {least} to {most}, got {bounds!r}; give (low, high)")
