"""Dense forms of two losses of pytorch-metric-learning (PML): the same values with far less work."""

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.modes import in_float32


class DenseNTXentLoss(NTXentLoss):
    """PML's NTXentLoss with one softmax denominator per anchor instead of one row of all negatives per positive pair.

    All else is PML's. It compares every positive pair with every negative pair of the batch, in a (P, N) matrix, to
    find the negatives of its anchor; with 256 items, 4 per class, that is 768 x 64,512. Here the negatives are in the
    (B, R) matrix that the distance returned.

    Args:
        temperature: cosines are divided by it; 0.07 as in PML.
        learn_temperature: make its logarithm a parameter, trained with the embedder: the best one falls as classes
            move apart. (CLIP, Radford et al. 2021, learns it this way.) `temperature` keeps its initial value.
        kwargs: PML's own, such as distance.

    Raises:
        UsageError: a temperature that is not above 0.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1.

    PML's wrappers (CrossBatchMemory, SelfSupervisedLoss) check a loss's class name and refuse this one. Give them an
    NTXentLoss and replace it with this one afterwards: `memory.loss = DenseNTXentLoss()`.
    """

    compute_loss = in_float32(NTXentLoss.compute_loss)

    def __init__(self, temperature: float = 0.07, learn_temperature: bool = False, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)
        if not temperature > 0:
            raise UsageError(f"expected temperature above 0, got {temperature}; 0.07 is PML's")
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log()) if learn_temperature else None

    def pair_based_loss(self, mat: Tensor, indices_tuple: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
        a1, p, a2, n = indices_tuple
        if len(a1) == 0 or len(a2) == 0:
            return self.zero_losses()
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        scores = (mat if self.distance.is_inverted else -mat) / temperature  # (B, R)
        # how often each pair is a negative: a miner's triplets repeat it
        one = torch.ones((), dtype=mat.dtype, device=mat.device)
        counts = torch.zeros_like(scores).index_put_((a2, n), one, accumulate=True)  # (B, R)
        # As in PML, everything is relative to the largest score of the anchor's negatives and the positive. Subtracting
        # a logsumexp instead would round a score of 100 (temperature 0.01) in its fifth digit.
        negatives = scores.masked_fill(counts == 0, c_f.neg_inf(mat.dtype))
        top = negatives.detach().amax(dim=1)  # (B,)
        mass = (counts * torch.exp(negatives - top.unsqueeze(1))).sum(dim=1)  # (B,); 0 without a negative
        positives, anchor_top = scores[a1, p], top[a1]  # (P,)
        peak = torch.maximum(positives.detach(), anchor_top)
        numerator = torch.exp(positives - peak)
        denominator = mass[a1] * torch.exp(anchor_top - peak) + numerator
        losses = -torch.log(numerator / denominator + c_f.small_val(mat.dtype))
        return {"loss": {"losses": losses, "indices": (a1, p), "reduction_type": "pos_pair"}}


class DenseTripletMarginLoss(TripletMarginLoss):
    """PML's TripletMarginLoss; all triplets of a batch come from rows of the distance matrix, not from a (B, R, R) one.

    A miner's tuple, or a number as `triplets_per_anchor`, runs PML's own code. With PML's default reducer, the mean of
    the losses above zero, the list of triplets is never created. For PML's wrappers see DenseNTXentLoss.

    Args: PML's own, with its defaults: a margin of 0.05 between Euclidean distances of normalized embeddings.

    Source: Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", equation 2.
    """

    @in_float32
    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        if indices_tuple is not None or labels is None or self.triplets_per_anchor != "all":
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        matches, diffs = (mask.bool() for mask in lmu.get_matches_and_diffs(labels, ref_labels))  # (B, R)
        if not (matches.any(dim=1) & diffs.any(dim=1)).any():
            return self.zero_losses()
        a, p = torch.where(matches)  # (P,)
        mat = self.distance(embeddings, ref_emb)  # (B, R)
        ap, an = mat[a, p].unsqueeze(1), mat.index_select(0, a)  # (P, 1) and (P, R)
        if self.swap:
            an = self.distance.smallest_dist(an, mat.index_select(0, p))
        violation = self.distance.margin(ap, an) + self.margin
        losses = F.softplus(violation) if self.smooth_loss else F.relu(violation)  # (P, R)
        reducer = self.reducer  # is it PML's default, with only its value needed?
        plain = type(reducer) is AvgNonZeroReducer and reducer.low == 0 and reducer.high is None
        # Selecting the losses above zero, as it does, takes longer than everything else here.
        if plain and not reducer.collect_stats:
            # times 0 or 1, because selecting and filling take ten times as long with a mask that is hard to predict
            kept = losses * diffs.to(losses.dtype).index_select(0, a)
            total = kept.sum()
            if total.isfinite():  # else it is left to PML's reducer, which drops NaN
                mean = total / (kept > 0).sum().clamp(min=1)
                return {"loss": {"losses": mean, "indices": None, "reduction_type": "already_reduced"}}
        valid = diffs.index_select(0, a)  # (P, R); the order of its elements is that of PML's triplets
        pair, n = torch.where(valid)  # (T,)
        indices = (a.index_select(0, pair), p.index_select(0, pair), n)
        return {"loss": {"losses": losses.masked_select(valid), "indices": indices, "reduction_type": "triplet"}}
