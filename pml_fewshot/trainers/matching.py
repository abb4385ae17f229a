"""MatchingTrainer: Matching networks (Vinyals et al. 2016)."""

from collections.abc import Callable
from functools import partial

from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from pml_fewshot.checks import require
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.evaluation.heads import similarities_to_each
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.parts import build
from pml_fewshot.trainers.episodic import EpisodicTrainer

SCALE = 10.0  # of cosine, to begin with: the softmax over a similarity within +-1 could not get sharp without


class MatchingTrainer(EpisodicTrainer):
    """Trains the embedder so that queries attend to the support items of their class.

    Args:
        embedder: images to embeddings (or a factory of it).
        loss: MatchingLoss (or factory); when None with cosine and a learned scale that begins at 10.
        miner: PML miner (or factory); none when None.
        turns: episodes made of one episode's embedded images; see EpisodicTrainer.
        context: `FullContext(dim)` (or factory) for full-context embeddings, which see each item in the light of the
            support (appendix A of the paper); none when None. Retrieval ranks the embeddings without context.

    Raises:
        ValueError: turns below 1, another loss than MatchingLoss.

    Source: Vinyals et al. 2016, "Matching Networks for One Shot Learning".
    """

    def __init__(
        self,
        embedder: Embedder | Callable[[], Embedder],
        loss: MatchingLoss | Callable[[], MatchingLoss] | None = None,
        miner: BaseMiner | Callable[[], BaseMiner] | None = None,
        turns: int = 1,
        context: FullContext | Callable[[], FullContext] | None = None,
    ) -> None:
        default = partial(MatchingLoss, scale=SCALE, learn_scale=True)
        super().__init__(embedder, default if loss is None else loss, miner, turns)
        require(
            isinstance(self.loss, MatchingLoss),
            "a MatchingLoss",
            f"a {type(self.loss).__name__}",
            "use ProtoNetTrainer or MetricTrainer for other losses",
        )
        self.context = build(context)

    def episode_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """Loss of one episode: support (W, K, D), query (W*Q, D)."""
        if self.context is not None:
            support, query = (part.squeeze(0) for part in self.context(support.unsqueeze(0), query.unsqueeze(0)))
        return super().episode_loss(support, query)

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """The logarithms of the classes' shares of each query's attention, up to a constant: (E, N, W).

        Args:
            support: (E, W, K, D)
            query: (E, N, D)
        """
        if self.context is not None:
            support, query = self.context(support, query)
        return (self.loss.scale * similarities_to_each(support, query, self.distance)).logsumexp(dim=3)
