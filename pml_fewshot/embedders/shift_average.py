"""ShiftAverage: the average embedding of an image and its shifts by a pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import check_at_least_one
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.parts.instantiate import Part, instantiate


class ShiftAverage(nn.Module):
    """In eval mode the mean of the trunk's embeddings of an image and of its shifts, each scaled to length 1 before.

    What a trunk with pooling gives changes when the image moves by a pixel: averaging over shifts evens that out, for
    as many times the cost of an embedding. No other image is looked at, so figures stay inductive. In train mode it is
    the embedding of the image alone, of length 1 too.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D).
        pixels: shifts go up to so many pixels to each side, along both axes: 9 images with 1, 25 with 2. Pixels
            shifted in are 0, the background of Omniglot and of the built-in letters.

    Shapes: (B, C, H, W) -> (B, D).
    """

    def __init__(self, trunk: Part[nn.Module], pixels: int = 1) -> None:
        super().__init__()
        check_at_least_one("pixels", pixels)
        self.trunk: nn.Module = instantiate(trunk)
        self.pixels = pixels

    @property
    def preprocessing(self) -> Preprocessing | None:
        """That of the trunk, where it has one."""
        return getattr(self.trunk, "preprocessing", None)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return F.normalize(self.trunk(images), dim=1)
        (height, width), size = images.shape[2:], 2 * self.pixels + 1
        padded = F.pad(images, 4 * [self.pixels])
        shifted = (padded[:, :, y : y + height, x : x + width] for y in range(size) for x in range(size))
        return torch.stack([F.normalize(self.trunk(each), dim=1) for each in shifted]).mean(dim=0)
