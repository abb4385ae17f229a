"""Unbalanced queries: their numbers are Dirichlet's, the items are those of balanced episodes, and what is refused."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec, draw_counts
from tests.sampling.material import DATA, scattered_labels, seeded
from tests.tiny_experiments import TINY_EXPERIMENTS

EPISODES = 4_000
Unbalanced = partial(EpisodeSpec, query_balance=2.0)


def sampled(labels: Tensor, spec: EpisodeSpec, episodes: int = 50, seed: int = 5) -> EpisodeIndex:
    return EpisodeSampler(labels, spec, seeded(seed)).sample(episodes)


def classes_of(sizes: int, classes: int = 8) -> Tensor:
    return scattered_labels({10 * c - 3: sizes + c for c in range(classes)})


def rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """Shares (E, W) of a total in whole numbers, an episode at a time: those with the largest remainders up."""
    counts = np.empty(shares.shape, dtype=int)
    for row, share in zip(counts, shares, strict=True):
        row[:] = np.floor(total * share)
        for way in sorted(range(len(row)), key=lambda way: row[way] - total * share[way])[: total - row.sum()]:
            row[way] += 1
    return counts


@pytest.mark.parametrize(("ways", "shots", "queries", "alpha"), [(3, 2, 4, 2.0), (5, 1, 3, 0.5), (1, 1, 2, 1.0)])
def test_each_query_is_of_the_class_that_query_ways_says_and_no_item_comes_twice(
    ways: int, shots: int, queries: int, alpha: float
):
    labels = classes_of(20)
    index = sampled(labels, EpisodeSpec(ways, shots, queries, alpha), 200)
    assert index.query.shape == index.query_ways.shape == (200, ways, queries)
    assert index.support.shape == (200, ways, shots)
    assert index.query.dtype == index.query_ways.dtype == torch.int64
    for support, query, way in zip(index.support, index.query, index.true_ways, strict=True):
        classes = labels[support]
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == ways
        assert torch.equal(labels[query.flatten()], classes[:, 0][way])
        assert torch.equal(way, way.sort().values)
        assert len(torch.cat([support.flatten(), query.flatten()]).unique()) == ways * (shots + queries)


def test_an_index_takes_the_classes_of_its_queries_along():
    index = sampled(classes_of(20), Unbalanced(3, 2, 4))
    part, elsewhere = index[3:9], index.to(torch.device("meta"))
    assert torch.equal(part.query_ways, index.query_ways[3:9])
    assert torch.equal(part.true_ways, index.true_ways[3:9])
    assert (elsewhere.query_ways.device.type, elsewhere.query_ways.shape) == ("meta", (50, 3, 4))
    balanced = sampled(classes_of(20), EpisodeSpec(3, 2, 4))
    assert balanced.query_ways is None
    assert balanced.true_ways.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize("alpha", [0.5, 2.0, 30.0])
def test_counts_are_the_rounded_shares_of_gamma_variables(alpha: float):
    uniform = torch.rand(500, 5, generator=seeded(3), dtype=torch.float64).numpy()
    gammas = scipy.stats.gamma.ppf(uniform, alpha)
    expected = rounded(gammas / gammas.sum(axis=1, keepdims=True), 75)
    assert np.array_equal(draw_counts(500, 5, 15, alpha, seeded(3)).numpy(), expected)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_share_of_each_class_is_beta(alpha: float):
    """Of so many queries that rounding moves no share from one bin to the next."""
    queries = 200_000
    shares = draw_counts(EPISODES, 5, queries, alpha, seeded(1)).double().numpy() / (5 * queries)
    assert np.array_equal(np.rint(shares.sum(axis=1) * 5 * queries), np.full(EPISODES, 5 * queries))
    edges = scipy.stats.beta(alpha, 4 * alpha).ppf(np.linspace(0, 1, 21))
    for share in shares.T:
        counts = np.bincount(np.searchsorted(edges[1:-1], share), minlength=20)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_number_of_queries_of_each_class_is_the_rounded_share_of_a_dirichlet(alpha: float):
    """Against numpy's Dirichlet: how often each number of queries comes, for each of the five classes."""
    index = sampled(torch.arange(8).repeat_interleave(76), EpisodeSpec(5, 1, 15, alpha), EPISODES, seed=2)
    counts = (index.true_ways.unsqueeze(1) == torch.arange(5).unsqueeze(1)).sum(dim=2).numpy()
    assert (counts.sum(axis=1) == 75).all()
    exact = 75 * np.random.default_rng(0).dirichlet([alpha] * 5, 100_000)
    whole = np.floor(exact)
    rank = (whole - exact).argsort(axis=1).argsort(axis=1)
    reference = (whole + (rank < 75 - whole.sum(axis=1, keepdims=True))).astype(int)
    assert np.array_equal(reference[:300], rounded(exact[:300] / 75, 75))
    chances = np.bincount(reference.flatten(), minlength=76) / reference.size
    bins = np.minimum((chances.cumsum() - chances / 2) * 20, 19).astype(int)  # about 20 of nearly the same chance
    expected = np.bincount(bins, chances)
    spread = (chances @ np.arange(76) ** 2 - 15**2) ** 0.5
    for own in counts.T:
        observed = np.bincount(bins[own], minlength=len(expected))
        used = expected > 0
        assert observed[~used].sum() == 0
        assert scipy.stats.chisquare(observed[used], EPISODES * expected[used]).pvalue > 1e-3
        assert abs(own.mean() - 15) < 3.5 * spread / EPISODES**0.5


