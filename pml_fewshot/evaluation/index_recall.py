"""IndexRecall: how many of the true neighbours an approximate index finds."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IndexRecall:
    """Share of the true neighbours that an approximate index found, over a sample of queries.

    Told by their indices: where the references hold copies, another copy of a true neighbour does not count.

    Args:
        at_1: how often its nearest neighbour is the true one.
        at_k: share of the true k nearest among its k.
        k: neighbours searched.
        sample: queries compared.
    """

    at_1: float
    at_k: float
    k: int
    sample: int

    @staticmethod
    def of(found: Tensor, exact: Tensor) -> "IndexRecall":
        """Compares the neighbours (N, k) that an index found with those of exact search, both as indices."""
        ordered = found.sort(dim=1).values
        place = torch.searchsorted(ordered, exact.contiguous()).clamp_(max=ordered.shape[1] - 1)
        at_k = (ordered.gather(1, place) == exact).double().mean().item()
        return IndexRecall((found[:, 0] == exact[:, 0]).double().mean().item(), at_k, exact.shape[1], len(exact))

    def __str__(self) -> str:
        return f"recall@1 {self.at_1:.3f}, @{self.k} {self.at_k:.3f} of exact search on {self.sample:,} queries"
