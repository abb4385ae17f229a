"""FewShotTrainer: the interface of a method for `fit`, `run` and evaluation, by default an embedder with a PML loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_choice
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.distributed import shared
from pml_fewshot.embedders.embedder import check_rows, encode
from pml_fewshot.embedders.modes import eval_mode, widened
from pml_fewshot.embedders.synced_batch_norm import synced
from pml_fewshot.evaluation.heads import (
    Head,
    is_transductive,
    name_of_head,
    nearest_prototype,
    takes_distance,
    unwrapped,
)
from pml_fewshot.losses.episodic_loss import EpisodicLoss
from pml_fewshot.parts.instantiate import Part, instantiate
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers import pml_compat


class FewShotTrainer(nn.Module):
    """A few-shot method as a module (the loop is `fit`): an embedder and a PML loss, or else at least three methods.

    The queries of an episode are the loss's `embeddings`, its support is `ref_emb`. A method of another kind omits
    embedder and loss, and defines its own `forward`, `bank` and `classify`.

    Args:
        embedder: maps images to embeddings: an Embedder, a bare trunk, or one of them in a wrapper (`torch.compile`,
            DataParallel).
        loss: PML loss, called as `loss(query, query_labels, indices, support, support_labels)`. Its distance is also
            used to classify at test time and to rank for retrieval.
        miner: PML miner, called as `miner(query, query_labels, support, support_labels)`; none when None. If it finds
            nothing, or the loss is exactly zero, `fit` skips the step and counts it.
        support_rotations: number of episodes made from one episode's embedded images, each with the next K images of
            every class as support and the rest as queries; the loss is their mean. The papers use 1; more give a less
            noisy gradient almost for free, as embedding is nearly all of a step's cost: on Omniglot, with 1 shot and 5
            queries, a ProtoNet with 6 reached after 2,000 steps what one with 1 reached after 4,000.
        head: classifies at test time with the loss's distance.
        context: module (`SetToSet(dim)`, `FullContext(dim)`) that revises the embeddings of episodes before loss and
            head see them. `context(support (E, W, K, D), query (E, N, D))` returns a pair of the same shapes; K may
            differ, for example 1 if it returns prototypes, and so may D, equally in both. Evaluation calls it in
            several threads, so it must keep no state. Retrieval, and a head passed to an evaluator, see the embeddings
            without it.

    Raises:
        UsageError: support_rotations below 1, a miner in addition to CrossBatchMemory.
    """

    def __init__(
        self,
        embedder: Part[nn.Module] | None = None,
        loss: Part[nn.Module] | None = None,
        miner: Part[BaseMiner] | None = None,
        support_rotations: int = 1,
        head: Head = nearest_prototype,
        context: Part[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one("support_rotations", support_rotations)
        self.embedder: Any = instantiate(embedder)
        self.loss: Any = instantiate(loss)
        self.miner = instantiate(miner)
        self.context: Any = instantiate(context)
        self.support_rotations, self.head = support_rotations, head
        self._last_episodes: tuple[Tensor, Tensor] | None = None  # support and query embeddings, for `accuracy`
        if embedder is not None and not isinstance(self.embedder, nn.Module):
            do = "call it, or wrap it as partial(...)"
            raise UsageTypeError(f"expected a module as embedder, got {self.embedder!r}; {do}")
        if loss is not None:
            pml_compat.check_loss(self.loss)
        parts = list(self.loss.modules()) if loss is not None else []
        pml_compat.patch(parts)
        if self.miner is not None and any(isinstance(part, CrossBatchMemory) for part in parts):
            raise UsageError(
                "expected no miner beside CrossBatchMemory, which takes a miner's numbers of batch items for places in "
                f"its memory, got {type(self.miner).__name__}; give it to the memory: CrossBatchMemory(..., miner=...)"
            )

    def check(self, splits: Splits, specs: Sequence[EpisodeSpec | BatchSpec]) -> None:
        """Raises the UsageError that training or evaluation would end with; the first spec is the training spec."""
        train_spec = specs[0]
        if self.embedder is None:  # a method of another kind
            return
        pml_compat.check_width(self.loss, self.bank(splits.train.first(2)).shape[1])
        if isinstance(train_spec, EpisodeSpec):
            self.check_episodes(train_spec.shots, train_spec.queries)
        else:
            self.check_batches(train_spec.views)
            pml_compat.check_batch(self.loss, train_spec.size, int(splits.train.labels.max()))

    def check_episodes(self, shots: int, queries: int) -> None:
        """Raises a UsageError if the method cannot be trained on episodes, or not on episodes of this size."""
        if self.loss is not None:  # a method may have an episode_loss of its own
            pml_compat.check_supports_ref_emb(self.loss)
        most = (shots + queries) // shots
        if self.support_rotations > most:
            raise UsageError(
                f"expected at most {most} support_rotations of {shots} shots and {queries} queries, got "
                f"{self.support_rotations}; lower support_rotations or raise queries"
            )

    def check_batches(self, views: int) -> None:
        """Raises a UsageError if the method cannot be trained on ordinary batches with this many views."""
        do = "use train_spec=EpisodeSpec(...), or MetricTrainer for ordinary batches"
        raise UsageError(f"expected an Episode, got a Batch; {do}")

    def forward(self, batch: Any) -> Tensor:
        """Returns the scalar loss; for episodes, it is the mean over them and support_rotations.

        A loss without `requires_grad` means that there is nothing to learn.
        """
        self._last_episodes = None
        if isinstance(batch, Batch):
            views = batch.images[None] if batch.other_view is None else torch.stack([batch.images, batch.other_view])
            self.check_batches(len(views))
            if batch.labels.is_cpu:  # on a GPU each step would wait for it; `check` has seen all labels of the dataset
                pml_compat.check_batch(self.loss, len(batch.labels), int(batch.labels.max()))
            embeddings = self.embed(views, 2)
            with torch.autocast(embeddings.device.type, enabled=False):
                return _skip_if_zero(self.batch_loss(embeddings, batch.labels))
        if not isinstance(batch, Episode):
            raise UsageTypeError(
                f"expected an Episode or a Batch, got a {type(batch).__name__}; take an EpisodeStream's"
            )
        shots = batch.support.shape[2]
        self.check_episodes(shots, batch.query.shape[2])
        embeddings = self.embed(torch.cat([batch.support, batch.query], dim=2), 3)  # (E, W, K+Q, D)
        losses = []
        with torch.autocast(embeddings.device.type, enabled=False):
            for rotation in range(self.support_rotations):
                rotated = embeddings.roll(-rotation * shots, dims=2)
                support, query = rotated[:, :, :shots], rotated[:, :, shots:].flatten(1, 2)
                losses += [_skip_if_zero(self.episode_loss(s, q)) for s, q in zip(support, query, strict=True)]
        self._last_episodes = support.detach(), query.detach()
        return torch.stack(losses).mean()

    def embed(self, items: Tensor, axes: int | None = None) -> Tensor:
        """Embeds items to (..., D) in one pass: batch norm sees all of them, as in the papers' code.

        `axes` is the number of axes before an item; when None, items are images (..., C, H, W). Each of several
        processes embeds its share, which is all that its batch norm sees unless it is synchronized.
        """
        axes = items.ndim - 3 if axes is None else axes
        with synced():
            embeddings = check_rows(shared(self.embedder, items.flatten(0, axes - 1)), self.embedder)
        # Under autocast embeddings are bfloat16, whose 8 bits cannot distinguish near ones: distances use float32.
        return widened(embeddings).unflatten(0, items.shape[:axes])

    def batch_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of an ordinary batch: embeddings (V, B, D) of V views, labels (B,)."""
        return self.mined_loss(embeddings[0], labels)

    def episode_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """Loss of one episode: support (W, K, D), query (W*Q, D), both in the order of the classes."""
        support, query = (part.squeeze(0) for part in self.in_context(support.unsqueeze(0), query.unsqueeze(0)))
        ways, shots = support.shape[:2]
        classes = torch.arange(ways, device=query.device)
        query_labels = classes.repeat_interleave(len(query) // ways)
        return self.mined_loss(query, query_labels, support.flatten(0, 1), classes.repeat_interleave(shots))

    def in_context(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Support (E, W, K, D) and query (E, N, D) as revised by the context; unchanged if there is none."""
        if self.context is None:
            return support, query
        revised, revised_query = self.context(support, query)
        got = tuple(revised.shape), tuple(revised_query.shape)
        if len(got[0]) != 4 or got[0][:2] != support.shape[:2] or got[1] != (*query.shape[:2], got[0][3]):
            name, given = type(self.context).__name__, (tuple(support.shape), tuple(query.shape))
            wanted = f"support (E, W, K, D) and queries (E, N, D) from {name} for shapes {given[0]} and {given[1]}"
            raise UsageError(f"expected {wanted}, got shapes {got[0]} and {got[1]}; return both, in this order")
        return revised, revised_query

    def mined_loss(self, embeddings: Tensor, labels: Tensor, *support: Tensor) -> Tensor:
        """The loss over the miner's choices; a zero without a gradient if it finds nothing.

        Embeddings (B, D), labels (B,); they may be compared with support, embeddings (S, D) and labels (S,).
        """
        mined = self.miner(embeddings, labels, *support) if self.miner is not None else None
        if mined is not None and not any(len(indices) for indices in mined):
            return embeddings.new_zeros(())
        return self.loss(embeddings, labels, mined, *support)

    @torch.no_grad()
    def accuracy(self, batch: Any) -> Tensor | None:
        """Returns the accuracy on the last rotation of the episodes last given to `forward`; None after a Batch.

        It uses the stored embeddings: another pass would update batch norm's statistics and draw dropout again. A
        context or a distance that has these is used in eval mode.
        """
        if self._last_episodes is None:
            return None
        support, query = self._last_episodes
        ways = support.shape[1]
        true_way = torch.arange(ways, device=query.device).repeat_interleave(query.shape[1] // ways)
        with eval_mode(*(part for part in (self.context, self.distance) if part is not None)):
            return (self.classify(support, query).argmax(dim=2) == true_way).float().mean()

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """Returns the items that a dataset's episodes are gathered from, (M, *item): embeddings (M, D) or images."""
        return encode(self.embedder, dataset).embeddings

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores queries (E, N, *item) over the classes of support (E, W, K, *item): logits (E, N, W)."""
        distance = [self.distance] if takes_distance(self.head) else []
        return self.head(*self.in_context(support, query), *distance)

    def exports(self) -> dict[str, nn.Module]:
        """Returns the modules that a run stores in their own files, by file name."""
        return {} if self.embedder is None else {"embedder.safetensors": self.embedder}

    def parameter_groups(self, rates: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Returns parameter groups for an optimizer: first the rest, then one for each part with its own rate.

        Args:
            rates: learning rates by part name: `{"embedder.trunk": 1e-4, "loss": 1e-2}` (the loss's parameters are
                proxies, class weights, a learned scale or distance). If two names match, the longer one counts.

        Raises:
            UsageError: a part without parameters, other than the loss.
        """
        rates = rates or {}
        # by all names, because a part may have several
        own = {name: {weight} for name, weight in self.named_parameters(remove_duplicate=False)}
        modules = [(name, module) for name, module in self.named_modules(remove_duplicate=False) if name]
        own |= {name: weights for name, module in modules if (weights := set(module.parameters()))}
        part_of: dict[nn.Parameter, str] = {}
        for part, rate in sorted(rates.items(), key=lambda item: len(item[0])):
            if not isinstance(rate, int | float) or not rate >= 0:
                raise UsageError(f"expected the learning rate of {part} as a number of at least 0, got {rate!r}")
            if part != "loss":
                check_choice("a part with a learning rate", part, list(own))
            part_of |= dict.fromkeys(own.get(part, ()), part)
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            groups.setdefault(part_of.get(parameter, ""), []).append(parameter)
        rest = [{"params": groups.pop("")}] if "" in groups else []
        return rest + [{"name": part, "params": groups[part], "lr": rates[part]} for part in rates if part in groups]

    @property
    def distance(self) -> BaseDistance | None:
        """The PML distance that heads and retrieval rank by, if the loss has one; the first's for several losses."""
        return pml_compat.distance_of(self.loss)

    @property
    def classifier(self) -> str:
        """Description of `classify` for tables: the head and its distance, or that it is the trainer's own."""
        own = type(self).classify is not FewShotTrainer.classify
        distance = self.distance if takes_distance(self.head) else None
        name = f"{type(self).__name__}'s own" if own else name_of_head(self.head, distance)
        return name if self.context is None else f"{name} in context of {type(self.context).__name__}"

    @property
    def thread_safe(self) -> bool:
        """Whether `classify` may run in several threads at once, which the evaluator then does: a head only reads."""
        return self.embedder is not None

    @property
    def divergence_hint(self) -> str:
        """What else to try after a NaN, for the message of `fit`."""
        return ""

    @property
    def logit_scale(self) -> float:
        """Factor for the logits of `classify` before a softmax turns them into probabilities: the scale of the loss.

        The class with the largest logit does not depend on it, so `classify` leaves it out.
        """
        own = type(self).classify is not FewShotTrainer.classify
        by_loss = isinstance(self.loss, EpisodicLoss) and unwrapped(self.head)[0] is nearest_prototype
        return float(self.loss.scale) if by_loss and not own else 1.0

    @property
    def adaptation_steps(self) -> int:
        """Number of inner steps in evaluation; 0 if nothing adapts to an episode."""
        return 0

    @property
    def transductive(self) -> bool:
        """Whether the queries of an episode inform each other, as result tables say."""
        return is_transductive(self.head)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles: everything but the last batch's embeddings."""
        return {**self.__dict__, "_last_episodes": None}


def _skip_if_zero(loss: Tensor) -> Tensor:
    """The loss, detached if it is exactly zero (no pair, or none beyond the margins), so that `fit` skips the step.

    Otherwise an optimizer with momentum would keep moving the weights when nothing was learned. On a GPU, where the
    check would make every step wait for it, the zero keeps its gradient of zeros.
    """
    return loss if not loss.is_cpu or loss.detach() != 0 else loss.detach()
