"""Ensemble: the embeddings of several trunks as one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.modes import widened
from pml_fewshot.embedders.preprocessing import Preprocessing
from pml_fewshot.parts.instantiate import Part, instantiate


class Ensemble(nn.Module):
    """The embeddings of several trunks side by side, each scaled to the same length, all together to length 1.

    The cosine of two of them is the mean of the trunks' cosines. Networks that were trained by different seeds err on
    different images, so that the mean is usually better than each of them, for as many times the cost.

    Args:
        trunks: modules (or partials that make them) from (B, C, H, W) to (B, D_i); embedders too. All take the same
            images.

    Raises:
        UsageError: no trunk, or trunks with different preprocessing.

    Shapes: (B, C, H, W) -> (B, D_1 + ... + D_n).
    """

    def __init__(self, trunks: Sequence[Part[nn.Module]]) -> None:
        super().__init__()
        if isinstance(trunks, nn.Module):
            raise UsageTypeError(f"expected a sequence of trunks, got a {type(trunks).__name__}; put it into a list")
        self.trunks = nn.ModuleList(instantiate(trunk) for trunk in trunks)
        of_trunks = [getattr(trunk, "preprocessing", None) for trunk in self.trunks]
        if not of_trunks or any(each != of_trunks[0] for each in of_trunks):
            got = "different ones" if of_trunks else "no trunk"
            raise UsageError(
                f"expected trunks that take images of the same preprocessing, got {got}; name some that do"
            )
        self.preprocessing: Preprocessing | None = of_trunks[0]

    def forward(self, images: Tensor) -> Tensor:
        embeddings = torch.cat([F.normalize(widened(trunk(images)), dim=1) for trunk in self.trunks], dim=1)
        return embeddings / len(self.trunks) ** 0.5
