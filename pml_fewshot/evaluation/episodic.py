"""EpisodicEvaluator: the accuracy of a method over thousands of episodes, from embeddings computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pml_fewshot.checks import check_at_least_one, check_finite, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.episodes import EpisodeSampler, EpisodeSpec

# Floats gathered at a time where the caller does not say: on a CPU what a second-level cache holds, so that a chunk
# is scored while it is warm; on a GPU 1 GiB.
CPU_CHUNK = 2**18
CUDA_CHUNK = 2**28


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
    """

    mean: float
    ci95: float
    per_episode: Tensor
    spec: EpisodeSpec
    seed: int
    episodes_hash: str

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} +- {100 * self.ci95:.2f} % ({self.spec}, {len(self.per_episode)} episodes)"


class EpisodicEvaluator:
    """Evaluates on a fixed list of episodes: the same seed gives the same episodes on every machine and device.

    Args:
        spec: size of the episodes.
        num_episodes: 10,000, for 600 give an interval wider than most methods differ by (0.2 points at 98.9 % on
            Omniglot, and more where the accuracy is lower).
        seed: of the episodes.
        chunk: episodes scored at a time; when None as many as fill a CPU's cache or 1 GiB of a GPU. The result does not
            depend on it.
    """

    def __init__(self, spec: EpisodeSpec, num_episodes: int = 10_000, seed: int = 0, chunk: int | None = None) -> None:
        check_at_least_one("num_episodes", num_episodes)
        require(num_episodes > 1, "num_episodes above 1", "1", "an interval needs at least two episodes")
        if chunk is not None:
            check_at_least_one("chunk", chunk)
        self.spec = spec
        self.num_episodes = num_episodes
        self.seed = seed
        self.chunk = chunk

    def check(self, dataset: FewShotDataset) -> None:
        """Raises the ValueError that `evaluate` would, when the set has too few classes or items for the spec."""
        EpisodeSampler(dataset.labels, self.spec, torch.Generator())

    @torch.no_grad()
    def evaluate(self, trainer: Judged, dataset: FewShotDataset, bank: Tensor | None = None) -> EpisodicResult:
        """Evaluates `trainer` on episodes of `dataset`.

        Args:
            trainer: a trainer, or anything with `bank(dataset)` and `classify(support, query)`.
            dataset: the classes to judge on.
            bank: `trainer.bank(dataset)` where it is at hand already (for several specs on one set).

        Raises:
            ValueError: the set has too few classes or items for the spec, or the bank or the logits hold NaN.
        """
        bank = trainer.bank(dataset) if bank is None else bank
        labels = dataset.labels.to(bank.device)
        require(len(bank) == len(labels), f"a bank of {len(labels)} items", f"{len(bank)}", "encode this very data set")
        check_finite(bank, "bank")
        generator = torch.Generator().manual_seed(self.seed)
        episodes = EpisodeSampler(labels, self.spec, generator).sample(self.num_episodes)
        chunk = self.chunk or self._default_chunk(bank)
        starts = range(0, self.num_episodes, chunk)
        per_episode = torch.cat(
            [
                self._accuracy(
                    trainer, bank, episodes.support[start : start + chunk], episodes.query[start : start + chunk]
                )
                for start in starts
            ]
        ).cpu()
        ci95 = 1.96 * per_episode.std() / len(per_episode) ** 0.5
        return EpisodicResult(
            per_episode.mean().item(),
            ci95.item(),
            per_episode,
            self.spec,
            self.seed,
            episodes.hash(dataset.fingerprint()),
        )

    def _accuracy(self, trainer: Judged, bank: Tensor, support: Tensor, query: Tensor) -> Tensor:
        """(E,) accuracy of one chunk of episodes."""
        logits = trainer.classify(bank[support], bank[query.flatten(1)])
        check_finite(logits, "logits of each episode")  # argmax over NaN would be an accuracy of 1 / ways
        true_class = torch.arange(self.spec.ways, device=bank.device).repeat_interleave(self.spec.queries)
        return (logits.argmax(dim=2) == true_class).double().mean(dim=1)

    def _default_chunk(self, bank: Tensor) -> int:
        per_class = self.spec.shots + self.spec.queries
        floats = self.spec.ways * per_class * bank[0].numel()
        return max(1, (CUDA_CHUNK if bank.is_cuda else CPU_CHUNK) // floats)


def evaluate_grid(
    trainer: Judged,
    dataset: FewShotDataset,
    specs: Sequence[EpisodeSpec],
    num_episodes: int = 10_000,
    seed: int = 0,
    bank: Tensor | None = None,
) -> list[EpisodicResult]:
    """Evaluates several sizes of episodes from one bank; arguments as for EpisodicEvaluator and its `evaluate`."""
    bank = trainer.bank(dataset) if bank is None else bank
    return [EpisodicEvaluator(spec, num_episodes, seed).evaluate(trainer, dataset, bank) for spec in specs]
