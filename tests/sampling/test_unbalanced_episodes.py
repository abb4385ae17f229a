"""Episodes whose queries divide among the classes at random: counts, items, their distribution, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import EpisodeSampler, EpisodeSpec, draw_counts

BALANCED, UNBALANCED = EpisodeSpec(4, 2, 5), EpisodeSpec(4, 2, 5, query_balance=2.0)
LABELS = torch.arange(8 * 30) % 8


def sampler(spec: EpisodeSpec, labels: torch.Tensor = LABELS) -> EpisodeSampler:
    return EpisodeSampler(labels, spec, torch.Generator().manual_seed(0))


def test_queries_are_of_the_class_that_is_said_and_never_support() -> None:
    drawn = sampler(UNBALANCED).sample(200)
    classes = LABELS[drawn.support[:, :, 0]]
    assert drawn.query.shape == (200, 4, 5)
    assert torch.equal(LABELS[drawn.query.flatten(1)], classes.gather(1, drawn.true_ways))
    assert (drawn.true_ways.diff(dim=1) >= 0).all()  # class after class
    for support, query in zip(drawn.support, drawn.query, strict=True):
        items = torch.cat([support.flatten(), query.flatten()])
        assert len(items.unique()) == len(items)


def test_a_balanced_episode_has_as_many_queries_of_each_class() -> None:
    drawn = sampler(BALANCED).sample(3)
    assert drawn.query_ways is None
    assert drawn.true_ways.tolist() == [[0] * 5 + [1] * 5 + [2] * 5 + [3] * 5]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_counts_follow_the_dirichlet_distribution(alpha: float) -> None:
    ways, queries, episodes = 5, 15, 20_000
    counts = draw_counts(episodes, ways, queries, alpha, torch.Generator().manual_seed(0))
    assert (counts.sum(dim=1) == ways * queries).all()
    # a class's share is Beta(alpha, (ways - 1) alpha); rounding moves it by less than a query, so wide bins
    edges = np.array([0, 5, 10, 15, 20, 30, 75])
    share = stats.beta(alpha, (ways - 1) * alpha)
    expected = episodes * np.diff(share.cdf((edges - 0.5).clip(0) / (ways * queries)) + 0.0)
    expected[-1] += episodes - expected.sum()
    for one in range(ways):
        observed = np.histogram(counts[:, one].numpy(), bins=np.append(edges[:-1] - 0.5, 75.5))[0]
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_a_wrong_distribution_is_seen() -> None:
    counts = draw_counts(20_000, 5, 15, 3.0, torch.Generator().manual_seed(0))
    share = stats.beta(2.0, 8.0)
    assert abs((counts[:, 0].double().std() / 75).item() - share.std()) > 0.01


@pytest.mark.parametrize("per_class", [30, 400])  # both ways in which items are drawn
def test_with_a_large_alpha_they_are_the_balanced_episodes(per_class: int) -> None:
    labels = torch.arange(8 * per_class) % 8
    balanced = sampler(BALANCED, labels).sample(50)
    nearly = sampler(EpisodeSpec(4, 2, 5, query_balance=1e9), labels).sample(50)
    assert torch.equal(balanced.support, nearly.support)
    assert torch.equal(balanced.query, nearly.query)
    assert torch.equal(balanced.true_ways.expand(50, -1), nearly.true_ways)


def test_a_seed_gives_the_same_episodes_and_the_hash_tells_them_from_others() -> None:
    one, again = sampler(UNBALANCED).sample(20), sampler(UNBALANCED).sample(20)
    assert torch.equal(one.query, again.query)
    assert one.hash() == again.hash() != sampler(BALANCED).sample(20).hash()
    part = one[3:5]
    assert torch.equal(part.true_ways, one.true_ways[3:5])


def test_a_class_that_could_not_have_all_queries_is_refused_before_any_draw() -> None:
    with pytest.raises(UsageError, match=r"at least 32 items \(4-way 12-shot 5-query unbalanced"):
        sampler(EpisodeSpec(4, 12, 5, query_balance=2.0))


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_what_is_no_balance_is_refused(alpha: object) -> None:
    with pytest.raises(UsageError, match="query_balance as a number above 0, or None, got"):
        EpisodeSpec(5, 1, 15, query_balance=alpha)  # type: ignore[arg-type]
    assert EpisodeSpec(5, 1, 15, query_balance=2).query_balance == 2.0
    assert str(UNBALANCED) == "4-way 2-shot 5-query unbalanced (Dirichlet 2)"


def test_training_on_them_is_refused() -> None:
    data = FewShotDataset(torch.zeros(240, 1, 4, 4, dtype=torch.uint8), LABELS, list("abcdefgh"))
    with pytest.raises(UsageError, match="expected balanced episodes to train on, got 4-way 2-shot 5-query unbalanced"):
        EpisodeStream(data, UNBALANCED, seed=0)
    assert partial(EpisodeStream, data, BALANCED)(seed=0)
