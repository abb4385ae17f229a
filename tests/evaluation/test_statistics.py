"""Means over episodes and trainings, and paired differences: against numpy and scipy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult
from pml_fewshot.evaluation.statistics import Comparison, average, average_metric, compare
from pml_fewshot.sampling.episodes import EpisodeSpec


def by_hand(trainings: np.ndarray) -> tuple[float, float]:
    """Mean and half interval of values (S, N): 1.96 SE over the N, joined with Student's t times the SE over the S."""
    count, items = trainings.shape
    over_items = 1.96 * np.std(trainings.mean(axis=0), ddof=1) / math.sqrt(items)
    over_trainings = 0.0
    if count > 1:
        quantile = scipy.stats.t(df=count - 1).ppf(0.975)
        over_trainings = quantile * np.std(trainings.mean(axis=1), ddof=1) / math.sqrt(count)
    return float(trainings.mean()), math.hypot(over_items, over_trainings)


def retrieved(values: np.ndarray, nmi: float) -> RetrievalResult:
    per_query = {"precision_at_1": torch.from_numpy(values)}
    return RetrievalResult(per_query, torch.zeros(len(values)).long(), 0, 1, clustering={"NMI": nmi})


@pytest.mark.parametrize("trainings", [1, 2, 3, 10])
def test_the_interval_joins_that_over_episodes_and_that_over_trainings(trainings: int):
    rng = np.random.default_rng(trainings)
    values = rng.uniform(0, 1, (trainings, 40)) * rng.uniform(0.5, 1, (trainings, 1))
    assert average(torch.from_numpy(values).unbind()) == pytest.approx(by_hand(values), rel=1e-12)
    results = [retrieved(row, nmi=0.5) for row in values]
    assert average_metric("precision_at_1", results) == pytest.approx(by_hand(values), rel=1e-12)


def test_floats_of_32_bits_one_episode_and_different_numbers_of_episodes():
    values = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float32)
    assert average([values, values])[0] == pytest.approx(values.double().mean().item(), abs=1e-15)
    assert average([torch.tensor([0.5])]) == pytest.approx((0.5, math.nan), nan_ok=True)
    with pytest.raises(UsageError, match=r"expected all trainings evaluated on the same episodes, got \[3, 4\]"):
        average([torch.zeros(4), torch.zeros(3)])


def test_nmi_has_an_interval_over_trainings_alone():
    results = [retrieved(np.zeros(5), nmi) for nmi in (0.2, 0.4, 0.9)]
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.5, scale=scipy.stats.sem([0.2, 0.4, 0.9]))
    assert average_metric("NMI", results) == pytest.approx((0.5, (high - low) / 2), rel=1e-12)
    assert average_metric("NMI", results[:1]) == pytest.approx((0.2, math.nan), nan_ok=True)


def test_the_interval_over_three_trainings_holds_the_true_mean_in_19_of_20_cases():
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        means = 0.6 + 0.05 * rng.normal(size=(3, 1))
        mean, ci95 = average(torch.from_numpy(means + 0.01 * rng.normal(size=(3, 100))).unbind())
        held += abs(mean - 0.6) <= ci95
    assert 930 <= held <= 970


def result_of(per_episode: Tensor) -> EpisodicResult:
    ci95 = 1.96 * per_episode.std().item() / math.sqrt(len(per_episode))
    return EpisodicResult(per_episode.mean().item(), ci95, per_episode, EpisodeSpec(5, 1, 15), 0, "ab")


def correlated(gain: float, count: int = 400, seed: int = 0) -> tuple[EpisodicResult, EpisodicResult]:
    """Two methods that find the same episodes hard; the first is better by `gain` on average."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = 0.2 * torch.randn(count, generator=generator, dtype=torch.float64)
    own = 0.03 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return result_of(0.6 + difficulty + own[0] + gain), result_of(0.6 + difficulty + own[1])


@pytest.mark.parametrize("gain", [0.0, 0.02, -0.05])
def test_the_difference_and_its_interval_are_those_of_pairs(gain: float):
    first, second = correlated(gain)
    differences = first.per_episode.numpy() - second.per_episode.numpy()
    comparison = compare(first, second)
    assert comparison.difference == pytest.approx(differences.mean(), rel=1e-12)
    assert comparison.num_episodes == 400
    # scipy's paired test says the same: 1.96 standard errors and not Student's 1.966
    test = scipy.stats.ttest_rel(first.per_episode.numpy(), second.per_episode.numpy())
    assert comparison.difference / comparison.ci95 == pytest.approx(test.statistic / 1.96, rel=1e-9)


def test_it_reads_in_points_and_says_whether_0_is_left_out():
    no = "not significant, the interval contains 0"
    for difference, ci95, points, verdict in (
        (0.01234, 0.00456, "+1.23 +- 0.46", "significant"),
        (-0.02, 0.01, "-2.00 +- 1.00", "significant"),
        (-0.01, 0.02, "-1.00 +- 2.00", no),
        (0.01, 0.01, "+1.00 +- 1.00", no),
        (0.0, 0.0, "+0.00 +- 0.00", no),
    ):
        text = f"{points} points on the same 10,000 episodes: {verdict} (95 %)"
        assert str(Comparison(difference, ci95, 10_000)) == text


def test_results_on_other_episodes_are_refused():
    first, second = correlated(0.0)
    got = "5-way 1-shot 15-query, seed 0, ab and 5-way 5-shot 15-query, seed 7, cd; evaluate both with one spec"
    with pytest.raises(UsageError, match=rf"expected two results on the same episodes \(equal .*\), got {got}"):
        compare(first, replace(second, episodes_hash="cd", seed=7, spec=EpisodeSpec(5, 5, 15)))
