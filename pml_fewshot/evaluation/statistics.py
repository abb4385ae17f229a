"""Means over episodes and over trainings with their intervals, and the paired comparison of two methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult


@dataclass(frozen=True)
class Comparison:
    """Mean of the first figure minus the second over the same episodes or queries, and half its 95 % interval.

    `ci95` is 1.96 standard errors of the mean of the differences.
    """

    difference: float
    ci95: float
    num_episodes: int
    of_queries: bool = False

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0, as it does by chance for one in twenty pairs of equal methods."""
        return abs(self.difference) > self.ci95

    def __str__(self) -> str:
        verdict = "significant" if self.significant else "not significant, the interval contains 0"
        points = f"{100 * self.difference:+.2f} +- {100 * self.ci95:.2f} points"
        on = "queries" if self.of_queries else "episodes"
        return f"{points} on the same {self.num_episodes:,} {on}: {verdict} (95 %)"


def compare(a: EpisodicResult, b: EpisodicResult) -> Comparison:
    """Compares results on the same episodes one by one: an episode's difficulty, most of the spread, cancels out.

    Returns:
        The mean of a's accuracies minus b's, as a fraction of 1, and half its 95 % interval.

    Raises:
        UsageError: results of other episodes: another spec, seed, number or data set.
    """
    if a.episodes_hash != b.episodes_hash:
        got = " and ".join(f"{result.spec}, seed {result.seed}, {result.episodes_hash}" for result in (a, b))
        raise UsageError(
            f"expected two results on the same episodes (equal episodes_hash), got {got}; evaluate both with one spec, "
            "number of episodes and seed on one data set"
        )
    return Comparison(*average([a.per_episode - b.per_episode]), len(a.per_episode))


def average(trainings: Sequence[Tensor]) -> tuple[float, float]:
    """Returns the mean of a figure and half its 95 % interval, NaN if there is only one value.

    `trainings` holds, for each training (seed) of a method, the values (N,) of the same N episodes or queries. The
    interval is the root of the sum of two squares: 1.96 standard errors over the N (of their means over the trainings)
    and, if there are several trainings, Student's t times the standard error of their means.
    """
    sizes = sorted({len(values) for values in trainings})
    if len(sizes) > 1:
        raise UsageError(f"expected all trainings evaluated on the same episodes, got {sizes} of them; use one spec")
    values = torch.stack([values.double() for values in trainings])  # (S, N)
    ci95 = (1.96 * values.mean(dim=0).std() / values.shape[1] ** 0.5).item() if values.shape[1] > 1 else float("nan")
    return values.mean().item(), join_intervals(ci95, values.mean(dim=1))


def average_metric(metric: str, results: Sequence[RetrievalResult]) -> tuple[float, float]:
    """Does the same for a retrieval figure; NMI and AMI are one value per training, with an interval over trainings."""
    if metric in results[0].per_query:
        return average([result.per_query[metric] for result in results])
    means = torch.tensor([result[metric] for result in results], dtype=torch.float64)
    return means.mean().item(), join_intervals(float("nan") if len(means) == 1 else 0.0, means)


def join_intervals(ci95: float, means: Tensor) -> float:
    """Joins half the interval over episodes with that over the means (S,) of the trainings."""
    if len(means) == 1:
        return ci95
    from scipy.stats import t  # half a second to import

    quantile = float(t.ppf(0.975, len(means) - 1))
    return float((ci95**2 + (quantile * means.std().item()) ** 2 / len(means)) ** 0.5)
