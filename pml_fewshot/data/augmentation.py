"""Augmentation of whole batches, on their device: each image is distorted by its own amounts, in one operation."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.modes import no_autocast


@dataclass(frozen=True)
class RandomAffine:
    """Rotates, scales, shears, shifts and mirrors each image by its own random amounts; what comes in is black (0).

    torchvision's RandomAffine distorts all images of a batch alike.

    Args:
        degrees: rotation, uniform in +- degrees.
        scale: change of size, uniform in 1 +- scale, for each axis on its own.
        shear: degrees, uniform in +- shear, along the horizontal axis.
        translate: shift as a fraction of the size, uniform in +- translate, for each axis.
        flip: mirror half of the images left to right.
        probability: fraction of the images that is distorted at all. Resampling blurs thin strokes a little, so an
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
        """Returns distorted images of the same shape (B, C, H, W) and type of floats.

        The numbers are drawn on the generator's own device, so a CPU generator gives the same ones on every device.
        """
        draw = torch.rand(len(images), 8, generator=generator, device=generator.device).to(images.device)
        plus_minus = 2 * draw - 1
        angle = plus_minus[:, 0] * math.radians(self.degrees)
        shear = (plus_minus[:, 1] * math.radians(self.shear)).tan()
        scale_x = 1 + plus_minus[:, 2] * self.scale
        scale_y = 1 + plus_minus[:, 3] * self.scale
        cos, sin = angle.cos(), angle.sin()
        row_x = [cos / scale_x, (shear * cos - sin) / scale_x, plus_minus[:, 4] * 2 * self.translate]
        row_y = [sin / scale_y, (shear * sin + cos) / scale_y, plus_minus[:, 5] * 2 * self.translate]
        theta = torch.stack([torch.stack(row_x, dim=1), torch.stack(row_y, dim=1)], dim=1)  # (B, 2, 3)
        distorted = draw[:, 6] < self.probability
        theta = torch.where(distorted.view(-1, 1, 1), theta, torch.eye(2, 3, device=images.device))
        if self.flip:
            mirror = torch.where((draw[:, 7] < 0.5) & distorted, -1.0, 1.0)
            theta = torch.cat([theta[:, :, :1] * mirror.view(-1, 1, 1), theta[:, :, 1:]], dim=2)
        with no_autocast():  # in which a grid has bfloat16's 8 bits
            grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
