"""compare: the paired difference of two results against numpy, and what it says of it."""

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.comparison import Comparison, compare
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype

SPEC = EpisodeSpec(5, 1, 15)


def result_of(
    per_episode: Tensor, episodes_hash: str = "ab", seed: int = 0, spec: EpisodeSpec = SPEC
) -> EpisodicResult:
    ci95 = 1.96 * per_episode.std().item() / math.sqrt(len(per_episode))
    return EpisodicResult(per_episode.mean().item(), ci95, per_episode, spec, seed, episodes_hash)


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
    assert comparison.ci95 == pytest.approx(1.96 * differences.std(ddof=1) / math.sqrt(400), rel=1e-12)
    assert comparison.num_episodes == 400
    # scipy's paired test says the same: 1.96 standard errors and not Student's 1.966
    test = scipy.stats.ttest_rel(first.per_episode.numpy(), second.per_episode.numpy())
    assert comparison.difference / comparison.ci95 == pytest.approx(test.statistic / 1.96, rel=1e-9)


def test_the_first_is_better_where_the_difference_is_positive():
    better, worse = correlated(0.02)
    forth, back = compare(better, worse), compare(worse, better)
    assert forth.difference > 0
    assert back.difference == pytest.approx(-forth.difference, rel=1e-12)
    assert back.ci95 == pytest.approx(forth.ci95, rel=1e-12)
    assert forth.significant
    assert back.significant
    assert str(forth).startswith("+")
    assert str(back).startswith("-")


def test_pairs_see_what_two_intervals_apart_do_not():
    first, second = correlated(0.02)
    comparison = compare(first, second)
    unpaired = math.hypot(first.ci95, second.ci95)
    assert comparison.ci95 < unpaired / 3
    assert comparison.significant
    assert abs(first.mean - second.mean) < unpaired  # overlooked without the pairs


def test_two_equal_results_differ_by_nothing():
    result, _ = correlated(0.0)
    comparison = compare(result, result)
    assert (comparison.difference, comparison.ci95) == (0, 0)
    assert not comparison.significant
    assert str(comparison) == (
        "+0.00 +- 0.00 points on the same 400 episodes: not significant, the interval holds 0 (95 %)"
    )


def test_a_gain_on_every_episode_alike_is_certain():
    result, _ = correlated(0.0)
    exact = result_of((result.per_episode * 2**20).round() / 2**20)
    comparison = compare(result_of(exact.per_episode + 0.25), exact)
    assert (comparison.difference, comparison.ci95) == (0.25, 0)
    assert comparison.significant


@pytest.mark.parametrize(
    ("difference", "ci95", "significant"),
    [(0.02, 0.01, True), (-0.02, 0.01, True), (0.01, 0.02, False), (-0.01, 0.02, False), (0.01, 0.01, False)],
)
def test_a_difference_is_significant_where_its_interval_leaves_0_out(difference: float, ci95: float, significant: bool):
    comparison = Comparison(difference, ci95, 600)
    low, high = difference - ci95, difference + ci95
    assert comparison.significant == significant == (not low <= 0 <= high)
    assert ("not significant, the interval holds 0" in str(comparison)) == (not significant)


def test_it_reads_in_points_with_its_count():
    assert str(Comparison(0.01234, 0.00456, 10_000)) == (
        "+1.23 +- 0.46 points on the same 10,000 episodes: significant (95 %)"
    )
    assert str(Comparison(-0.001, 0.002, 600)) == (
        "-0.10 +- 0.20 points on the same 600 episodes: not significant, the interval holds 0 (95 %)"
    )
    with pytest.raises(FrozenInstanceError):
        Comparison(0.0, 0.0, 1).difference = 1.0  # type: ignore[misc]


def test_results_on_other_episodes_are_refused():
    first, second = correlated(0.0)
    other = replace(second, episodes_hash="cd", seed=7, spec=EpisodeSpec(5, 5, 15))
    with pytest.raises(
        ValueError,
        match=r"expected two results on the same episodes \(equal episodes_hash\), got 5-way 1-shot 15-query, seed 0, "
        "ab and 5-way 5-shot 15-query, seed 7, cd; evaluate both with one spec",
    ):
        compare(first, other)


def overlapping_bank() -> EmbeddingBank:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(12)
    centres = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return EmbeddingBank(centres[labels] + torch.randn(96, 6, generator=generator, dtype=torch.float64), labels)


def test_two_heads_on_one_bank_are_compared_and_two_seeds_are_not():
    bank, spec = overlapping_bank(), EpisodeSpec(4, 3, 5)
    by_mean = EpisodicEvaluator(spec, 300, head=nearest_prototype).evaluate(bank)
    by_nearest = EpisodicEvaluator(spec, 300, head=nearest_neighbour).evaluate(bank)
    comparison = compare(by_mean, by_nearest)
    assert comparison.difference == pytest.approx(by_mean.mean - by_nearest.mean, abs=1e-12)
    assert comparison.difference > comparison.ci95 > 0
    assert comparison.ci95 < math.hypot(by_mean.ci95, by_nearest.ci95)
    for other in (EpisodicEvaluator(spec, 300, seed=1), EpisodicEvaluator(spec, 299)):
        with pytest.raises(ValueError, match="expected two results on the same episodes"):
            compare(by_mean, other.evaluate(bank))


def test_equal_methods_are_called_different_in_one_of_twenty_cases():
    comparisons = [compare(*correlated(0.0, count=200, seed=seed)) for seed in range(1000)]
    assert 30 <= sum(comparison.significant for comparison in comparisons) <= 70
    spread = np.std([comparison.difference for comparison in comparisons], ddof=1)
    assert np.mean([comparison.ci95 for comparison in comparisons]) == pytest.approx(1.96 * spread, rel=0.08)
