"""FewShotTrainer: what `fit`, `run` and evaluation ask of a method. EpisodicTrainer: a method with a PML loss."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.instantiate import Part, instantiate
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers import pml_compat


class FewShotTrainer(nn.Module):
    """A few-shot method as a module (the loop is `fit`); subclasses give at least `forward`, `bank` and `classify`."""

    thread_safe = False  # whether `classify` may run in several threads at once, as the evaluator then has it do

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Returns the scalar loss of a batch; one without `requires_grad` means that there is nothing to learn."""

    @abstractmethod
    def bank(self, dataset: FewShotDataset) -> Tensor:
        """Returns what episodes of a set are gathered from, (M, *item): its embeddings, or its images."""

    @abstractmethod
    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, *item) over the classes of support (E, W, K, *item): logits (E, N, W)."""

    def accuracy(self, batch: Any) -> Tensor | None:
        """Returns the accuracy on the batch last given to `forward`, from what that kept, or None.

        Another pass would update batch norm's statistics and draw dropout again.
        """
        return None

    def check(self, splits: Splits, specs: Sequence[EpisodeSpec | BatchSpec]) -> None:
        """Raises the UsageError that training or evaluation would end with; the first spec is that of training."""

    def exports(self) -> dict[str, nn.Module]:
        """Returns the modules that a run stores in files of their own, by file name."""
        return {}

    def loss_parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters of the loss: proxies, class weights, a learned scale or distance."""
        return ()

    def parameter_groups(self, loss_lr: float | None = None) -> list[dict[str, Any]]:
        """Returns the groups of an optimizer: all in one, or the loss's in one of their own with `loss_lr` as rate."""
        own = {id(p) for p in self.loss_parameters()} if loss_lr is not None else set()
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if id(p) not in own]}]
        if own:
            groups.append({"params": [p for p in self.parameters() if id(p) in own], "lr": loss_lr})
        return groups

    @property
    def distance(self) -> BaseDistance | None:
        """The PML distance that heads and retrieval rank by, if the method has one."""
        return None

    @property
    def divergence_hint(self) -> str:
        """What else to try after a NaN, for the message of `fit`."""
        return ""

    @property
    def transductive(self) -> bool:
        """Whether the queries of an episode inform each other, as result tables say."""
        return False


