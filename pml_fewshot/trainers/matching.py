"""MatchingTrainer: Matching networks (Vinyals et al. 2016)."""

from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.heads import Similarities
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.evaluation.support import Support
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.parts.instantiate import Part
from pml_fewshot.trainers.base import FewShotTrainer

SCALE = 10.0  # initial scale of cosine: without it, the softmax over a similarity within +-1 could not become sharp


class MatchingTrainer(FewShotTrainer):
    """Trains the embedder so that queries attend to the support items of their class.

    Args:
        embedder, miner, support_rotations: see FewShotTrainer.
        loss: MatchingLoss; when None, with cosine and a learned scale that starts at 10.
        context: `FullContext(dim)` for full-context embeddings, which embed each item in the light of the support
            (appendix A of the paper), or another context, see FewShotTrainer; none when None.

    Raises:
        UsageError: support_rotations below 1, a loss other than MatchingLoss.

    Source: Vinyals et al. 2016, "Matching Networks for One Shot Learning".
    """

    def __init__(
        self,
        embedder: Part[nn.Module],
        loss: Part[MatchingLoss] | None = None,
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        context: Part[nn.Module] | None = None,
    ) -> None:
        loss = MatchingLoss(scale=SCALE, learn_scale=True) if loss is None else loss
        super().__init__(embedder, loss, miner, support_rotations, context=context)
        if not isinstance(self.loss, MatchingLoss):
            name = type(self.loss).__name__
            raise UsageError(f"expected a MatchingLoss, got a {name}; use MetricTrainer for other losses")

    @property
    def classifier(self) -> str:
        context = "" if self.context is None else f" in context of {type(self.context).__name__}"
        return f"attention by {Ranking.of(self.distance)}{context}"

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Logarithms (E, N, W) of each class's share, up to a constant, of a query's attention to the support."""
        support, query = self.in_context(support, query)
        each = Similarities(support.flatten(1, 2), self.distance)(query)
        return Support.of(support).by_class(self.loss.scale * each, "logsumexp")
