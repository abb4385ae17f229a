"""MatchingLoss: the loss of Matching networks as a pytorch-metric-learning (PML) loss."""

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from torch import Tensor

from pml_fewshot.losses.episodic_loss import EpisodicLoss


class MatchingLoss(EpisodicLoss):
    """Lets each query attend to the support items by a softmax over similarities; a class gets its items' total share.

    The loss is minus the logarithm of the share of the query's class. Called and configured like any EpisodicLoss; in
    an ordinary batch each item attends to all the others. With cosine and scale 1 it is PML's
    NCALoss(distance=CosineSimilarity()); with one shot and squared Euclidean distance it is the prototypical loss.

    Args:
        distance: any PML distance; cosine when None, as in the paper. Squared Euclidean
            (`LpDistance(normalize_embeddings=False, power=2)`) is unbounded and needs no scale.
        scale: 1 as in the paper, but a softmax over the cosines of 5 classes then gives none a probability above
            0.65, which raises a warning: give 10 and learn_scale, as MatchingTrainer does.
        learn_scale: this and the rest as in EpisodicLoss.

    Source: Vinyals et al. 2016, "Matching Networks for One Shot Learning", eq. 1 and section 2.1.1.
    """

    def get_default_distance(self) -> BaseDistance:
        return CosineSimilarity()

    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        each = self.scale * self.similarity(queries, support)  # (B, S)
        if own_class is not None:
            itself = torch.eye(len(each), dtype=torch.bool, device=each.device)
            each = each.masked_fill(itself, torch.finfo(each.dtype).min)  # -inf would give NaN for a lone item's class
        # logsumexp over each class's items: the softmax of such logits is the share. Relative to the largest of each
        # class, because relative to the largest of all a far class's exponentials would vanish.
        index = member.argmax(dim=1).expand_as(each)
        lowest = each.new_full((len(each), member.shape[1]), torch.finfo(each.dtype).min)
        top = lowest.scatter_reduce(1, index, each.detach(), "amax")  # (B, W)
        return (each - top.gather(1, index)).exp().matmul(member).log() + top
