"""DihedralViews: the embeddings of an image's quarter turns and their mirror images as one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.parts.instantiate import Part, instantiate


class DihedralViews(nn.Module):
    """In eval mode the trunk's embeddings of the eight views of an image side by side, together of length 1.

    The views are the image turned by 0, 90, 180 and 270 degrees, each also mirrored. Two images are compared eight
    times, both turned alike, and their cosine is the mean of eight: one network serves as eight, for eight times the
    cost of an embedding and of memory. It helps a trunk that has learned turned and mirrored images as classes of their
    own (`with_rotations_as_classes`, `with_mirrors_as_classes`). A turned image still is another one: the views come in
    another order. No other image is looked at, so figures stay inductive. In train mode it is the embedding of the
    image alone, of length 1 too.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D), for images of any orientation: where
            they are not square, a turned one is as high as they are wide.

    Shapes: (B, C, H, W) -> (B, 8 D) in eval mode, (B, D) in train mode.
    """

    def __init__(self, trunk: Part[nn.Module]) -> None:
        super().__init__()
        self.trunk: nn.Module = instantiate(trunk)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """That of the trunk, where it has one."""
        return getattr(self.trunk, "preprocessing", None)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return F.normalize(self.trunk(images), dim=1)
        views = (view for each in (images, images.flip(3)) for view in (torch.rot90(each, r, (2, 3)) for r in range(4)))
        return torch.cat([F.normalize(self.trunk(view), dim=1) for view in views], dim=1) / 8**0.5
