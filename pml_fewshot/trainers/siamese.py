"""SiameseTrainer: Siamese networks (Koch et al. 2015), a learned similarity trained on pairs."""

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.heads import Head, mean_similarity
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.parts.instantiate import Part
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.pml_compat import check_no_classes_kept


class SiameseTrainer(FewShotTrainer):
    """Trains embedder and similarity to distinguish pairs of one class from pairs of two.

    An episode's support and queries, or an ordinary batch, form one set of labeled images, from which the loss (or the
    miner) chooses pairs.

    Args:
        embedder: maps images to embeddings. Its outputs should have both signs, as with `Conv4(last_relu=False)`: a
            ReLU or a sigmoid at its end flattens differences that |q - r| should see.
        loss: `PairVerificationLoss()` with `WeightedL1Similarity()` when None; or any PML loss of pairs or triplets
            with such a distance (or any other).
        miner: PML miner of pairs or triplets; none when None.
        head: classifies at test time: `mean_similarity` to a class's support items, or `nearest_neighbour` for the best
            of them.

    Source: Koch, Zemel and Salakhutdinov 2015, "Siamese Neural Networks for One-shot Image Recognition".
    """

    def __init__(
        self,
        embedder: Part[nn.Module],
        loss: Part[BaseMetricLossFunction] | None = None,
        miner: Part[BaseMiner] | None = None,
        head: Head = mean_similarity,
    ) -> None:
        super().__init__(embedder, PairVerificationLoss() if loss is None else loss, miner, head=head)

    def check_batches(self, views: int) -> None:
        if views != 1:
            raise UsageError("expected batches of one view, got two; use BatchSpec(views=1), or MetricTrainer")

    def check_episodes(self, shots: int, queries: int) -> None:
        check_no_classes_kept(self.loss)

    def episode_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """Loss over pairs of one episode's items, support (W, K, D) and query (W*Q, D)."""
        items = torch.cat([support, query.unflatten(0, (len(support), -1))], dim=1)  # (W, K+Q, D)
        labels = torch.arange(len(items), device=items.device).repeat_interleave(items.shape[1])
        return self.mined_loss(items.flatten(0, 1), labels)