class EpisodicTrainer(FewShotTrainer):
    """Trains an embedder by a PML loss, with the queries of an episode as `embeddings` and its support as `ref_emb`.

    Args:
        embedder: images to embeddings.
        loss: PML loss, called as `loss(query, query_labels, indices, support, support_labels)`. Its distance also
            classifies at test time and ranks for retrieval.
        miner: PML miner, called as `miner(query, query_labels, support, support_labels)`; none when None. Where it
            finds nothing, or the loss is exactly zero, `fit` skips the step and counts it.
        support_rotations: how many episodes are made of one episode's embedded images, each with the next K images of
            every class as support and the rest as queries; the loss is their mean. 1 is the papers' way. Embedding is
            nearly all of a step's cost, so more rotations give a less noisy gradient almost for free: with 1 shot and
            5 queries, a ProtoNet with 6 had on Omniglot after 2,000 steps (95.2 % at 20-way 1-shot) what one with 1
            had after 4,000.
        head: classifies at test time by the loss's distance.

    Raises:
        UsageError: support_rotations below 1, a miner beside CrossBatchMemory.
    """

    thread_safe = True  # it only reads

    def __init__(
        self,
        embedder: Part[Embedder],
        loss: Part[nn.Module],
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        head: Head = nearest_prototype,
    ) -> None:
        super().__init__()
        check_at_least_one("support_rotations", support_rotations)
        self.embedder = instantiate(embedder)
        self.loss = instantiate(loss)
        pml_compat.persist_pml_state(self.loss)
        pml_compat.zero_without_pairs(self.loss)
        self.miner = instantiate(miner)
        if self.miner is not None and any(isinstance(part, CrossBatchMemory) for part in self.loss.modules()):
            raise UsageError(
                "expected no miner beside CrossBatchMemory, which takes a miner's numbers of batch items for places "
                f"in its memory, got {type(self.miner).__name__}; give it to the memory: CrossBatchMemory(loss, "
                "embedding_size, miner=...)"
            )
        self.support_rotations = support_rotations
        self.head = head
        self._last_episodes: tuple[Tensor, Tensor] | None = None  # support and query embeddings, for `accuracy`

    def check_episodes(self, shots: int, queries: int) -> None:
        """Raises a UsageError when the method cannot be trained on episodes, or on ones of this size."""
        pml_compat.check_supports_ref_emb(self.loss)
        if self.support_rotations * shots > shots + queries:
            raise UsageError(
                f"expected at most {(shots + queries) // shots} support_rotations of {shots} shots and {queries} "
                f"queries, got {self.support_rotations}; lower support_rotations or raise queries"
            )

    def check_batches(self, views: int) -> None:
        """Raises a UsageError when the method cannot be trained on ordinary batches of so many views."""
        raise UsageError(
            "expected an Episode, got a Batch; use train_spec=EpisodeSpec(...), or MetricTrainer for ordinary batches"
        )

    def check(self, splits: Splits, specs: Sequence[EpisodeSpec | BatchSpec]) -> None:
        train_spec = specs[0]
        if isinstance(train_spec, EpisodeSpec):
            self.check_episodes(train_spec.shots, train_spec.queries)
        else:
            self.check_batches(train_spec.views)
            pml_compat.check_batch(self.loss, train_spec.size, int(splits.train.labels.max()))

    def forward(self, batch: Episode | Batch) -> Tensor:
        """Returns the scalar loss: of a batch of episodes the mean over its episodes and support_rotations."""
        self._last_episodes = None
        if isinstance(batch, Batch):
            self.check_batches(1 if batch.other_view is None else 2)
            return self.batch_loss(batch)
        shots, queries = batch.support.shape[2], batch.query.shape[2]
        self.check_episodes(shots, queries)
        embeddings = self.embed(torch.cat([batch.support, batch.query], dim=2))  # (E, W, K+Q, D)
        losses = []
        with torch.autocast(embeddings.device.type, enabled=False):
            for rotation in range(self.support_rotations):
                rotated = embeddings.roll(-rotation * shots, dims=2)
                support, query = rotated[:, :, :shots], rotated[:, :, shots:].flatten(1, 2)
                losses += [self.episode_loss(s, q) for s, q in zip(support, query, strict=True)]
        self._last_episodes = support.detach(), query.detach()
        return torch.stack(losses).mean()

    def embed(self, images: Tensor) -> Tensor:
        """Embeds (..., C, H, W) to (..., D) in one pass, so that batch norm sees all of them, as in papers' code."""
        embeddings = self.embedder(images.flatten(0, -4)).unflatten(0, images.shape[:-3])
        # Under autocast embeddings are bfloat16, whose 8 bits cannot tell near ones apart: distances in float32.
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def batch_loss(self, batch: Batch) -> Tensor:
        """Loss of an ordinary batch by its labels."""
        if batch.labels.is_cpu:  # on a GPU each step would wait for it; `check` has looked at all labels of the set
            pml_compat.check_batch(self.loss, len(batch.labels), int(batch.labels.max()))
        embeddings = self.embed(batch.images)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.mined_loss(embeddings, batch.labels)

    def episode_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """Loss of one episode: support (W, K, D), query (W*Q, D), both in the order of the classes."""
        ways, shots = support.shape[:2]
        classes = torch.arange(ways, device=query.device)
        query_labels = classes.repeat_interleave(len(query) // ways)
        return self.mined_loss(query, query_labels, support.flatten(0, 1), classes.repeat_interleave(shots))

    def mined_loss(self, embeddings: Tensor, labels: Tensor, *support: Tensor) -> Tensor:
        """The loss over what the miner chooses; a zero without a gradient where it finds nothing to learn from.

        Args:
            embeddings: (B, D)
            labels: (B,)
            support: none, or embeddings (S, D) and labels (S,) that they are compared with.
        """
        pml_compat.detach_histogram(self.loss)
        mined = self.miner(embeddings, labels, *support) if self.miner is not None else None
        if mined is not None and not any(len(indices) for indices in mined):
            return embeddings.new_zeros(())
        return skip_if_zero(self.loss(embeddings, labels, mined, *support))

    @torch.no_grad()
    def accuracy(self, batch: Episode | Batch) -> Tensor | None:
        """Returns the accuracy on the last rotation of the episodes last given to `forward`; None after a Batch."""
        if self._last_episodes is None:
            return None
        support, query = self._last_episodes
        ways = support.shape[1]
        true_way = torch.arange(ways, device=query.device).repeat_interleave(query.shape[1] // ways)
        return (self.classify(support, query).argmax(dim=2) == true_way).float().mean()

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """Embeds a whole set: (M, D)."""
        return self.embedder.encode(dataset).embeddings

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, D) by the head over support (E, W, K, D): logits (E, N, W)."""
        return self.head(support, query, self.distance)

    def exports(self) -> dict[str, nn.Module]:
        return {"embedder.safetensors": self.embedder}

    def loss_parameters(self) -> Iterable[nn.Parameter]:
        return self.loss.parameters()

    @property
    def distance(self) -> BaseDistance | None:
        """The PML distance that the embeddings are trained for, if the loss has one; of several losses the first's."""
        return pml_compat.distance_of(self.loss)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the last batch's embeddings."""
        return {**self.__dict__, "_last_episodes": None}


def skip_if_zero(loss: Tensor) -> Tensor:
    """The loss, without its gradient where it is exactly zero (no pair, or none beyond the margins): `fit` skips that.

    Otherwise an optimizer with momentum would move the weights on where nothing was learned. On a GPU, where looking
    would make every step wait for it, the zero keeps its gradient of zeros.
    """
    return loss if not loss.is_cpu or loss.detach() != 0 else loss.detach()
