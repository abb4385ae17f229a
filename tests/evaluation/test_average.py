"""Means over episodes and trainings: the formula by numpy and scipy, and how often the interval holds the truth."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pml_fewshot.evaluation.average import average, averaged_metric
from pml_fewshot.evaluation.retrieval_result import RetrievalResult


def by_hand(trainings: np.ndarray) -> tuple[float, float]:
    """Mean and half interval of values (S, N): 1.96 SE over the N, joined with Student's t times the SE over the S."""
    count, items = trainings.shape
    over_items = 1.96 * np.std(trainings.mean(axis=0), ddof=1) / math.sqrt(items)
    over_trainings = 0.0
    if count > 1:
        quantile = scipy.stats.t(df=count - 1).ppf(0.975)
        over_trainings = quantile * np.std(trainings.mean(axis=1), ddof=1) / math.sqrt(count)
    return float(trainings.mean()), math.hypot(over_items, over_trainings)


def drawn(trainings: int, items: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, (trainings, items)) * rng.uniform(0.5, 1, (trainings, 1))


def tensors(values: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(row) for row in values]


def retrieved(values: np.ndarray, nmi: float) -> RetrievalResult:
    per_query = {"precision_at_1": torch.from_numpy(values)}
    return RetrievalResult(per_query, torch.zeros(len(values)).long(), 0, 1, clustering={"NMI": nmi})


def test_one_training_has_the_mean_and_the_interval_over_episodes():
    (values,) = drawn(1, 50)
    mean, ci95 = average([torch.from_numpy(values)])
    assert mean == pytest.approx(values.mean(), abs=1e-14)
    assert ci95 == pytest.approx(1.96 * scipy.stats.sem(values), abs=1e-14)
    assert ci95 == pytest.approx(by_hand(values[None])[1], abs=1e-14)


@pytest.mark.parametrize("trainings", [2, 3, 10])
def test_several_trainings_join_both_intervals(trainings: int):
    values = drawn(trainings, 40, seed=trainings)
    assert average(tensors(values)) == pytest.approx(by_hand(values), rel=1e-12)


def test_trainings_that_agree_have_the_interval_over_episodes_alone():
    values = np.repeat(drawn(1, 50), 4, axis=0)
    assert average(tensors(values)) == pytest.approx(average(tensors(values[:1])), rel=1e-12)


def test_floats_of_32_bits_are_averaged_in_64():
    values = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float32)
    assert average([values, values])[0] == pytest.approx(values.double().mean().item(), abs=1e-15)


def test_one_episode_has_no_interval():
    mean, ci95 = average([torch.tensor([0.5])])
    assert mean == 0.5
    assert math.isnan(ci95)


def test_different_numbers_of_episodes_raise():
    with pytest.raises(ValueError, match=r"expected all trainings judged on the same episodes, got \[3, 4\]"):
        average([torch.zeros(4), torch.zeros(3)])


def test_figures_of_retrieval_are_averaged_as_those_of_episodes():
    values = drawn(3, 30)
    results = [retrieved(row, nmi=0.5) for row in values]
    assert averaged_metric("precision_at_1", results) == pytest.approx(by_hand(values), rel=1e-12)
    assert averaged_metric("precision_at_1", results[:1]) == pytest.approx(by_hand(values[:1]), rel=1e-12)


def test_nmi_has_an_interval_over_trainings_alone():
    results = [retrieved(np.zeros(5), nmi) for nmi in (0.2, 0.4, 0.9)]
    mean, ci95 = averaged_metric("NMI", results)
    assert mean == pytest.approx(0.5, abs=1e-14)
    low, high = scipy.stats.t.interval(0.95, 2, loc=mean, scale=scipy.stats.sem([0.2, 0.4, 0.9]))
    assert ci95 == pytest.approx((high - low) / 2, rel=1e-12)
    mean, ci95 = averaged_metric("NMI", results[:1])
    assert mean == 0.2
    assert math.isnan(ci95)


@pytest.mark.parametrize(
    ("of_training", "of_episode", "least", "most"),
    [
        (0.05, 0.0, 0.93, 0.97),  # Student's t over three trainings alone: exact
        (0.0, 0.2, 0.93, 0.98),  # the episodes alone: 1.96 standard errors of 100 values
        (0.02, 0.2, 0.93, 1.0),  # both of like size: the sum is conservative, for t of two degrees is wide
        (0.1, 0.2, 0.93, 0.99),
    ],
)
def test_the_interval_holds_the_true_mean(of_training: float, of_episode: float, least: float, most: float):
    """Values of 3 trainings on 100 episodes with a known mean, drawn 1,000 times."""
    rng = np.random.default_rng(0)
    repeats, trainings, episodes, truth = 1_000, 3, 100, 0.6
    held = 0
    for _ in range(repeats):
        effects = of_training * rng.normal(size=(trainings, 1)) + of_episode * rng.normal(size=(1, episodes))
        values = truth + effects + 0.01 * rng.normal(size=(trainings, episodes))
        mean, ci95 = average(tensors(values))
        held += abs(mean - truth) <= ci95
    assert least <= held / repeats <= most


def test_intervals_over_episodes_alone_would_miss_the_true_mean():
    """What the second term is for: one training's interval does not know that another would come out elsewhere."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        values = 0.6 + 0.05 * rng.normal() + 0.1 * rng.normal(size=100)
        mean, ci95 = average([torch.from_numpy(values)])
        held += abs(mean - 0.6) <= ci95
    assert held / 300 < 0.6
