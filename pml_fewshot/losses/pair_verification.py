"""PairVerificationLoss: the loss of Siamese networks (are two embeddings of one class?) as a PML loss."""

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import BaseReducer
from pytorch_metric_learning.regularizers import BaseRegularizer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.modes import in_float32


class PairVerificationLoss(BaseMetricLossFunction):
    """Computes the binary cross-entropy of pairs: the similarity is the logit that both are of one class.

    Args:
        distance: a similarity whose values are logits; `WeightedL1Similarity()` when None. PML's own work too, a
            distance by its negative, but learn no threshold: matching and other pairs are separated at 0.
        balanced: without a miner, draw as many non-matching pairs as there are matching ones (or vice versa),
            as in the paper; False uses all pairs of the batch and draws nothing.
        negative_weight: weight of a non-matching pair's loss relative to a matching one's. All pairs of 60 classes with
            6 images each have 71 non-matching ones per matching one; omniglot_siamese weights them by a third.
        seed: for drawing pairs. When None, the seed of torch's global generator (`torch.manual_seed`), from which
            nothing is drawn; `run` sets that to the experiment's. The generator's state is part of the state_dict.
        reducer: PML reducer over all pairs, the matching ones first; the mean when None.
        embedding_regularizer: this and the rest as in every PML loss; see EpisodicLoss.

    A miner's pairs (or triplets, as pairs) are all used. Without a miner, each step on a GPU waits for the list of
    pairs, as in PML's pair losses.

    Source: Koch, Zemel and Salakhutdinov 2015, "Siamese Neural Networks for One-shot Image Recognition", section 3.2.
    """

    def __init__(
        self,
        distance: BaseDistance | None = None,
        balanced: bool = True,
        negative_weight: float = 1.0,
        seed: int | None = None,
        reducer: BaseReducer | None = None,
        embedding_regularizer: BaseRegularizer | None = None,
        embedding_reg_weight: float = 1.0,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(
            embedding_regularizer, embedding_reg_weight, distance=distance, reducer=reducer, collect_stats=collect_stats
        )
        if not negative_weight > 0:
            raise UsageError(f"expected negative_weight above 0, got {negative_weight}; 1 weighs all pairs alike")
        self.balanced = balanced
        self.negative_weight = negative_weight
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)

    def get_default_distance(self) -> BaseDistance:
        return WeightedL1Similarity()

    @in_float32
    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        if indices_tuple is None and self.balanced:
            indices_tuple = self._balanced_pairs(labels, ref_labels)
        a1, p, a2, n = lmu.convert_to_pairs(indices_tuple, labels, ref_labels)
        if not len(a1) + len(a2):
            return self.zero_losses()
        mat, sign = self.distance(embeddings, ref_emb), 1 if self.distance.is_inverted else -1
        losses = torch.cat([F.softplus(-sign * mat[a1, p]), self.negative_weight * F.softplus(sign * mat[a2, n])])
        # PML's reducers know pairs as "pos_pair" or "neg_pair" and treat both alike.
        indices = (torch.cat([a1, a2]), torch.cat([p, n]))
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "pos_pair"}}

    def _balanced_pairs(self, labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a1, p, a2, n = lmu.get_all_pairs_indices(labels, ref_labels)
        count = min(len(a1), len(a2))
        matching = torch.randperm(len(a1), generator=self.generator)[:count].to(a1.device)
        other = torch.randperm(len(a2), generator=self.generator)[:count].to(a2.device)
        return a1[matching], p[matching], a2[other], n[other]

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)
