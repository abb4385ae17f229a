"""EpisodicLoss: base class of the losses that classify queries over a support set."""

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, DotProductSimilarity, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import BaseReducer
from pytorch_metric_learning.regularizers import BaseRegularizer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError, as_labels
from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.embedders.modes import in_float32


class EpisodicLoss(BaseMetricLossFunction):
    """Cross-entropy of each query over the classes of a support set, as a PML loss; subclasses compute the logits.

    With a support set: `loss(query, query_labels, ref_emb=support, ref_labels=support_labels)`. Without one, on an
    ordinary labeled batch, each item is a query and all the others are its support, so it is a drop-in PML loss.
    Classes may have different numbers of support items.

    Args:
        distance: any PML distance.
        scale: the similarity is multiplied by it before the softmax. With a bounded one (cosine, normalized Lp) and a
            fixed scale of at most 1, the softmax cannot get sharp and the embedder trains worse than it could: a
            UserWarning.
        learn_scale: make the scale (its logarithm) a parameter, trained with the embedder.
        reducer: PML reducer of the losses per query (PML's "element" reduction); the mean when None.
        embedding_regularizer: PML regularizer of the queries' embeddings; none when None.
        embedding_reg_weight: its weight.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    A miner's output weights the queries by how often they occur in it as anchors (all items, without a support set),
    as in PML's classification losses.

    With a support set and no miner, a step on a GPU waits for no value. So a query whose class has no support item
    raises a UsageError on the CPU, but has a NaN loss on a GPU.
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
        if not isinstance(distance, torch.nn.Module | None):  # (PML's BatchedDistance is no BaseDistance)
            do = "make one, as in distance=CosineSimilarity()"
            raise UsageTypeError(f"expected distance as a PML distance or None, got {distance!r}; {do}")
        super().__init__(
            embedding_regularizer, embedding_reg_weight, distance=distance, reducer=reducer, collect_stats=collect_stats
        )
        if not scale > 0:
            raise UsageError(f"expected scale above 0, got {scale}; give its size: distances are negated without it")
        if scale <= 1 and not learn_scale and (span := similarity_span(self.distance)) < math.inf:
            warnings.warn(
                f"a softmax over {type(self.distance).__name__} with scale {scale:g} gives the right one of 5 classes "
                f"at most {1 / (1 + 4 * math.exp(-scale * span)):.2f}; give scale=10 or learn_scale=True",
                stacklevel=2,
            )
        self.log_scale = torch.nn.Parameter(torch.tensor(float(scale)).log(), requires_grad=learn_scale)

    @property
    def scale(self) -> Tensor:
        """The factor by which the similarity is multiplied, a scalar tensor."""
        return self.log_scale.exp()

    @abstractmethod
    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        """Logits of queries (B, D) over W classes, (B, W).

        Args:
            queries: (B, D)
            support: (S, D)
            member: (S, W) of zeros and ones: the class of each support item. On a GPU there are repeats among the
                columns, whose logits are not used.
            own_class: None, or if queries and support are the same items, the class (B,) of each: an item's own class
                is then scored without the item.
        """

    @in_float32
    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        c_f.labels_required(labels)
        with_support = ref_emb is not embeddings
        ref_labels = as_labels(ref_labels, len(ref_emb), "support")[0]
        if len(ref_emb) == 0:
            raise UsageError("expected at least one support item, got none; draw some of the queries' classes")
        if len(embeddings) == 0:
            return self.zero_losses()
        # (W,); on a GPU W is S, with repeats: dropping them would wait for their number
        classes = torch.unique(ref_labels) if ref_labels.is_cpu else ref_labels.sort().values
        repeated = F.pad(classes[1:] == classes[:-1], (1, 0))  # (W,)
        member = (ref_labels.unsqueeze(1) == classes).to(ref_emb.dtype)  # (S, W)
        target = torch.searchsorted(classes, labels.contiguous()).clamp_(max=len(classes) - 1)  # (B,) first of repeats
        missing = classes[target] != labels
        if missing.is_cpu and missing.any():
            got = f"none for classes {labels[missing].unique()[:5].tolist()}"
            raise UsageError(f"expected a support item for the class of every query, got {got}; draw both of the same")
        kept = c_f.torch_arange_from_size(embeddings)
        if not with_support:  # an item alone in its class has no other to be compared with
            kept = (member.sum(dim=0)[target] > 1).nonzero().flatten()
            if len(kept) == 0:
                return self.zero_losses()
        scores = self.class_scores(embeddings, ref_emb, member, None if with_support else target)
        scores = scores.masked_fill(repeated, -math.inf)
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype, using_ref=with_support)
        losses = F.cross_entropy(scores[kept], target[kept], reduction="none") * weights[kept]
        losses = losses.masked_fill(missing[kept], math.nan)
        return {"loss": {"losses": losses, "indices": kept, "reduction_type": "element"}}

    def similarity(self, queries: Tensor, references: Tensor) -> Tensor:
        """(B, D) and (R, D) -> (B, R): the distance's values, negated unless it is a similarity already."""
        values = self.distance(queries, references)
        return values if self.distance.is_inverted else -values


def similarity_span(distance: BaseDistance) -> float:
    """How far apart two values of a distance can be; infinity if unbounded or unknown."""
    if isinstance(distance, EpisodicDistance):
        return distance.span
    if isinstance(distance, LpDistance | DotProductSimilarity) and distance.normalize_embeddings and distance.power > 0:
        return 2.0**distance.power if isinstance(distance, LpDistance) else 2.0
    return math.inf
