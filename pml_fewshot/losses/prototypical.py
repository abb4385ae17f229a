"""PrototypicalLoss: the loss of prototypical networks as a pytorch-metric-learning (PML) loss."""

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor

from pml_fewshot.distances.episodic_distance import similarity_batch
from pml_fewshot.losses.episodic_loss import EpisodicLoss


class PrototypicalLoss(EpisodicLoss):
    """Computes class prototypes (mean embeddings) and the cross-entropy of each query over them.

    Called and configured like any EpisodicLoss; in an ordinary batch each item is compared with the prototypes of the
    other items (its own class's prototype leaves it out).

    Args:
        distance: any PML distance, between queries (B, D) and prototypes (W, D). Squared Euclidean when None, that is
            `LpDistance(normalize_embeddings=False, power=2)`, as in the paper (PML's default normalizes and does not
            square).
        scale: 1 as in the paper; a bounded similarity such as cosine needs about 10.
        learn_scale: this and the rest as in EpisodicLoss.

    Source: Snell et al. 2017, "Prototypical Networks for Few-shot Learning", eq. 1-2 and algorithm 1.
    """

    def get_default_distance(self) -> BaseDistance:
        return LpDistance(normalize_embeddings=False, power=2)

    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        counts = member.sum(dim=0)  # (W,)
        sums = member.T @ support  # (W, D)
        scores = self.similarity(queries, sums / counts.unsqueeze(1))  # (B, W)
        if own_class is not None:
            left_out = (sums[own_class] - queries) / (counts[own_class] - 1).clamp(min=1).unsqueeze(1)  # (B, D)
            # pairs, B of them: PML's pairwise_distance would neither normalize nor raise to the power
            own = similarity_batch(self.distance, queries.unsqueeze(1), left_out.unsqueeze(1))[:, :, 0]  # (B, 1)
            is_own = own_class.unsqueeze(1) == torch.arange(len(counts), device=queries.device)
            scores = torch.where(is_own, own, scores)
        return self.scale * scores
