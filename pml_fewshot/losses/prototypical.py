"""PrototypicalLoss: the loss of prototypical networks as a pytorch-metric-learning (PML) loss."""

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import BaseReducer
from pytorch_metric_learning.regularizers import BaseRegularizer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_fewshot.checks import check_labels
from pml_fewshot.parts import build


class PrototypicalLoss(BaseMetricLossFunction):
    """Computes class prototypes (mean embeddings) and the cross-entropy of each query over them.

    With a support set it is the loss of prototypical networks:
    `loss(query, query_labels, ref_emb=support, ref_labels=support_labels)`. Without one, on an ordinary labelled
    batch, each item is compared with the prototypes of the other items (its own class's prototype leaves it out), so
    it is a drop-in PML loss. Classes may have different numbers of support items.

    Args:
        distance: any PML distance, between queries (B, D) and prototypes (W, D). Squared Euclid when None, that is
            `LpDistance(normalize_embeddings=False, power=2)`, as in the paper (note that PML's own default normalises
            and does not square).
        scale: the distance is multiplied by it before the softmax. 1 as in the paper; a bounded similarity such as
            cosine needs about 10 or more, or the softmax over it cannot get sharp.
        learn_scale: make the scale (its logarithm) a parameter, trained with the embedder.
        reducer: PML reducer; the mean when None. This and the rest are as in every PML loss.
        embedding_regularizer: PML regularizer of the queries' embeddings; none when None.
        embedding_reg_weight: its weight.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    A miner's output weighs the queries by how often they occur in it as anchors (all items, without a support set),
    as in PML's classification losses. The losses are per query (PML's "element" reduction).

    Raises:
        ValueError: a query's class has no support item.

    Source: Snell et al. 2017, "Prototypical Networks for Few-shot Learning", eq. 1-2 and algorithm 1.
    """

    def __init__(
        self,
        distance: BaseDistance | None = None,
        scale: float = 1.0,
        learn_scale: bool = False,
        reducer: BaseReducer | None = None,
        embedding_regularizer: BaseRegularizer | None = None,
        embedding_reg_weight: float = 1.0,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(
            distance=build(distance),
            reducer=build(reducer),
            embedding_regularizer=build(embedding_regularizer),
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        if not scale > 0:
            raise ValueError(
                f"expected scale above 0, got {scale}; a similarity needs no negative scale to be inverted"
            )
        log_scale = torch.tensor(float(scale)).log()
        self.log_scale = torch.nn.Parameter(log_scale, requires_grad=learn_scale)

    def get_default_distance(self) -> BaseDistance:
        return LpDistance(normalize_embeddings=False, power=2)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        c_f.labels_required(labels)
        with_support = ref_emb is not embeddings
        check_labels(ref_labels, len(ref_emb), "support")
        classes, support_class = torch.unique(ref_labels, return_inverse=True)
        target = torch.searchsorted(classes, labels.contiguous()).clamp_(max=len(classes) - 1)
        member = F.one_hot(support_class, len(classes)).to(ref_emb.dtype)  # (S, W)
        counts = member.sum(dim=0)  # (W,)
        sums = member.T @ ref_emb  # (W, D)
        scores = self.similarity(embeddings, sums / counts.unsqueeze(1))  # (B, W)
        if with_support:
            if not torch.equal(classes[target], labels):
                missing = labels[classes[target] != labels].unique().tolist()
                raise ValueError(
                    f"expected a support item for the class of every query, got none for classes {missing[:5]}; "
                    "draw support and query from the same classes"
                )
            kept = c_f.torch_arange_from_size(embeddings)
        else:
            # an item that is alone in its class has no prototype to be compared with
            kept = (counts[target] > 1).nonzero().flatten()
            if len(kept) == 0:
                return self.zero_losses()
            left_out = (sums[target] - embeddings) / (counts[target] - 1).clamp(min=1).unsqueeze(1)  # (B, D)
            # The distance is asked for all B x B and read on the diagonal: PML's pairwise_distance would neither
            # normalise nor raise to the power.
            own = self.similarity(embeddings, left_out).diagonal()
            scores = torch.where(F.one_hot(target, len(classes)).bool(), own.unsqueeze(1), scores)
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype, using_ref=with_support)
        losses = F.cross_entropy(self.log_scale.exp() * scores, target, reduction="none") * weights
        return {"loss": {"losses": losses[kept], "indices": kept, "reduction_type": "element"}}

    def similarity(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """(B, D) and (W, D) -> (B, W): the distance's values, negated unless it is a similarity already."""
        values = self.distance(query, prototypes)
        return values if self.distance.is_inverted else -values
