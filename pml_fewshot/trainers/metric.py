"""MetricTrainer: any PML loss, with or without a miner, on ordinary labeled batches or on episodes."""

import torch
from pytorch_metric_learning.losses import ManifoldLoss, MultiSimilarityLoss
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.instantiate import Part
from pml_fewshot.sampling.batches import Batch
from pml_fewshot.trainers.base import EpisodicTrainer, skip_if_zero
from pml_fewshot.trainers.pml_compat import WITH_LABELS, WITHOUT_LABELS


class MetricTrainer(EpisodicTrainer):
    """Trains an embedder by any PML loss, on batches (`BatchStream`) or on episodes (`EpisodeStream`).

    A Batch is a call `loss(embeddings, labels, mined)`; with a second view of its images, for SelfSupervisedLoss and
    VICRegLoss, it is `loss(embeddings, ref_emb=views)` without labels; ManifoldLoss takes none either. An Episode is a
    call with queries as embeddings and support as `ref_emb`, for the losses that take it. The loss's own parameters
    (proxies, class weights, margins, a learned distance) are the trainer's, and so trained, moved and saved with it.

    Args:
        embedder, miner, support_rotations, head: see EpisodicTrainer.
        loss: PML loss or wrapper, CrossBatchMemory and MultipleLosses too; `MultiSimilarityLoss()` when None, which
            has no parameters, compares all pairs and needs no miner.

    A batch without anything to learn from (no pair within the miner's or the loss's margins, one class alone) gives a
    zero without a gradient, which `fit` skips and counts.

    Raises:
        UsageError: on episodes, a loss that cannot take them; labels above the classes that a loss has weights for;
            two views and a loss that takes labels, or the other way round.
    """

    def __init__(
        self,
        embedder: Part[Embedder],
        loss: Part[nn.Module] | None = None,
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        head: Head = nearest_prototype,
    ) -> None:
        super().__init__(embedder, MultiSimilarityLoss() if loss is None else loss, miner, support_rotations, head)

    def check_batches(self, views: int) -> None:
        name = type(self.loss).__name__
        if isinstance(self.loss, WITHOUT_LABELS):
            if views == 1 and not isinstance(self.loss, ManifoldLoss):
                raise UsageError(f"expected two views of each image for {name}, got one; use BatchSpec(views=2)")
        elif views == 1:
            return
        elif isinstance(self.loss, WITH_LABELS):
            raise UsageError(
                "expected a loss without labels for batches of two views, SelfSupervisedLoss or VICRegLoss, got "
                f"{name}; wrap it in SelfSupervisedLoss, or use BatchSpec(views=1)"
            )
        if self.miner is not None:
            miner = type(self.miner).__name__
            raise UsageError(f"expected no miner beside {name}, which takes no labels, got {miner}; drop it")

    def batch_loss(self, batch: Batch) -> Tensor:
        """Loss of a batch: by its labels, by its two views, or of ManifoldLoss by its images alone."""
        if batch.other_view is None and not isinstance(self.loss, WITHOUT_LABELS):
            return super().batch_loss(batch)
        embeddings = self.embed(torch.stack([view for view in (batch.images, batch.other_view) if view is not None]))
        with torch.autocast(embeddings.device.type, enabled=False):
            if isinstance(self.loss, ManifoldLoss):
                return skip_if_zero(self.loss(embeddings[0]))
            return skip_if_zero(self.loss(embeddings[0], ref_emb=embeddings[1]))