@pytest.mark.parametrize("alpha", [1e-4, 1e-3])
def test_of_a_tiny_alpha_nearly_all_queries_are_of_one_class(alpha: float):
    """Its gamma variables are below the smallest float, all five of an episode in 3 % of them at 0.001."""
    counts = draw_counts(EPISODES, 5, 15, alpha, seeded(0))
    assert (counts.sum(dim=1) == 75).all()
    assert ((counts == 75).any(dim=1).double().mean() > 0.97).item()
    assert scipy.stats.chisquare(np.bincount(counts.argmax(dim=1), minlength=5)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "spec"),
    [
        (16, (3, 1, 4)),  # drawn from whole arrays
        (60, (3, 1, 5)),  # by slots
        (100, (5, 2, 15)),  # unbalanced from arrays, balanced by slots
    ],
)
@pytest.mark.parametrize("alpha", [1e9, 1e308])
def test_an_endless_alpha_gives_the_balanced_episodes(size: int, spec: tuple[int, int, int], alpha: float):
    labels = classes_of(size)
    balanced, unbalanced = sampled(labels, EpisodeSpec(*spec)), sampled(labels, EpisodeSpec(*spec, alpha))
    assert torch.equal(unbalanced.support, balanced.support)
    assert torch.equal(unbalanced.query, balanced.query)
    assert torch.equal(unbalanced.true_ways, balanced.true_ways.expand(50, -1))


def test_support_and_first_queries_are_those_of_the_balanced_episodes():
    labels, spec = classes_of(40), EpisodeSpec(3, 2, 6)
    balanced, unbalanced = sampled(labels, spec), sampled(labels, replace(spec, query_balance=0.7))
    assert torch.equal(unbalanced.support, balanced.support)
    for episode in range(50):
        for way in range(3):
            own = unbalanced.query[episode][unbalanced.query_ways[episode] == way][:6]
            assert torch.equal(own, balanced.query[episode, way, : len(own)])


def test_the_same_seed_gives_the_same_episodes_with_a_hash_of_their_own():
    """Golden: that of balanced episodes is older than unbalanced ones."""
    labels, spec = torch.arange(8).repeat_interleave(90), EpisodeSpec(4, 2, 10)
    assert sampled(labels, spec).hash("set") == "0bf32950d42e3478"
    assert sampled(labels, Unbalanced(4, 2, 10)).hash("set") == "ca5ed0bdb8c293d8"
    endless = sampled(labels, EpisodeSpec(4, 2, 10, 1e9))  # says of each query its class
    others = [sampled(labels, EpisodeSpec(4, 2, 10, 2.5)), sampled(labels, Unbalanced(4, 2, 10), seed=6), endless]
    assert len({"0bf32950d42e3478", "ca5ed0bdb8c293d8", *(other.hash("set") for other in others)}) == 5
    index = sampled(labels, Unbalanced(4, 2, 10))
    assert EpisodeIndex(index.support, index.query).hash("set") != index.hash("set")


def test_only_the_given_generator_is_used():
    before = torch.get_rng_state()
    sampler = EpisodeSampler(classes_of(20), Unbalanced(3, 1, 4), seeded(0))
    assert sampler.sample(20).hash() != sampler.sample(20).hash()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "2", True, [2.0], np.float64(-2)])
def test_what_is_no_alpha_is_refused(alpha: Any):
    with pytest.raises(UsageError, match=r"expected query_balance as a number above 0, or None, got .*; 2\.0 is usual"):
        EpisodeSpec(5, 1, 15, query_balance=alpha)


def test_a_spec_says_how_its_queries_divide():
    assert str(EpisodeSpec(5, 1, 15)) == "5-way 1-shot 15-query"
    assert str(EpisodeSpec(5, 1, 15, 0.5)) == "5-way 1-shot 15-query unbalanced (Dirichlet 0.5)"
    for alpha in (2, np.float32(2), np.int64(2)):  # numpy's numbers are none to JSON
        spec = EpisodeSpec(5, 1, 15, alpha)
        assert spec == Unbalanced(5, 1, 15)
        assert type(spec.query_balance) is float


def test_a_class_that_could_not_have_all_the_queries_is_named():
    labels = torch.tensor([0] * 12 + [1] * 10 + [2] * 11)  # 1 + 2 * 5 are needed
    needed = r"expected at least 11 items \(2-way 1-shot 5-query unbalanced \(Dirichlet 2\)\) in every class"
    with pytest.raises(UsageError, match=rf"^{needed}, got 10 in class 'b' \(1 of 3 classes"):
        EpisodeSampler(labels, Unbalanced(2, 1, 5), seeded(0), "abc")
    assert len(EpisodeSampler(labels[labels != 1], Unbalanced(2, 1, 5), seeded(0)).sample(30)) == 30
    assert len(EpisodeSampler(labels, EpisodeSpec(2, 1, 5), seeded(0)).sample(30)) == 30


def test_training_refuses_unbalanced_episodes():
    message = r"expected balanced episodes to train on, got 2-way 1-shot 1-query unbalanced .*; leave query_balance to"
    with pytest.raises(UsageError, match=message):
        EpisodeStream(DATA, Unbalanced(2, 1, 1), seed=0)
    with pytest.raises(UsageError, match=message):
        replace(TINY_EXPERIMENTS["protonet"], train_spec=Unbalanced(2, 1, 1))
