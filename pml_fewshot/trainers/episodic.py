"""EpisodicTrainer: trains a PML loss on episodes, with the queries as `embeddings` and the support as `ref_emb`."""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from pytorch_metric_learning.distances import BaseDistance
from pytorch_metric_learning.losses import CrossBatchMemory, NCALoss, ProxyNCALoss
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import check_at_least_one, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.parts import build
from pml_fewshot.trainers.loss_checks import check_takes_support, not_on_episodes
from pml_fewshot.trainers.pml_state import cut_graph_of_last_step, keep_pml_state


class EpisodicTrainer(nn.Module):
    """What ProtoNetTrainer, MatchingTrainer, SiameseTrainer and MetricTrainer have in common.

    Args:
        embedder: images to embeddings (or a factory of it).
        loss: PML loss (or factory) called as `loss(query, query_labels, indices, support, support_labels)`. Its
            distance also classifies at test time and ranks for retrieval.
        miner: PML miner (or factory) called as `miner(query, query_labels, support, support_labels)`; none when None.
            Where it finds nothing at all, or the loss is exactly zero, the step is skipped, and `fit` counts it.
        turns: how many episodes are made of one episode's embedded images, each with the next K images of every class
            as support and the rest as queries; the loss is their mean. 1 is the papers' way. Embedding is nearly all
            of a step's cost, so more turns are a less noisy gradient almost for free: with 1 shot and 5 queries, 6
            turns of a ProtoNet had on Omniglot after 2,000 steps (95.2 % at 20-way 1-shot) what 1 turn had after 4,000.

    Raises:
        ValueError: turns below 1, a loss that cannot compare queries with a support set, a miner beside a memory.
    """

    def __init__(
        self,
        embedder: Embedder | Callable[[], Embedder],
        loss: nn.Module | Callable[[], nn.Module],
        miner: BaseMiner | Callable[[], BaseMiner] | None = None,
        turns: int = 1,
    ) -> None:
        super().__init__()
        check_at_least_one("turns", turns)
        self.embedder = build(embedder)
        self.loss = build(loss)
        keep_pml_state(self.loss)
        self.miner = build(miner)
        require(
            self.miner is None or not any(isinstance(part, CrossBatchMemory) for part in self.loss.modules()),
            "no miner beside CrossBatchMemory, which takes a miner's numbers of batch items for places in its memory",
            type(self.miner).__name__,
            "give it to the memory: CrossBatchMemory(loss, embedding_size, miner=...)",
        )
        self.turns = turns
        self.batch_accuracy: Tensor | None = None  # of the last batch, to be shown while training

    @abstractmethod
    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, D) over the classes of support (E, W, K, D): logits (E, N, W)."""

    def forward(self, batch: Episode) -> Tensor:
        """Returns the scalar loss of a batch of episodes, the mean over its episodes and turns."""
        require(
            isinstance(batch, Episode),
            "an Episode",
            f"a {type(batch).__name__}",
            "use train_spec=EpisodeSpec(...), or MetricTrainer for ordinary batches",
        )
        shots, queries = batch.support.shape[2], batch.query.shape[2]
        require(
            self.turns * shots <= shots + queries,
            f"at most {(shots + queries) // shots} turns of {shots} shots and {queries} queries",
            f"{self.turns}",
            "lower turns or raise queries",
        )
        embeddings = self.embed(torch.cat([batch.support, batch.query], dim=2))  # (E, W, K+Q, D)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self._mean_loss(embeddings, shots)

    def embed(self, images: Tensor) -> Tensor:
        """Embeds (..., C, H, W) to (..., D) in one pass, so that batch norm sees all of them, as in papers' code."""
        embeddings = self.embedder(images.flatten(0, -4)).unflatten(0, images.shape[:-3])
        # Under autocast embeddings are bfloat16, whose 8 bits cannot tell near ones apart: distances in float32.
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def _mean_loss(self, embeddings: Tensor, shots: int) -> Tensor:
        """Mean loss over episodes and turns of embeddings (E, W, K+Q, D)."""
        ways, queries = embeddings.shape[1], embeddings.shape[2] - shots
        true_class = torch.arange(ways, device=embeddings.device).repeat_interleave(queries)
        losses = []
        for turn in range(self.turns):
            turned = embeddings.roll(-turn * shots, dims=2)
            support, query = turned[:, :, :shots], turned[:, :, shots:].flatten(1, 2)
            losses += [self.episode_loss(s, q) for s, q in zip(support, query, strict=True)]
        with torch.no_grad():  # of the last turn: enough to be shown
            self.batch_accuracy = (self.classify(support, query).argmax(dim=2) == true_class).float().mean()
        return torch.stack(losses).mean()

    def episode_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """Loss of one episode: support (W, K, D), query (W*Q, D), both in the order of the classes."""
        ways, shots = support.shape[:2]
        classes = torch.arange(ways, device=query.device)
        support_labels = classes.repeat_interleave(shots)
        query_labels = classes.repeat_interleave(len(query) // ways)
        return self.mined_loss(query, query_labels, support.flatten(0, 1), support_labels)

    def mined_loss(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """The loss over what the miner chooses; a zero without a gradient where it finds nothing to learn from."""
        cut_graph_of_last_step(self.loss)
        mined = self.miner(embeddings, labels, ref_emb, ref_labels) if self.miner is not None else None
        if mined is not None and not any(len(indices) for indices in mined):
            return embeddings.new_zeros(())
        if ref_emb is None:
            if isinstance(self.loss, NCALoss) and not isinstance(self.loss, ProxyNCALoss) and _no_two_alike(labels):
                return embeddings.new_zeros(())  # PML's value is NaN
            return skip_if_zero(self.loss(embeddings, labels, mined))
        check_takes_support(self.loss)
        try:
            loss = self.loss(embeddings, labels, mined, ref_emb, ref_labels)
        except ValueError as error:
            if "not supported for this loss" not in str(error):
                raise
            raise not_on_episodes(self.loss, str(error)) from error
        return skip_if_zero(loss)

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """Embeds a whole set: (M, D)."""
        return self.embedder.encode(dataset).embeddings

    @property
    def distance(self) -> BaseDistance | None:
        """The PML distance that the embeddings are trained for, if the loss has one; of several losses the first's."""
        return distance_of(self.loss)


def skip_if_zero(loss: Tensor) -> Tensor:
    """The loss, without its gradient where it is exactly zero (no pair, or none beyond the margins): `fit` skips that.

    Else an optimizer with momentum would go on moving the weights where nothing was learned.
    """
    return loss if loss.detach() != 0 else loss.detach()


def distance_of(loss: nn.Module) -> BaseDistance | None:
    """The distance of a PML loss, of the loss within a wrapper, or of the first of MultipleLosses."""
    if hasattr(loss, "distance"):
        return loss.distance
    within = getattr(loss, "loss", None) or getattr(loss, "losses", None)
    if isinstance(within, nn.ModuleDict | nn.ModuleList):
        parts: Iterable[nn.Module] = within.values() if isinstance(within, nn.ModuleDict) else within
        within = next(iter(parts), None)
    return distance_of(within) if isinstance(within, nn.Module) else None


def _no_two_alike(labels: Tensor) -> bool:
    return len(labels.unique()) == len(labels)
