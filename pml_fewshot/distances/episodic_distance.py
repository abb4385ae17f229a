"""EpisodicDistance: a PML distance that compares the items of many episodes in one call."""

import math
from abc import abstractmethod

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import UsageError


class EpisodicDistance(BaseDistance):
    """A PML distance that defines `compute_batch`, from which PML's distance matrix follows.

    Heads call it instead of `torch.vmap`, which accepts no solver outside torch. `span` is how far apart two values can
    be. `ranks_all` is False if comparing all pairs of a set would take too long: retrieval then only uses it to rerank
    what another distance has found. `extra_repr` is how tables show the options.
    """

    span = math.inf
    ranks_all = True

    @abstractmethod
    def compute_batch(self, query: Tensor, reference: Tensor) -> Tensor:
        """Compares each query (E, N, D) with each reference (E, R, D) of its episode: (E, N, R)."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D) and (R, D) -> (B, R)"""
        if query_emb.shape[1] != ref_emb.shape[1]:
            got = f"{query_emb.shape[1]} and {ref_emb.shape[1]} dimensions"
            raise UsageError(f"expected queries and references of one width, got {got}; embed both alike")
        return self.compute_batch(query_emb.unsqueeze(0), ref_emb.unsqueeze(0)).squeeze(0)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B,): each query with the reference in the same row."""
        return self.compute_batch(query_emb.unsqueeze(1), ref_emb.unsqueeze(1)).flatten()


def similarity_batch(distance: BaseDistance, query: Tensor, reference: Tensor) -> Tensor:
    """Similarity by any PML distance of each query (E, N, D) and reference (E, R, D) of its episode: (E, N, R).

    A similarity's values, or a distance's negated; without the statistics that PML keeps of a call, for training only.
    """
    if isinstance(distance, EpisodicDistance):
        values = distance.compute_batch(query, reference)
    elif not distance.collect_stats:
        values = torch.vmap(distance)(query, reference)
    else:  # PML's own call would use .item(), which vmap cannot run: the rest of what it does
        query, reference = (distance.maybe_normalize(each, dim=2) for each in (query, reference))
        values = torch.vmap(distance.compute_mat)(query, reference) ** distance.power
    return values if distance.is_inverted else -values
