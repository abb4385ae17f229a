"""Episodes of variable ways and shots against Meta-Dataset's formulas, one class at a time."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.sampling.variable_episodes import (
    VariableEpisode,
    VariableEpisodes,
    VariableEpisodeSampler,
    VariableEpisodeSpec,
)
from tests.sampling.material import scattered_labels, seeded

SIZES = {-4: 2, 0: 9, 7: 160, 2**40: 35, 11: 12, 12: 70, 13: 25, 14: 300, 15: 44, 16: 3}
LABELS = scattered_labels(SIZES)
SPEC = VariableEpisodeSpec(2, 8, max_queries=6, max_support=60, max_shots=20)


def slow_episode(spec: VariableEpisodeSpec, generator: torch.Generator) -> tuple[list[int], list[int], int]:
    """Labels of the classes, shots of each and queries, from the same random numbers in the same order."""
    values = sorted(SIZES)
    ways = int(torch.randint(spec.min_ways, min(spec.max_ways, len(values)) + 1, (), generator=generator))
    labels = [values[n] for n in torch.randperm(len(values), generator=generator)[:ways].tolist()]
    share, *rest = torch.rand(1 + ways, generator=generator, dtype=torch.float64).tolist()
    queries = min(spec.max_queries, min(math.floor(0.5 * SIZES[label]) for label in labels))
    left = [SIZES[label] - queries for label in labels]
    support = min(spec.max_support, sum(math.ceil((1 - share) * min(spec.max_shots, each)) for each in left))
    weights = []
    for label, uniform in zip(labels, rest, strict=True):
        exponent = math.log(0.5) + uniform * (math.log(2) - math.log(0.5))
        weights.append(math.exp(exponent) * SIZES[label])
    shots = []
    for weight, most in zip(weights, left, strict=True):
        shots.append(min(math.floor(weight / sum(weights) * (support - ways)) + 1, most))
    for label in labels:
        torch.randperm(SIZES[label], generator=generator)
    return labels, shots, queries


def sampled(spec: VariableEpisodeSpec = SPEC, count: int = 200, seed: int = 0, labels: Any = LABELS) -> Any:
    return VariableEpisodeSampler(labels, spec, seeded(seed)).sample(count)


@pytest.mark.parametrize("spec", [SPEC, VariableEpisodeSpec(5, 50), VariableEpisodeSpec(1, 3, 2, 5, 4)])
def test_classes_shots_and_queries_are_those_of_the_formulas(spec: VariableEpisodeSpec):
    generator = seeded(3)
    for episode in VariableEpisodeSampler(LABELS, spec, seeded(3)).sample(200):
        labels, shots, queries = slow_episode(spec, generator)
        assert list(episode.sizes) == shots
        assert episode.query.shape == (len(labels), queries)
        for label, support, query in zip(labels, episode.support.split(shots), episode.query, strict=True):
            assert (LABELS[torch.cat([support, query])] == label).all()


def test_episodes_keep_their_limits_and_no_item_comes_twice():
    episodes = sampled()
    assert len(episodes) == 200
    assert len({episode.sizes for episode in episodes}) > 150
    for episode in episodes:
        ways, queries = episode.query.shape
        items = torch.cat([episode.support, episode.query.flatten()])
        assert len(items.unique()) == len(items) == sum(episode.sizes) + ways * queries
        assert SPEC.min_ways <= ways == len(episode.sizes) <= SPEC.max_ways
        assert len(LABELS[episode.query[:, 0]].unique()) == ways
        assert sum(episode.sizes) <= SPEC.max_support
        items_of = [SIZES[label] for label in LABELS[episode.query[:, 0]].tolist()]
        assert queries == min(SPEC.max_queries, min(items_of) // 2) >= 1
        assert all(1 <= shots <= size - queries for shots, size in zip(episode.sizes, items_of, strict=True))


def test_each_number_of_ways_each_class_and_each_item_comes_as_often():
    episodes = sampled(
        VariableEpisodeSpec(2, 8), 1_000, labels=(labels := scattered_labels(dict.fromkeys(range(9), 6)))
    )
    ways = np.bincount([len(episode.sizes) for episode in episodes], minlength=9)
    assert ways[:2].sum() == 0
    assert scipy.stats.chisquare(ways[2:]).pvalue > 1e-3
    first = torch.stack([labels[episode.query[0, 0]] for episode in episodes])
    assert scipy.stats.chisquare(np.bincount(first, minlength=9)).pvalue > 1e-3
    item = torch.stack([episode.query[0, 0] for episode in episodes])
    assert scipy.stats.chisquare(np.bincount(item, minlength=54)).pvalue > 1e-3


def test_more_ways_than_classes_are_as_many_as_there_are():
    ways = {len(episode.sizes) for episode in sampled(VariableEpisodeSpec(8, 50))}
    assert ways == {8, 9, 10}


def test_the_share_of_the_support_is_uniform():
    """With two classes of the same size and no other limit the support is twice a share of what is left of each."""
    labels = torch.arange(2).repeat_interleave(2_010)  # a factor of 4 between them takes none of its last
    spec = VariableEpisodeSpec(2, 2, max_queries=10, max_support=10_000, max_shots=1_000)
    episodes = sampled(spec, 1_000, labels=labels)
    support = np.array([sum(episode.sizes) for episode in episodes])  # a floor of each class loses up to two items
    bins = np.minimum(support // 200, 9)
    assert scipy.stats.chisquare(np.bincount(bins, minlength=10)).pvalue > 1e-3
    ratio = np.log([episode.sizes[0] / episode.sizes[1] for episode in episodes if sum(episode.sizes) > 400])
    assert np.abs(ratio).max() < math.log(4) * 1.02  # each factor is between a half and two
    triangle = scipy.stats.triang(0.5, loc=-math.log(4), scale=2 * math.log(4))
    assert scipy.stats.kstest(ratio, triangle.cdf).pvalue > 1e-3


def test_the_same_seed_gives_the_same_episodes_by_the_given_generator_alone():
    before = torch.get_rng_state()
    sampler = VariableEpisodeSampler(LABELS, SPEC, seeded(0))
    first, second = sampler.sample(30), sampler.sample(30)
    assert torch.equal(before, torch.get_rng_state())
    assert first.hash() == sampled(count=30).hash() != second.hash()
    assert sampled(count=60).hash() == VariableEpisodes(first.episodes + second.episodes).hash()
    assert sampled(count=30, seed=1).hash() != first.hash()
    texts = [f"{label:020d}" for label in (LABELS + 10).tolist()]  # sorted as the numbers are
    assert sampled(count=30, labels=texts).hash() == first.hash()


def test_the_hash_covers_items_roles_sizes_and_the_data_set():
    support, query = torch.arange(5), torch.arange(5, 9).view(2, 2)
    episodes = [
        VariableEpisode(support, (2, 3), query),
        VariableEpisode(support, (3, 2), query),
        VariableEpisode(support.flip(0), (2, 3), query),
        VariableEpisode(support, (2, 3), query.T.contiguous()),
        VariableEpisode(torch.arange(4, 9), (2, 3), torch.arange(4).view(2, 2)),
    ]
    hashes = {VariableEpisodes((episode,)).hash("set") for episode in episodes}
    hashes |= {VariableEpisodes((episodes[0],)).hash("other"), VariableEpisodes((episodes[0], episodes[0])).hash("set")}
    assert len(hashes) == 7
    assert all(len(each) == 16 for each in hashes)
    transposed = VariableEpisode(support, (2, 3), query.T.contiguous().T)
    assert VariableEpisodes((transposed,)).hash("set") == VariableEpisodes((episodes[0],)).hash("set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ways": 0}, "expected min_ways to be an integer of at least 1, got 0"),
        ({"max_queries": 0}, "expected max_queries to be an integer of at least 1, got 0"),
        ({"max_shots": 1.5}, r"expected max_shots to be an integer of at least 1, got 1\.5"),
        ({"min_ways": 8, "max_ways": 7}, "expected min_ways of at most max_ways=7, got 8; lower it"),
        ({"max_support": 49}, "expected max_support of at least max_ways=50, a shot of each class, got 49; raise it"),
    ],
)
def test_limits_that_cannot_be_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=f"^{message}"):
        VariableEpisodeSpec(**options)


def test_numbers_of_numpy_become_integers_and_a_spec_says_what_it_is():
    spec = VariableEpisodeSpec(np.int64(3), max_ways=np.int32(9))
    assert spec == VariableEpisodeSpec(3, 9)
    assert {type(value) for value in vars(spec).values()} == {int}
    assert str(spec) == "3- to 9-way episodes of variable shots"


def test_too_few_classes_or_items_are_named():
    with pytest.raises(UsageError, match=r"expected at least 11 classes for 11- to 50-way .*, got 10 classes; lower"):
        sampled(VariableEpisodeSpec(11))
    labels = torch.tensor([0, 0, 1, 2, 2])
    with pytest.raises(UsageError, match=r"expected at least 2 items \(2- to 3-way .*, got 1 in class 'b' \(1 of 3"):
        VariableEpisodeSampler(labels, VariableEpisodeSpec(2, 3), seeded(0), "abc")
    with pytest.raises(UsageError, match="got 1 in class 'q'"):
        sampled(VariableEpisodeSpec(2, 3), labels=["p", "p", "q"])
    with pytest.raises(UsageError, match="got 0 classes"):
        sampled(labels=torch.empty(0, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected the sampler's labels as integers or texts, got a tensor"):
        sampled(labels=torch.zeros(4))
    with pytest.raises(UsageError, match="expected num_episodes to be an integer of at least 1"):
        sampled(count=0)


def test_classes_of_two_items_give_a_shot_and_a_query_each():
    for episode in sampled(VariableEpisodeSpec(2, 3), labels=torch.tensor([0, 0, 1, 1, 2, 2])):
        assert set(episode.sizes) == {1}
        assert episode.query.shape[1] == 1
