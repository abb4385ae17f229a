"""DihedralViews: the embeddings of an image's quarter turns and their mirror images as one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
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

    What a trunk with pooling gives changes when the image moves by a pixel. With a `shift`, a view's embedding is the
    mean over the view and its shifts to the four sides, for five times the cost of an embedding.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D), for images of any orientation: where
            they are not square, a turned one is as high as they are wide.
        shift: pixels; 0 for no shifts. Pixels shifted in are 0, the background of Omniglot and of the built-in letters.

    Raises:
        UsageError: a negative shift.

    Shapes: (B, C, H, W) -> (B, 8 D) in eval mode, (B, D) in train mode.
    """

    def __init__(self, trunk: Part[nn.Module], shift: int = 0) -> None:
        super().__init__()
        if shift < 0:
            raise UsageError(f"expected shift >= 0, got {shift}; images are shifted to all sides")
        self.trunk: nn.Module = instantiate(trunk)
        self.shift = shift

    @property
    def preprocessing(self) -> Preprocessing | None:
        """That of the trunk, where it has one."""
        return getattr(self.trunk, "preprocessing", None)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return F.normalize(self.trunk(images), dim=1)
        views = (view for each in (images, images.flip(3)) for view in (torch.rot90(each, r, (2, 3)) for r in range(4)))
        return torch.cat([self._embed(view) for view in views], dim=1) / 8**0.5

    def _embed(self, view: Tensor) -> Tensor:
        """The mean embedding of the view's shifts, of length 1."""
        by, (height, width) = self.shift, view.shape[2:]
        padded = F.pad(view, 4 * [by])
        corners = ((by, by), (0, by), (2 * by, by), (by, 0), (by, 2 * by)) if by else ((0, 0),)
        shifted = (padded[:, :, top : top + height, left : left + width] for top, left in corners)
        return F.normalize(torch.stack([F.normalize(self.trunk(each), dim=1) for each in shifted]).mean(dim=0), dim=1)
