"""MetricTrainer: any PML loss, with or without a miner, on ordinary labelled batches or on episodes."""

from collections.abc import Callable

import torch
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    CrossBatchMemory,
    ManifoldLoss,
    MultipleLosses,
    MultiSimilarityLoss,
    SelfSupervisedLoss,
    VICRegLoss,
)
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.batches import Batch
from pml_fewshot.checks import require
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.trainers.episodic import EpisodicTrainer, skip_if_zero
from pml_fewshot.trainers.loss_checks import check_batch

WITHOUT_LABELS = (ManifoldLoss, SelfSupervisedLoss, VICRegLoss)
WITH_LABELS = (BaseMetricLossFunction, MultipleLosses, CrossBatchMemory)  # all others of PML, and ours


class MetricTrainer(EpisodicTrainer):
    """Trains an embedder by any PML loss, on batches (`BatchStream`) or on episodes (`EpisodeStream`).

    A Batch is a call `loss(embeddings, labels, mined)`; with a second view of its images, for SelfSupervisedLoss and
    VICRegLoss, it is `loss(embeddings, ref_emb=views)` without labels; ManifoldLoss takes none either. An Episode is a
    call with queries as embeddings and support as `ref_emb`, for the losses that take it. The loss's own parameters
    (proxies, class weights, margins, a learned distance) are the trainer's, and so trained, moved and saved with it.

    Args:
        embedder: images to embeddings (or a factory of it).
        loss: PML loss or wrapper, CrossBatchMemory and MultipleLosses too (or a factory); `MultiSimilarityLoss()` when
            None, which has no parameters, compares all pairs and needs no miner.
        miner: PML miner (or factory); none when None.
        turns: of episodes; see EpisodicTrainer.
        head: classifies at test time, by the loss's distance.

    A batch without anything to learn from (no pair within the miner's or the loss's margins, one class alone) gives a
    zero without a gradient, which `fit` skips and counts.

    Raises:
        ValueError: on episodes, a loss that cannot take them; labels above the classes that a loss has weights for;
            two views and a loss that takes labels, or the other way round.
    """

    def __init__(
        self,
        embedder: Embedder | Callable[[], Embedder],
        loss: nn.Module | Callable[[], nn.Module] | None = None,
        miner: BaseMiner | Callable[[], BaseMiner] | None = None,
        turns: int = 1,
        head: Head = nearest_prototype,
    ) -> None:
        super().__init__(embedder, MultiSimilarityLoss() if loss is None else loss, miner, turns)
        self.head = head

    def forward(self, batch: Batch | Episode) -> Tensor:
        """Returns the scalar loss of a batch, or the mean of a batch of episodes."""
        if isinstance(batch, Episode):
            return super().forward(batch)
        views = [batch.images] if batch.other_view is None else [batch.images, batch.other_view]
        embeddings = self.embed(torch.stack(views))
        with torch.autocast(embeddings.device.type, enabled=False):
            if isinstance(self.loss, WITHOUT_LABELS) or batch.other_view is not None:
                return skip_if_zero(self._unlabelled_loss(*embeddings))
            check_batch(self.loss, batch.labels)
            return self.mined_loss(embeddings[0], batch.labels)

    def _unlabelled_loss(self, embeddings: Tensor, other_view: Tensor | None = None) -> Tensor:
        name = type(self.loss).__name__
        require(
            self.miner is None, f"no miner beside {name}, which takes no labels", type(self.miner).__name__, "drop it"
        )
        if isinstance(self.loss, ManifoldLoss):
            return self.loss(embeddings)
        require(other_view is not None, f"two views of each image for {name}", "one", "use BatchSpec(views=2)")
        require(
            isinstance(self.loss, WITHOUT_LABELS) or not isinstance(self.loss, WITH_LABELS),
            "a loss without labels for batches of two views, SelfSupervisedLoss or VICRegLoss",
            name,
            "wrap it in SelfSupervisedLoss, or use BatchSpec(views=1)",
        )
        return self.loss(embeddings, ref_emb=other_view)

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, D) by the head over support (E, W, K, D): logits (E, N, W)."""
        return self.head(support, query, self.distance)
