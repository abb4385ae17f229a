"""DihedralViews: the concatenated embeddings of an image's quarter turns and their mirror images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.parts.instantiate import Part, instantiate


class DihedralViews(nn.Module):
    """In eval mode, concatenates the trunk's embeddings of an image's eight views into one L2-normalized vector.

    The views are the image rotated by 0, 90, 180 and 270 degrees, each also mirrored. Two images are compared eight
    times, both rotated alike, and their cosine is the mean of the eight: one network acts as eight, at eight times the
    cost of an embedding and of memory. This helps a trunk that has learned rotated and mirrored images as separate
    classes (`with_rotations_as_classes`, `with_mirrors_as_classes`). A rotated image is still a different one: its
    views come in another order. No other image is used, so results stay inductive. In train mode the output is the
    embedding of the image alone, also L2-normalized.

    The output of a trunk with pooling changes when the image moves by a pixel. With a `shift`, a view's embedding is
    the mean over the view and its shifts to the four sides, at five times the cost of an embedding.

    Args:
        trunk: module (or a partial that makes one) from (B, C, H, W) to (B, D), for images of any orientation: if they
            are not square, rotation swaps their height and width.
        shift: in pixels; 0 for none. Pixels shifted in are 0, the background of Omniglot and of the built-in letters.

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
        """The trunk's preprocessing, if it has one."""
        return getattr(self.trunk, "preprocessing", None)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return F.normalize(self.trunk(images), dim=1)
        views = (view for each in (images, images.flip(3)) for view in (torch.rot90(each, r, (2, 3)) for r in range(4)))
        return torch.cat([self._embed(view) for view in views], dim=1) / 8**0.5

    def _embed(self, view: Tensor) -> Tensor:
        """The L2-normalized mean embedding of the view's shifts."""
        by, (height, width) = self.shift, view.shape[2:]
        padded = F.pad(view, 4 * [by])
        corners = ((by, by), (0, by), (2 * by, by), (by, 0), (by, 2 * by)) if by else ((0, 0),)
        shifted = (padded[:, :, top : top + height, left : left + width] for top, left in corners)
        return F.normalize(torch.stack([F.normalize(self.trunk(each), dim=1) for each in shifted]).mean(dim=0), dim=1)
