"""MetricTrainer: any PML loss, with or without a miner, on ordinary labeled batches or on episodes."""

from pytorch_metric_learning.losses import ManifoldLoss, MultiSimilarityLoss
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.parts.instantiate import Part
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.pml_compat import WITH_LABELS, WITHOUT_LABELS


class MetricTrainer(FewShotTrainer):
    """Trains an embedder with any PML loss, on batches (`BatchStream`) or on episodes (`EpisodeStream`).

    For a Batch the call is `loss(embeddings, labels, mined)`, or `loss(embeddings, ref_emb=views)` without labels if
    its images have a second view, for SelfSupervisedLoss and VICRegLoss; ManifoldLoss uses no labels either. For an
    Episode, queries are the embeddings and support is `ref_emb`, for losses that accept it. The loss's own parameters
    (proxies, class weights, margins, a learned distance) belong to the trainer, which trains, moves and saves them.

    Args:
        embedder, miner, support_rotations, head: see FewShotTrainer.
        loss: PML loss or wrapper, including CrossBatchMemory and MultipleLosses; `MultiSimilarityLoss()` when None,
            which has no parameters, compares all pairs and needs no miner.

    Raises:
        UsageError: on episodes, a loss that does not accept them; labels above the classes that a loss has weights for;
            two views and a loss that uses labels, or vice versa.
    """

    def __init__(
        self,
        embedder: Part[nn.Module],
        loss: Part[nn.Module] | None = None,
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        head: Head = nearest_prototype,
    ) -> None:
        super().__init__(embedder, MultiSimilarityLoss() if loss is None else loss, miner, support_rotations, head)

    def check_batches(self, views: int) -> None:
        name, labeled = type(self.loss).__name__, not isinstance(self.loss, WITHOUT_LABELS)
        if labeled and views == 1:
            return
        if labeled and isinstance(self.loss, WITH_LABELS):
            wanted = "a loss without labels for batches of two views, SelfSupervisedLoss or VICRegLoss"
            do = "wrap it in SelfSupervisedLoss, or use BatchSpec(views=1)"
            raise UsageError(f"expected {wanted}, got {name}; {do}")
        if views == 1 and not isinstance(self.loss, ManifoldLoss):
            raise UsageError(f"expected two views of each image for {name}, got one; use BatchSpec(views=2)")
        if self.miner is not None:
            miner = type(self.miner).__name__
            raise UsageError(f"expected no miner beside {name}, which takes no labels, got {miner}; drop it")

    def batch_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch: from its labels, from its two views, or for ManifoldLoss from its images alone."""
        if isinstance(self.loss, ManifoldLoss):
            return self.loss(embeddings[0])
        if len(embeddings) == 2:
            return self.loss(embeddings[0], ref_emb=embeddings[1])
        return super().batch_loss(embeddings, labels)
