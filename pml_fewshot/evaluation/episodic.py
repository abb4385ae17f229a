"""EpisodicEvaluator: the accuracy of a method over thousands of episodes, from embeddings computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pml_fewshot.checks import check_at_least_one, check_finite, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.evaluation.memory import free_memory

# Floats gathered at a time on a CPU where the caller does not say: 4 MiB stay in a cache while they are scored. A GPU
# gets a share of its free memory; heads need several times what is gathered, some for every pair of items.
CPU_CHUNK = 2**20
SHARE_OF_FREE_MEMORY = 1 / 32


class Judged(Protocol):
    """What can be evaluated: every trainer, or anything with these two methods."""

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """(M, *item): a data set's embeddings, or its images for methods that adapt to each episode."""

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Support (E, W, K, *item) and query (E, N, *item) to logits (E, N, W)."""


@dataclass(frozen=True)
class EpisodicResult:
    """Accuracy over episodes, as fractions of 1.

    Args:
        mean: mean accuracy over the episodes.
        ci95: half the width of its 95 % confidence interval, 1.96 standard errors of the mean over episodes.
        per_episode: (E,) accuracy of each episode, on the CPU, for paired comparisons.
        spec: size of the episodes.
        seed: seed that the episodes were drawn with.
        episodes_hash: identifies the list of episodes; results with equal hashes are on the same episodes.
        classes: (C,) labels of the set's classes, ascending, where the confusion matrix was asked for.
        confusion: (C, C) int64, how many queries of each class (row) were taken for each class (column), over all
            episodes, where it was asked for.
    """

    mean: float
    ci95: float
    per_episode: Tensor
    spec: EpisodeSpec
    seed: int
    episodes_hash: str
    classes: Tensor | None = None
    confusion: Tensor | None = None

    def per_class(self) -> tuple[Tensor, Tensor]:
        """Labels (C,) of the classes and the share (C,) of each one's queries that was classified rightly.

        A class that no episode drew has NaN.

        Raises:
            ValueError: the confusion matrix was not asked for.
        """
        if self.classes is None or self.confusion is None:
            raise ValueError("expected a result with its confusion matrix, got none; use evaluate(..., confusion=True)")
        return self.classes, self.confusion.diagonal() / self.confusion.sum(dim=1)

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} +- {100 * self.ci95:.2f} % ({self.spec}, {len(self.per_episode)} episodes)"


class EpisodicEvaluator:
    """Evaluates on a fixed list of episodes: the same seed gives the same episodes on every machine and device.

    Args:
        spec: size of the episodes.
        num_episodes: 10,000, for 600 give an interval wider than most methods differ by (0.2 points at 98.9 % on
            Omniglot, and more where the accuracy is lower).
        seed: of the episodes.
        chunk: episodes scored at a time; when None as many as fill a CPU's cache, or a share of a GPU's free memory.
            The result does not depend on it.
        head: classifies in place of the trainer's own `classify`, and for a bank alone, where it is nearest_prototype
            when None: any function of support (E, W, K, D) and query (E, N, D), such as `ridge_regression`,
            `partial(k_nearest_neighbours, k=5)` or `partial(nearest_prototype, distance=CosineSimilarity())`.
    """

    def __init__(
        self,
        spec: EpisodeSpec,
        num_episodes: int = 10_000,
        seed: int = 0,
        chunk: int | None = None,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_at_least_one("num_episodes", num_episodes)
        require(num_episodes > 1, "num_episodes above 1", "1", "an interval needs at least two episodes")
        if chunk is not None:
            check_at_least_one("chunk", chunk)
        self.spec = spec
        self.num_episodes = num_episodes
        self.seed = seed
        self.chunk = chunk
        self.head = head

    def check(self, dataset: FewShotDataset | EmbeddingBank) -> None:
        """Raises the ValueError that `evaluate` would, when the set has too few classes or items for the spec."""
        EpisodeSampler(dataset.labels, self.spec, torch.Generator())

    @torch.no_grad()
    def evaluate(
        self,
        trainer: Judged | EmbeddingBank,
        dataset: FewShotDataset | EmbeddingBank | None = None,
        bank: Tensor | None = None,
        confusion: bool = False,
    ) -> EpisodicResult:
        """Evaluates `trainer` on episodes of `dataset`, or a bank of embeddings on its own: `evaluate(bank)`.

        Args:
            trainer: a trainer, or anything with `bank(dataset)` and `classify(support, query)`; or an EmbeddingBank,
                made by whatever tool, to be classified by the head.
            dataset: the classes to judge on, as images or as embeddings.
            bank: `trainer.bank(dataset)` where it is at hand already (for several specs on one set).
            confusion: count which class was taken for which; 8 bytes for each pair of classes.

        Raises:
            ValueError: the set has too few classes or items for the spec, or the bank or the logits hold NaN.
        """
        classify, labelled, bank = self._sources(trainer, dataset, bank)
        labels = labelled.labels.cpu()
        require(len(bank) == len(labels), f"a bank of {len(labels)} items", f"{len(bank)}", "encode this very data set")
        check_finite(bank, "bank")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = EpisodeSampler(labels, self.spec, generator).sample(self.num_episodes)
        episodes = drawn.to(bank.device)
        true_way = torch.arange(self.spec.ways, device=bank.device).repeat_interleave(self.spec.queries)
        chunk = self.chunk or self._default_chunk(bank)
        accuracies, predicted = [], []
        for start in range(0, self.num_episodes, chunk):
            part = episodes[start : start + chunk]
            logits = classify(_gather(bank, part.support), _gather(bank, part.query).flatten(1, 2))
            expected = (len(part), len(true_way), self.spec.ways)
            require(
                logits.shape == expected,
                f"logits (E, N, W) of shape {expected}",
                f"{tuple(logits.shape)}",
                "return one logit for every query and class",
            )
            ways = logits.argmax(dim=2)
            # argmax over NaN would be an accuracy of 1 / ways; kept on the device, so that nothing waits for a copy
            finite = torch.isfinite(logits.sum(dim=(1, 2), dtype=torch.float64))
            accuracies.append((ways == true_way).double().mean(dim=1).where(finite, torch.nan))
            if confusion:
                predicted.append(ways)
        per_episode = torch.cat(accuracies).cpu()
        check_finite(per_episode, "logits of each episode", getattr(trainer, "when_diverged", ""))
        classes, matrix = None, None
        if confusion:
            classes, matrix = _confusion(labels, drawn.support[:, :, 0], torch.cat(predicted).cpu(), true_way.cpu())
        return EpisodicResult(
            per_episode.mean().item(),
            (1.96 * per_episode.std() / len(per_episode) ** 0.5).item(),
            per_episode,
            self.spec,
            self.seed,
            drawn.hash(labelled.fingerprint()),
            classes,
            matrix,
        )

    def _sources(
        self, trainer: Judged | EmbeddingBank, dataset: FewShotDataset | EmbeddingBank | None, bank: Tensor | None
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], FewShotDataset | EmbeddingBank, Tensor]:
        """What classifies, what is labelled, and its bank."""
        if isinstance(trainer, EmbeddingBank):
            require(dataset is None and bank is None, "a bank alone", "a data set beside it", "leave one out")
            return self.head or nearest_prototype, trainer, trainer.embeddings
        if dataset is None:
            raise TypeError("expected a data set to judge a trainer on, got none; use evaluate(trainer, dataset)")
        if bank is None:
            bank = dataset.embeddings if isinstance(dataset, EmbeddingBank) else trainer.bank(dataset)
        return self.head or trainer.classify, dataset, bank

    def _default_chunk(self, bank: Tensor) -> int:
        floats = self.spec.ways * (self.spec.shots + self.spec.queries) * bank[0].numel()
        free = int(free_memory(bank.device) / bank.element_size() * SHARE_OF_FREE_MEMORY)
        return max(1, (free if bank.is_cuda else min(free, CPU_CHUNK)) // floats)


def _gather(bank: Tensor, index: Tensor) -> Tensor:
    """bank[index], four times as fast on a CPU; in float32 at least, for float16 overflows in squares."""
    gathered = bank.index_select(0, index.flatten()).unflatten(0, index.shape)
    return gathered.to(torch.promote_types(bank.dtype, torch.float32))


def _confusion(labels: Tensor, of_way: Tensor, predicted: Tensor, true_way: Tensor) -> tuple[Tensor, Tensor]:
    """Counts over all episodes from one item of each way (E, W), predicted ways (E, N) and true ways (N,)."""
    classes, place = torch.unique(labels, return_inverse=True)
    class_of_way = place[of_way]  # (E, W)
    pairs = class_of_way[:, true_way] * len(classes) + class_of_way.gather(1, predicted)
    return classes.cpu(), torch.bincount(pairs.flatten(), minlength=len(classes) ** 2).unflatten(
        0, (-1, len(classes))
    ).cpu()


def evaluate_grid(
    trainer: Judged | EmbeddingBank,
    dataset: FewShotDataset | EmbeddingBank | None,
    specs: Sequence[EpisodeSpec],
    num_episodes: int = 10_000,
    seed: int = 0,
    bank: Tensor | None = None,
    head: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[EpisodicResult]:
    """Evaluates several sizes of episodes from one bank; arguments as for EpisodicEvaluator and its `evaluate`."""
    if bank is None and isinstance(dataset, FewShotDataset) and not isinstance(trainer, EmbeddingBank):
        bank = trainer.bank(dataset)
    return [EpisodicEvaluator(spec, num_episodes, seed, head=head).evaluate(trainer, dataset, bank) for spec in specs]
