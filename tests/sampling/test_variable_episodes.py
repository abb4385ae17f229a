"""Meta-Dataset's episodes of different sizes: the rule written out again, limits, items and errors."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.sampling.variable_episodes import VariableEpisodes, VariableEpisodeSampler, VariableEpisodeSpec

SIZES = (30, 7, 12, 200, 25, 9, 40, 16, 150, 22, 5, 31)
LABELS = torch.cat([torch.full((size,), label) for label, size in enumerate(SIZES)])
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(5))]


def sampler(spec: VariableEpisodeSpec | None = None, labels: Tensor = LABELS) -> VariableEpisodeSampler:
    return VariableEpisodeSampler(labels, spec or VariableEpisodeSpec(), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def drawn() -> VariableEpisodes:
    return sampler().sample(400)


def test_items_are_of_their_classes_and_only_once(drawn: VariableEpisodes) -> None:
    for each in drawn:
        classes = LABELS[each.query[:, 0]]
        assert len(classes.unique()) == len(each.sizes) == len(each.query)
        assert (LABELS[each.query] == classes.unsqueeze(1)).all()
        assert torch.equal(LABELS[each.support], classes.repeat_interleave(torch.tensor(each.sizes)))
        items = torch.cat([each.support, each.query.flatten()])
        assert len(items.unique()) == len(items)


def test_sizes_keep_to_the_limits(drawn: VariableEpisodes) -> None:
    ways = [len(each.sizes) for each in drawn]
    assert (min(ways), max(ways)) == (5, 12)
    assert stats.chisquare([ways.count(number) for number in range(5, 13)]).pvalue > 1e-4
    for each in drawn:
        left = [SIZES[label] for label in LABELS[each.query[:, 0]].tolist()]
        assert each.query.shape[1] == min(10, min(left) // 2)
        assert all(1 <= shots <= size - each.query.shape[1] for shots, size in zip(each.sizes, left, strict=True))
        assert len(each.support) <= 500
    assert max(len(each.support) for each in drawn) > 100
    few = sampler(VariableEpisodeSpec(max_support=60, max_shots=20)).sample(100)
    assert max(len(each.support) for each in few) <= 60


def test_shots_are_the_papers_rule() -> None:
    own = sampler()
    sizes, left = torch.tensor([30, 7, 200]), torch.tensor([27, 4, 197])
    for seed in range(30):
        own.generator.manual_seed(seed)
        shots = own._draw_shots(sizes, left)
        uniform = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        beta = 1 - uniform[0]
        support = min(500, sum(math.ceil(beta * min(100, each)) for each in left.tolist()))
        factors = [math.exp(math.log(0.5) + u * (math.log(2) - math.log(0.5))) for u in uniform[1:]]
        weights = [factor * size for factor, size in zip(factors, sizes.tolist(), strict=True)]
        expected = [
            min(math.floor(weight / sum(weights) * (support - 3)) + 1, most)
            for weight, most in zip(weights, left.tolist(), strict=True)
        ]
        assert shots == expected


def test_a_seed_gives_the_same_episodes() -> None:
    one, again = sampler().sample(10), sampler().sample(10)
    assert one.hash("a") == again.hash("a") != one.hash("b")
    other = VariableEpisodeSampler(LABELS, VariableEpisodeSpec(), torch.Generator().manual_seed(1)).sample(10)
    assert other.hash("a") != one.hash("a")
    assert len(one) == 10


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_ways": 0}, "min_ways"),
        ({"max_queries": 0}, "max_queries"),
        ({"min_ways": 9, "max_ways": 8}, "min_ways of at most max_ways=8, got 9"),
        ({"max_support": 20}, "max_support of at least max_ways=50"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VariableEpisodeSpec(**limits)


def test_sets_that_cannot_give_episodes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"at least 5 classes .* got 4 classes"):
        sampler(labels=torch.arange(40) % 4)
    with pytest.raises(UsageError, match="at least 2 items"):
        sampler(labels=torch.cat([torch.arange(40) % 8, torch.tensor([8])]))
