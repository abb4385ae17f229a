"""ProtoNetTrainer: prototypical networks (Snell et al. 2017), or any PML loss that takes `ref_emb` in their place."""

from collections.abc import Callable

from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.episodic import EpisodicTrainer
from pml_fewshot.trainers.loss_checks import check_takes_support


class ProtoNetTrainer(EpisodicTrainer):
    """Embeds support and query together, and trains the embedder so that queries lie near their class's prototype.

    Args:
        embedder: images to embeddings (or a factory of it).
        loss: `PrototypicalLoss()` when None; or any PML loss (or factory) that takes `ref_emb`.
        miner: PML miner (or factory); none when None.
        turns: episodes made of one episode's embedded images; see EpisodicTrainer.
        head: classifies at test time: `nearest_prototype`, or `nearest_neighbour` for the nearest support item.

    Raises:
        ValueError: turns below 1, a loss that cannot compare queries with a support set.
    """

    def __init__(
        self,
        embedder: Embedder | Callable[[], Embedder],
        loss: BaseMetricLossFunction | Callable[[], BaseMetricLossFunction] | None = None,
        miner: BaseMiner | Callable[[], BaseMiner] | None = None,
        turns: int = 1,
        head: Head = nearest_prototype,
    ) -> None:
        super().__init__(embedder, PrototypicalLoss() if loss is None else loss, miner, turns)
        check_takes_support(self.loss)
        self.head = head

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, D) by the head over support (E, W, K, D): logits (E, N, W)."""
        return self.head(support, query, self.distance)
