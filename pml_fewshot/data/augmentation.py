"""Augmentation of training images, as the streams accept it (as_augmentation), drawn separately for each image.

An augmentation is `augment(images (B, C, H, W), generator) -> images`, floats in [0, 1], one call per batch.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.modes import no_autocast
from pml_fewshot.sampling.randomness import restored, seed_quickly

BatchAugmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
Augmentation: TypeAlias = Callable[..., Any] | Sequence[Any]  # what as_augmentation accepts


def as_augmentation(augment: Augmentation | None) -> BatchAugmentation | None:
    """Converts a user's `augment` argument to one augmentation of batches.

    Args:
        augment: `augment(images, generator)`, which is returned unchanged; a torchvision transform or any function of
            one image, which becomes a PerImage; a list of these, which are applied in turn; None for none.

    Raises:
        UsageError: a transform that normalizes; anything else, including a class (UsageTypeError).
    """
    if augment is None:
        return None
    if isinstance(augment, list | tuple):
        steps = [as_augmentation(each) for each in augment]
        return InTurn(tuple(step for step in steps if step is not None))
    wanted = "augment(images, generator), a transform of one image, or a list of them"
    if isinstance(augment, type) or isinstance(getattr(augment, "func", None), type) or not callable(augment):
        raise UsageTypeError(f"expected {wanted}, got {augment!r}; give an object, like RandomAffine()")
    if _is_torchvisions(augment):
        if any(type(step).__name__ == "Normalize" for step in _steps(augment)):
            do = "put it into the network, for what is evaluated is not augmented"
            raise UsageError(f"expected an augmentation without Normalize, got {shown(augment)}; {do}")
        return PerImage(augment)  # its `forward(*inputs)` does not tell
    try:
        parameters = inspect.signature(augment.forward if isinstance(augment, nn.Module) else augment).parameters
    except ValueError as error:  # implemented in C
        raise UsageTypeError(
            f"expected {wanted}, got {augment!r}; give PerImage(..) of what takes one image"
        ) from error
    kinds = inspect.Parameter
    if any(each.kind is kinds.VAR_POSITIONAL for each in parameters.values()):
        return augment
    taken = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if len(taken) > 1 and (taken[1].default is kinds.empty or taken[1].name == "generator"):
        return augment
    return PerImage(augment)


def _is_torchvisions(transform: object) -> bool:
    return any(kind.__module__.startswith("torchvision.") for kind in type(transform).__mro__)


def _steps(transform: Any) -> Iterator[Any]:
    """Yields the transform and those within it."""
    yield transform
    for inner in getattr(transform, "transforms", ()):
        yield from _steps(inner)


def augmented(images: Tensor, augment: BatchAugmentation | None, generator: torch.Generator) -> Tensor:
    """Returns the augmented images, as many as before; their size may change.

    Raises:
        UsageError: the augmentation returns a different number of images, or no tensor.
    """
    if augment is None:
        return images
    result = augment(images, generator)
    if not isinstance(result, Tensor) or result.shape[:1] != images.shape[:1]:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        wanted = f"expected a tensor of {len(images)} images, as many as were given, from {shown(augment)}"
        raise UsageError(f"{wanted}, got {got}; return one image for each, in order")
    return result


def check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise UsageError(f"expected images (B, C, H, W) as floats in [0, 1] to augment, got {got}; leave augment out")


def shown(augment: object) -> str:
    """Returns its repr on one line, for messages."""
    return textwrap.shorten(repr(augment), 160)


@dataclass(frozen=True)
class InTurn:
    """Several augmentations, one after the other."""

    steps: tuple[BatchAugmentation, ...]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        for step in self.steps:
            images = augmented(images, step, generator)
        return images


@dataclass(frozen=True)
class PerImage:
    """Applies a transform of one image to each image of a batch, with separate random draws.

    torchvision's transforms draw from torch's global generator and give a whole batch the same crop and colors. Here
    the global generators of torch, numpy and Python are reseeded for each image from the given generator, and restored
    afterwards: the same seed gives the same images, and training resumes exactly.

    Args:
        transform: called with one image (C, H, W) of floats in [0, 1], on the images' device; returns such an image, of
            any size that is the same for all. In a Compose of torchvision's v1 transforms, ToTensor and PILToTensor are
            skipped if the image is already a tensor, as those of `v2` do by themselves. For a function of PIL images,
            put ToPILImage before it and ToTensor after it, which leaves 8 bits per pixel. Any state that the transform
            keeps from image to image (a counter, its own generator) is not saved in a checkpoint.

    Raises:
        UsageError: (when called) the transform returns images of different sizes, or other than floats.
    """

    transform: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if isinstance(self.transform, type) or not callable(self.transform):
            raise UsageTypeError(f"expected a transform of one image, got {self.transform!r}; give an object")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        seeds = torch.randint(2**63 - 1, (len(images),), generator=generator, device=generator.device).tolist()
        results: list[Any] = []
        with restored():
            for image, seed in zip(images.clone(), seeds, strict=True):  # a clone, because some work in place
                seed_quickly(seed, images.device)
                try:
                    results.append(_applied(self.transform, image))
                except (TypeError, ValueError, RuntimeError) as error:
                    if not _is_torchvisions(self.transform):
                        raise
                    wanted = f"a transform of float tensors {tuple(image.shape)}"
                    do = "use that of torchvision.transforms.v2, or put ToPILImage before it and ToTensor after it"
                    raise UsageError(f"expected {wanted}, got {error} from {shown(self.transform)}; {do}") from error
        self._check(results, images)
        return torch.stack(results).to(images)  # a former PIL image is on the CPU

    def _check(self, results: list[Any], images: Tensor) -> None:
        for result in results:
            got, do = "", ""
            if not isinstance(result, Tensor):
                got, do = f"a {type(result).__name__}", "end it with ToTensor() where it is one of PIL images"
            elif not result.is_floating_point():
                got, do = f"{result.dtype}", "end it with v2.ToDtype(torch.float32, scale=True)"
            elif result.ndim != images.ndim - 1:
                got, do = f"shape {tuple(result.shape)} for {tuple(images[0].shape)}", "return it without a batch axis"
            elif result.shape != results[0].shape:
                got = f"shapes {tuple(results[0].shape)} and {tuple(result.shape)}"
                do = "end it with v2.Resize((84, 84)) or another transform to one size"
            if got:
                wanted = f"expected a float tensor of one size for each image from {shown(self.transform)}"
                raise UsageError(f"{wanted}, got {got}; {do}")


def _applied(transform: Callable[[Any], Any], image: Any) -> Any:
    """Returns the transform's result; in a Compose of torchvision's v1 transforms, ToTensor steps skip tensors."""
    kind = type(transform)
    if kind.__module__ != "torchvision.transforms.transforms":
        return transform(image)
    from torchvision.transforms import Compose, PILToTensor, ToTensor  # already imported: it takes half a second

    if isinstance(transform, Compose):
        for step in transform.transforms:
            image = _applied(step, image)
        return image
    return image if isinstance(transform, ToTensor | PILToTensor) and isinstance(image, Tensor) else transform(image)


@dataclass(frozen=True)
class RandomAffine:
    """Rotates, scales, shears, shifts and mirrors each image by its own random amounts; areas shifted in are black (0).

    torchvision's RandomAffine distorts all images of a batch the same way.

    Args:
        degrees: rotation, uniform in +- degrees.
        scale: change of size, uniform in 1 +- scale, drawn separately for each axis.
        shear: angle in degrees, uniform in +- shear, along the horizontal axis.
        translate: shift as a fraction of the size, uniform in +- translate, for each axis.
        flip: mirror half of the images left to right.
        probability: fraction of the images that are distorted at all. Resampling blurs thin strokes a little, so an
            embedder that is evaluated on plain images should also be trained on plain ones.
    """

    degrees: float = 10.0
    scale: float = 0.1
    shear: float = 5.0
    translate: float = 0.05
    flip: bool = False
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"expected probability from 0 to 1, got {self.probability}; give a fraction of the images")
        if not 0 <= self.scale < 1:
            raise UsageError(f"expected scale from 0 to below 1, got {self.scale}; give a relative change of size")
        for name in ("degrees", "shear", "translate"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"expected {name} >= 0, got {getattr(self, name)}; both signs are drawn anyway")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns distorted images of the same shape (B, C, H, W) and float type.

        The numbers are drawn on the generator's device, so a CPU generator gives the same ones on every device.
        """
        check_images(images)
        draw = torch.rand(len(images), 8, generator=generator, device=generator.device)
        draw = draw.to(images.device, non_blocking=True)
        plus_minus = 2 * draw - 1
        angle = plus_minus[:, 0] * math.radians(self.degrees)
        shear = (plus_minus[:, 1] * math.radians(self.shear)).tan()
        scale_x = 1 + plus_minus[:, 2] * self.scale
        scale_y = 1 + plus_minus[:, 3] * self.scale
        cos, sin = angle.cos(), angle.sin()
        aspect = images.shape[2] / images.shape[3]  # a grid goes from -1 to 1 along each side
        row_x = [cos / scale_x, (shear * cos - sin) / scale_x * aspect, plus_minus[:, 4] * 2 * self.translate]
        row_y = [sin / scale_y / aspect, (shear * sin + cos) / scale_y, plus_minus[:, 5] * 2 * self.translate]
        theta = torch.stack([torch.stack(row_x, dim=1), torch.stack(row_y, dim=1)], dim=1)  # (B, 2, 3)
        distorted = draw[:, 6] < self.probability
        theta = torch.where(distorted.view(-1, 1, 1), theta, torch.eye(2, 3, device=images.device))
        if self.flip:
            mirror = torch.where((draw[:, 7] < 0.5) & distorted, -1.0, 1.0)
            theta = torch.cat([theta[:, :, :1] * mirror.view(-1, 1, 1), theta[:, :, 1:]], dim=2)
        with no_autocast():  # autocast would give the grid bfloat16's 8 bits
            grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
            grid = self._bent(grid, distorted, generator)
        return F.grid_sample(images, grid, align_corners=False)

    def _bent(self, grid: Tensor, distorted: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the points (B, H, W, 2), from -1 to 1, at which the images are sampled; here unchanged."""
        return grid


@dataclass(frozen=True)
class RandomWarp(RandomAffine):
    """RandomAffine that also bends an image: its points are shifted by a smooth random field.

    Writers do not just slant a character more than others do; they also draw some of its strokes longer or rounder. A
    batch takes about 1.4 times as long as with RandomAffine: 6 instead of 4 ms for 360 images of 28 x 28 pixels.

    Args:
        warp: standard deviation of the shift at a node, as a fraction of the size, along each axis; 0.04 is 1.1 of 28
            pixels.
        nodes: the field is drawn at nodes x nodes points, from corner to corner, with bicubic interpolation between
            them. More nodes bend finer details and need a lower warp: at 0.04 some images fold over themselves with 6
            nodes, nearly all with 8.

    Raises:
        UsageError: a warp outside [0, 1), or fewer than two nodes.

    Source: after the elastic distortions of Simard, Steinkraus and Platt 2003, section 2, whose field is noise smoothed
    at every pixel. torchvision's ElasticTransform bends all images of a batch the same way.
    """

    warp: float = 0.04
    nodes: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warp < 1:
            raise UsageError(f"expected warp from 0 to below 1, got {self.warp}; give a fraction of the size")
        if not isinstance(self.nodes, int) or self.nodes < 2:
            raise UsageError(f"expected nodes as a whole number from 2, got {self.nodes}; there is one in each corner")

    def _bent(self, grid: Tensor, distorted: Tensor, generator: torch.Generator) -> Tensor:
        at_nodes = torch.randn(len(grid), 2, self.nodes, self.nodes, generator=generator, device=generator.device)
        at_nodes = at_nodes.to(grid.device, non_blocking=True) * (2 * self.warp) * distorted.view(-1, 1, 1, 1)
        # each node's weight in a shift along an axis: interpolating the whole field would make a call twice as long
        share = torch.eye(self.nodes, device=grid.device).expand(1, 1, -1, -1)
        of_rows, of_columns = (
            F.interpolate(share, (size, self.nodes), mode="bicubic", align_corners=True)[0, 0]
            for size in grid.shape[1:3]
        )
        return grid + (of_rows @ at_nodes @ of_columns.T).movedim(1, 3).to(grid.dtype)
