"""FRNTrainer: feature map reconstruction networks (Wertheimer et al. 2021)."""

from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.reconstruction import feature_map_reconstruction
from pml_fewshot.losses.reconstruction import ReconstructionLoss
from pml_fewshot.parts.instantiate import Part
from pml_fewshot.trainers.base import FewShotTrainer


class FRNTrainer(FewShotTrainer):
    """Trains the embedder so that the feature maps of queries can be reconstructed from those of their class's support.

    Args:
        embedder: ends in a feature map: Conv4, or ResNet12(pool=False).
        loss: ReconstructionLoss, whose penalty, stretch and scale are learned and used to classify at test time.
        miner, support_rotations: see FewShotTrainer.

    Raises:
        UsageError: support_rotations below 1, a loss other than ReconstructionLoss.

    Source: Wertheimer, Tang and Hariharan 2021, "Few-Shot Classification with Feature Map Reconstruction Networks".
    """

    def __init__(
        self,
        embedder: Part[nn.Module],
        loss: Part[ReconstructionLoss],
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
    ) -> None:
        super().__init__(embedder, loss, miner, support_rotations)
        if not isinstance(self.loss, ReconstructionLoss):
            name = type(self.loss).__name__
            raise UsageError(f"expected a ReconstructionLoss, got a {name}; use ProtoNetTrainer for other losses")

    @property
    def classifier(self) -> str:
        return "feature map reconstruction"

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Logits (E, N, W): minus the scaled error of reconstructing each query from each class's support."""
        loss = self.loss
        return feature_map_reconstruction(
            support,
            query,
            nodes=loss.nodes,
            log_penalty=loss.log_penalty,
            log_stretch=loss.log_stretch,
            scale=loss.scale,
        )
