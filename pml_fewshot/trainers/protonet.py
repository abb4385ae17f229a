"""ProtoNetTrainer: prototypical networks (Snell et al. 2017), or any PML loss that accepts `ref_emb` in their place."""

from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import nn

from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.parts.instantiate import Part
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.pml_compat import check_supports_ref_emb


class ProtoNetTrainer(FewShotTrainer):
    """Embeds support and query together, and trains the embedder so that queries lie near their class's prototype.

    Args:
        embedder, miner, support_rotations, context: see FewShotTrainer. With `context=SetToSet(dim)`, this is FEAT.
        loss: `PrototypicalLoss()` when None; or any PML loss that accepts `ref_emb`.
        head: classifies at test time: `nearest_prototype`, or `nearest_neighbour` for the nearest support item.

    Raises:
        UsageError: support_rotations below 1, a loss that cannot compare queries with a support set.

    Source: Snell et al. 2017, "Prototypical Networks for Few-shot Learning".
    """

    def __init__(
        self,
        embedder: Part[nn.Module],
        loss: Part[BaseMetricLossFunction] | None = None,
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        head: Head = nearest_prototype,
        context: Part[nn.Module] | None = None,
    ) -> None:
        loss = PrototypicalLoss() if loss is None else loss
        super().__init__(embedder, loss, miner, support_rotations, head, context)
        check_supports_ref_emb(self.loss)
