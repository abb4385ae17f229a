"""EpisodicLoss: what the losses that classify queries over a support set have in common."""

from abc import abstractmethod
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

from pml_fewshot.checks import check_labels, require
from pml_fewshot.parts import build


class EpisodicLoss(BaseMetricLossFunction):
    """Cross-entropy of each query over the classes of a support set, as a PML loss; subclasses give the logits.

    With a support set: `loss(query, query_labels, ref_emb=support, ref_labels=support_labels)`. Without one, on an
    ordinary labelled batch, each item is a query and all the others are its support, so it is a drop-in PML loss.
    Classes may have different numbers of support items.

    Args:
        distance: any PML distance.
        scale: the similarity is multiplied by it before the softmax.
        learn_scale: make the scale (its logarithm) a parameter, trained with the embedder.
        reducer: PML reducer; the mean when None. This and the rest are as in every PML loss.
        embedding_regularizer: PML regularizer of the queries' embeddings; none when None.
        embedding_reg_weight: its weight.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    A miner's output weighs the queries by how often they occur in it as anchors (all items, without a support set),
    as in PML's classification losses. The losses are per query (PML's "element" reduction).

    Raises:
        ValueError: scale of 0 or below, a query whose class has no support item.
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

    @property
    def scale(self) -> Tensor:
        """What the similarity is multiplied by, a scalar tensor."""
        return self.log_scale.exp()

    @abstractmethod
    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        """Logits of queries (B, D) over W classes, (B, W).

        Args:
            queries: (B, D)
            support: (S, D)
            member: (S, W) one-hot: which class each support item is of.
            own_class: None, or where queries and support are the same items the class (B,) of each: an item's own
                class is then scored without the item.
        """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        c_f.labels_required(labels)
        with_support = ref_emb is not embeddings
        check_labels(ref_labels, len(ref_emb), "support")
        require(len(ref_emb) > 0, "at least one support item", "none", "draw support and query from the same classes")
        classes, support_class = torch.unique(ref_labels, return_inverse=True)
        target = torch.searchsorted(classes, labels.contiguous()).clamp_(max=len(classes) - 1)
        member = F.one_hot(support_class, len(classes)).to(ref_emb.dtype)  # (S, W)
        if with_support:
            if not torch.equal(classes[target], labels):
                missing = labels[classes[target] != labels].unique().tolist()
                raise ValueError(
                    f"expected a support item for the class of every query, got none for classes {missing[:5]}; "
                    "draw support and query from the same classes"
                )
            kept = c_f.torch_arange_from_size(embeddings)
        else:
            # an item that is alone in its class has nothing of its class to be compared with
            kept = (member.sum(dim=0)[target] > 1).nonzero().flatten()
            if len(kept) == 0:
                return self.zero_losses()
        scores = self.class_scores(embeddings, ref_emb, member, None if with_support else target)
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype, using_ref=with_support)
        losses = F.cross_entropy(scores[kept], target[kept], reduction="none") * weights[kept]
        return {"loss": {"losses": losses, "indices": kept, "reduction_type": "element"}}

    def similarity(self, queries: Tensor, references: Tensor) -> Tensor:
        """(B, D) and (R, D) -> (B, R): the distance's values, negated unless it is a similarity already."""
        values = self.distance(queries, references)
        return values if self.distance.is_inverted else -values
