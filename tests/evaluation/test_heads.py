"""Heads: batched logits of episodes against one call of the distance for each episode."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import (
    BaseDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import NCALoss
from pytorch_metric_learning.reducers import DoNothingReducer
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn

from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    mean_similarity,
    nearest_neighbour,
    nearest_prototype,
    similarities,
    soft_nearest_neighbour,
)

EPISODES, WAYS, SHOTS, QUERIES, DIMS = 4, 3, 2, 5, 6

DISTANCES: dict[str, Callable[[], BaseDistance | None]] = {
    "none": lambda: None,
    "squared Euclid": lambda: LpDistance(normalize_embeddings=False, power=2),
    "Euclid": lambda: LpDistance(normalize_embeddings=False),
    "normalised": LpDistance,
    "normalised, squared": lambda: LpDistance(power=2),
    "p=1": lambda: LpDistance(p=1, normalize_embeddings=False),
    "p=1, normalised by it": lambda: LpDistance(p=1),
    "p=3, squared": lambda: LpDistance(p=3, power=2, normalize_embeddings=False),
    "p=2, power 3": lambda: LpDistance(power=3, normalize_embeddings=False),
    "power 0.5": lambda: LpDistance(power=0.5, normalize_embeddings=False),
    "maximum": lambda: LpDistance(p=float("inf"), normalize_embeddings=False),
    "cosine": CosineSimilarity,
    "dot": lambda: DotProductSimilarity(normalize_embeddings=False),
    "dot, normalised": DotProductSimilarity,
    "SNR": lambda: SNRDistance(normalize_embeddings=False),
    "SNR, normalised": SNRDistance,
}


class Heavier(LpDistance):
    """A subclass with a formula of its own must not be taken for plain squared Euclid."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return 10 * super().compute_mat(query_emb, ref_emb)


def episodes(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(EPISODES, WAYS, SHOTS, DIMS, generator=generator, dtype=dtype)
    return support, torch.randn(EPISODES, QUERIES, DIMS, generator=generator, dtype=dtype)


def one_by_one(query: Tensor, reference: Tensor, distance: BaseDistance | None) -> Tensor:
    """Similarity of each pair of each episode: the distance is asked for one episode at a time."""
    if distance is None:
        distance = LpDistance(normalize_embeddings=False, power=2)
    sign = 1 if distance.is_inverted else -1
    return torch.stack([sign * distance(q, r) for q, r in zip(query, reference, strict=True)])


@pytest.mark.parametrize("name", DISTANCES)
def test_prototypes_equal_a_loop_over_episodes(name: str):
    support, query = episodes()
    prototypes = torch.stack([sum(support[:, :, k] for k in range(SHOTS))])[0] / SHOTS
    expected = one_by_one(query, prototypes, DISTANCES[name]())
    logits = nearest_prototype(support, query, DISTANCES[name]())
    assert logits.shape == (EPISODES, QUERIES, WAYS)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", DISTANCES)
def test_neighbours_equal_a_loop_over_episodes_and_classes(name: str):
    support, query = episodes()
    expected = torch.empty(EPISODES, QUERIES, WAYS, dtype=torch.float64)
    for way in range(WAYS):
        each = one_by_one(query, support[:, way], DISTANCES[name]())
        expected[:, :, way] = each.max(dim=2).values
    torch.testing.assert_close(nearest_neighbour(support, query, DISTANCES[name]()), expected)


@pytest.mark.parametrize("name", DISTANCES)
def test_both_heads_are_one_at_one_shot(name: str):
    support, query = episodes()
    torch.testing.assert_close(
        nearest_prototype(support[:, :, :1], query, DISTANCES[name]()),
        nearest_neighbour(support[:, :, :1], query, DISTANCES[name]()),
    )


@pytest.mark.parametrize("head", [nearest_prototype, nearest_neighbour, soft_nearest_neighbour, k_nearest_neighbours])
@pytest.mark.parametrize("name", DISTANCES)
def test_permuting_the_classes_permutes_the_logits(head: Callable[..., Tensor], name: str):
    support, query = episodes()
    order = torch.tensor([2, 0, 1])
    logits = head(support, query, DISTANCES[name]())
    torch.testing.assert_close(head(support[:, order], query, DISTANCES[name]()), logits[:, :, order])
    torch.testing.assert_close(head(support.flip(2), query, DISTANCES[name]()), logits)  # order of the shots
    torch.testing.assert_close(head(support, query.flip(1), DISTANCES[name]()), logits.flip(1))
    torch.testing.assert_close(head(support.flip(0), query.flip(0), DISTANCES[name]()), logits.flip(0))


@pytest.mark.parametrize("head", [nearest_prototype, nearest_neighbour])
def test_squared_euclid_by_hand_in_float32(head: Callable[..., Tensor]):
    support, query = episodes(dtype=torch.float32)
    s, q = support.double().numpy(), query.double().numpy()
    logits = head(support, query).numpy()
    for e, n, w in np.ndindex(EPISODES, QUERIES, WAYS):
        if head is nearest_prototype:
            expected = -((q[e, n] - s[e, w].mean(axis=0)) ** 2).sum()
        else:
            expected = max(-((q[e, n] - s[e, w, k]) ** 2).sum() for k in range(SHOTS))
        assert logits[e, n, w] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_subclass_of_lp_distance_keeps_its_own_formula():
    support, query = episodes()
    heavy = Heavier(normalize_embeddings=False, power=2)
    torch.testing.assert_close(nearest_prototype(support, query, heavy), 100 * nearest_prototype(support, query))


@pytest.mark.parametrize("name", ["none", "squared Euclid", "Euclid"])
def test_rotating_or_shifting_all_embeddings_leaves_euclid_as_it_is(name: str):
    support, query = episodes()
    rotation = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=torch.Generator().manual_seed(1)).double()).Q
    shift = torch.linspace(-2, 3, DIMS, dtype=torch.float64)
    logits = nearest_prototype(support, query, DISTANCES[name]())
    moved = nearest_prototype(support @ rotation + shift, query @ rotation + shift, DISTANCES[name]())
    torch.testing.assert_close(moved, logits)


@pytest.mark.parametrize("name", ["none", "p=3, squared", "cosine", "SNR"])
def test_gradients_equal_those_of_the_loop(name: str):
    support, query = (part.requires_grad_() for part in episodes())
    ours = torch.autograd.grad(nearest_prototype(support, query, DISTANCES[name]()).sin().sum(), [support, query])
    loop = one_by_one(query, support.mean(dim=2), DISTANCES[name]())
    for gradient, expected in zip(ours, torch.autograd.grad(loop.sin().sum(), [support, query]), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_single_episode_and_more_references_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    query, reference = torch.randn(1, 2, 3, generator=generator), torch.randn(1, 40, 3, generator=generator)
    torch.testing.assert_close(similarities(query, reference), -torch.cdist(query, reference).square())


def test_a_distance_that_collects_statistics_can_score():
    support, query = episodes()
    distance = LpDistance(collect_stats=True)
    torch.testing.assert_close(
        nearest_prototype(support, query, distance), nearest_prototype(support, query, LpDistance())
    )


def test_embeddings_far_from_the_origin_keep_their_float32_digits():
    support, query = episodes(dtype=torch.float32)
    expected = nearest_prototype(support, query).argmax(2)
    assert torch.equal(nearest_prototype(support + 3000, query + 3000).argmax(2), expected)


# Every head by the similarities (E, N, S) of a loop over episodes, where the support items stand class by class.


def slow_shares(query: Tensor, support: Tensor, distance: BaseDistance | None, temperature: float) -> np.ndarray:
    """Each class's share of exp(similarity / temperature), one query and one item at a time."""
    each = one_by_one(query, support.flatten(1, 2), distance).detach().numpy()
    ways, shots = support.shape[1:3]
    shares = np.zeros((*query.shape[:2], ways))
    for e, n in np.ndindex(*query.shape[:2]):
        best = max(each[e, n])
        weights = [math.exp((value - best) / temperature) for value in each[e, n]]
        for item, weight in enumerate(weights):
            shares[e, n, item // shots] += weight / sum(weights)
    return shares


def slow_votes(each: np.ndarray, shots: int, k: int) -> tuple[dict[int, int], list[int]]:
    """Votes of the k nearest of one query's items, and the classes from the winner down: ties go to the nearest."""
    by_nearness = sorted(range(len(each)), key=lambda item: -each[item])[:k]
    votes: dict[int, int] = {}
    first: dict[int, int] = {}
    for rank, item in enumerate(by_nearness):
        votes[item // shots] = votes.get(item // shots, 0) + 1
        first.setdefault(item // shots, rank)
    return votes, sorted(votes, key=lambda way: (-votes[way], first[way]))


def check_votes(
    logits: Tensor, query: Tensor, support: Tensor, distance: BaseDistance | None, k: int, least_ties: int = 0
) -> None:
    """The logits' whole part is the vote, and they order the classes as the loop does."""
    each = one_by_one(query, support.flatten(1, 2), distance).detach().numpy()
    ways, shots = support.shape[1:3]
    ties = 0
    for e, n in np.ndindex(*query.shape[:2]):
        votes, order = slow_votes(each[e, n], shots, k)
        assert logits[e, n].floor().tolist() == [votes.get(way, 0) for way in range(ways)]
        assert logits[e, n].argsort(descending=True)[: len(order)].tolist() == order
        assert (logits[e, n] == 0).sum() == ways - len(order)
        ties += len(order) > 1 and votes[order[0]] == votes[order[1]]
    assert ties >= least_ties


def larger(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping classes: 5 ways, 4 shots, 40 queries."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 5, 1, DIMS, generator=generator, dtype=torch.float64)
    support = centres + torch.randn(3, 5, 4, DIMS, generator=generator, dtype=torch.float64)
    query = centres.repeat(1, 1, 8, 1) + torch.randn(3, 5, 8, DIMS, generator=generator, dtype=torch.float64)
    return support, query.flatten(1, 2)


@pytest.mark.parametrize("name", DISTANCES)
def test_soft_neighbours_are_the_shares_of_a_loop(name: str):
    support, query = episodes()
    for temperature in (1.0, 0.1, 7.0):
        logits = soft_nearest_neighbour(support, query, DISTANCES[name](), temperature)
        expected = slow_shares(query, support, DISTANCES[name](), temperature)
        np.testing.assert_allclose(logits.softmax(dim=2).numpy(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "cosine", "p=1", "dot"])
@pytest.mark.parametrize("shots", [1, 2])
def test_soft_neighbours_are_the_probability_of_neighbourhood_component_analysis(name: str, shots: int):
    support, query = episodes()
    support = support[:, :, :shots]
    temperature = 0.5
    distance = DISTANCES[name]() or LpDistance(normalize_embeddings=False, power=2)
    nca = NCALoss(softmax_scale=1 / temperature, distance=distance, reducer=DoNothingReducer())
    logits = soft_nearest_neighbour(support, query, DISTANCES[name](), temperature)
    of_item = torch.arange(WAYS).repeat_interleave(shots)
    for e in range(EPISODES):
        for way in range(WAYS):
            losses = nca(query[e], torch.full((QUERIES,), way), ref_emb=support[e].flatten(0, 1), ref_labels=of_item)
            torch.testing.assert_close(-logits[e].log_softmax(dim=1)[:, way], losses["loss"]["losses"])
    if shots == 1:
        torch.testing.assert_close(logits, nearest_prototype(support, query, distance) / temperature)


def test_a_low_temperature_is_the_nearest_neighbour_and_a_high_one_is_all_alike():
    support, query = larger()
    cold = soft_nearest_neighbour(support, query, temperature=1e-4)
    torch.testing.assert_close(cold * 1e-4, nearest_neighbour(support, query), rtol=1e-3, atol=1e-3)
    shares = soft_nearest_neighbour(support, query, temperature=1e6).softmax(dim=2)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_of_nothing_is_refused(temperature: float):
    with pytest.raises(ValueError, match=r"expected a temperature above 0, got .*; raise it"):
        soft_nearest_neighbour(*episodes(), temperature=temperature)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("k", [1, 3, WAYS * SHOTS])
def test_votes_are_those_of_a_loop_and_ties_go_to_the_class_with_the_nearest_item(name: str, k: int):
    support, query = episodes()
    logits = k_nearest_neighbours(support, query, DISTANCES[name](), k)
    assert logits.shape == (EPISODES, QUERIES, WAYS)
    check_votes(logits, query, support, DISTANCES[name](), k)


@pytest.mark.parametrize("k", range(1, 21))
def test_votes_of_any_number_of_neighbours(k: int):
    support, query = larger()
    # every query ties where all twenty items vote
    least_ties = {1: 0, 2: 5, 4: 5, 6: 5, 20: 120}.get(k, 0)
    check_votes(k_nearest_neighbours(support, query, k=k), query, support, None, k, least_ties)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
@pytest.mark.parametrize(
    ("name", "metric"), [("none", "euclidean"), ("p=1", "manhattan"), ("cosine", "cosine"), ("maximum", "chebyshev")]
)
def test_neighbours_agree_with_scikit_learn_where_the_vote_is_not_tied(name: str, metric: str, k: int):
    support, query = larger()
    ours = k_nearest_neighbours(support, query, DISTANCES[name](), k).argmax(dim=2)
    each = one_by_one(query, support.flatten(1, 2), DISTANCES[name]()).numpy()
    compared = 0
    for e in range(len(support)):
        fitted = KNeighborsClassifier(k, metric=metric).fit(support[e].flatten(0, 1), np.repeat(np.arange(5), 4))
        theirs = fitted.predict(query[e])
        for n in range(query.shape[1]):
            votes = sorted(slow_votes(each[e, n], 4, k)[0].values())
            if len(votes) == 1 or votes[-1] > votes[-2]:
                assert ours[e, n] == theirs[n]
                compared += 1
    assert compared > 60


@pytest.mark.parametrize("name", DISTANCES)
def test_one_neighbour_of_k_is_the_nearest_neighbour(name: str):
    support, query = larger()
    one = k_nearest_neighbours(support, query, DISTANCES[name](), k=1).argmax(dim=2)
    assert torch.equal(one, nearest_neighbour(support, query, DISTANCES[name]()).argmax(dim=2))


def test_three_neighbours_are_the_default():
    support, query = larger()
    assert torch.equal(k_nearest_neighbours(support, query), k_nearest_neighbours(support, query, None, 3))


@pytest.mark.parametrize("k", [0, -1, True, 2.0, WAYS * SHOTS + 1])
def test_more_neighbours_than_support_items_are_refused(k: object):
    expected = "k of at most 6, the support items" if k == WAYS * SHOTS + 1 else "k to be an integer of at least 1"
    with pytest.raises(ValueError, match=f"expected {expected}, got {k}"):
        k_nearest_neighbours(*episodes(), k=k)  # type: ignore[arg-type]


def test_prototypes_agree_with_scikit_learns_centroids():
    support, query = larger()
    ours = nearest_prototype(support, query).argmax(dim=2)
    for e in range(len(support)):
        fitted = NearestCentroid().fit(support[e].flatten(0, 1), np.repeat(np.arange(5), 4))
        assert ours[e].tolist() == fitted.predict(query[e]).tolist()


class Learned(BaseDistance):
    """A distance with parameters: city blocks after a linear map, scaled."""

    def __init__(self) -> None:
        super().__init__(normalize_embeddings=False)
        generator = torch.Generator().manual_seed(4)
        self.map = nn.Parameter(torch.randn(DIMS, 4, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.scale * ((query_emb @ self.map)[:, None] - (ref_emb @ self.map)[None]).abs().sum(dim=2)


class Bilinear(Learned):
    """A learned similarity, larger for nearer, between normalised embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.is_inverted = True
        self.normalize_embeddings = True

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.scale * query_emb @ self.map @ self.map.T @ ref_emb.T


@pytest.mark.parametrize("learned", [Learned, Bilinear])
def test_a_learned_distance_scores_in_every_head_as_in_a_loop(learned: type[Learned]):
    (support, query), distance = episodes(), learned()
    torch.testing.assert_close(
        nearest_prototype(support, query, distance), one_by_one(query, support.mean(dim=2), distance)
    )
    each = one_by_one(query, support.flatten(1, 2), distance).unflatten(2, (WAYS, SHOTS))
    torch.testing.assert_close(nearest_neighbour(support, query, distance), each.max(dim=3).values)
    shares = soft_nearest_neighbour(support, query, distance).softmax(dim=2)
    np.testing.assert_allclose(shares.detach().numpy(), slow_shares(query, support, distance, 1.0), rtol=1e-9)
    check_votes(k_nearest_neighbours(support, query, distance, 4), query, support, distance, 4)


@pytest.mark.parametrize("head", [nearest_prototype, nearest_neighbour, soft_nearest_neighbour])
def test_a_learned_distance_gets_its_gradient_through_the_heads(head: Callable[..., Tensor]):
    (support, query), distance = episodes(), Learned()
    ours = torch.autograd.grad(head(support, query, distance).sin().sum(), list(distance.parameters()))
    loop = [head(s[None], q[None], distance) for s, q in zip(support, query, strict=True)]
    expected = torch.autograd.grad(torch.cat(loop).sin().sum(), list(distance.parameters()))
    torch.testing.assert_close(ours, expected)
    step, base = 1e-6, distance.scale.item()  # and by finite differences in one parameter
    sums = []
    with torch.no_grad():
        for sign in (1, -1):
            distance.scale.fill_(base + sign * step)
            sums.append(head(support, query, distance).sin().sum().item())
    assert ours[1].item() == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize(
    "head", [nearest_prototype, nearest_neighbour, soft_nearest_neighbour, partial(k_nearest_neighbours, k=3)]
)
def test_similarities_that_are_nan_are_not_hidden_by_the_logits(head: Callable[..., Tensor]):
    """What is classified by NaN must be seen to be: the evaluator refuses logits that are not finite."""
    (support, query), diverged = episodes(), Learned()
    with torch.no_grad():
        diverged.scale.fill_(torch.nan)
        assert not torch.isfinite(head(support, query, diverged)).any()


# --- mean_similarity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTANCES)
def test_mean_similarity_equals_a_loop_over_episodes_and_classes(name: str):
    support, query = episodes()
    expected = torch.zeros(EPISODES, QUERIES, WAYS, dtype=torch.float64)
    for way in range(WAYS):
        for shot in range(SHOTS):
            expected[:, :, way] += one_by_one(query, support[:, way, shot : shot + 1], DISTANCES[name]())[:, :, 0]
    logits = mean_similarity(support, query, DISTANCES[name]())
    assert logits.shape == (EPISODES, QUERIES, WAYS)
    torch.testing.assert_close(logits, expected / SHOTS)


@pytest.mark.parametrize("name", DISTANCES)
def test_mean_similarity_is_the_nearest_neighbour_at_one_shot_and_below_it_at_more(name: str):
    support, query = episodes()
    torch.testing.assert_close(
        mean_similarity(support[:, :, :1], query, DISTANCES[name]()),
        nearest_neighbour(support[:, :, :1], query, DISTANCES[name]()),
    )
    assert (
        mean_similarity(support, query, DISTANCES[name]()) < nearest_neighbour(support, query, DISTANCES[name]())
    ).all()


def test_mean_dot_product_is_that_with_the_prototype_and_mean_squared_euclid_is_farther_by_the_spread():
    support, query = larger()
    torch.testing.assert_close(
        mean_similarity(support, query, DISTANCES["dot"]()), nearest_prototype(support, query, DISTANCES["dot"]())
    )
    spread = support.var(dim=2, unbiased=False).sum(dim=2)  # (E, W): mean squared distance to the prototype
    torch.testing.assert_close(mean_similarity(support, query), nearest_prototype(support, query) - spread.unsqueeze(1))


@pytest.mark.parametrize("name", DISTANCES)
def test_permuting_classes_shots_or_queries_permutes_mean_similarities(name: str):
    support, query = episodes()
    order = torch.tensor([2, 0, 1])
    logits = mean_similarity(support, query, DISTANCES[name]())
    torch.testing.assert_close(mean_similarity(support[:, order], query, DISTANCES[name]()), logits[:, :, order])
    torch.testing.assert_close(mean_similarity(support.flip(2), query, DISTANCES[name]()), logits)
    torch.testing.assert_close(mean_similarity(support, query.flip(1), DISTANCES[name]()), logits.flip(1))
    torch.testing.assert_close(mean_similarity(support.flip(0), query.flip(0), DISTANCES[name]()), logits.flip(0))
    torch.testing.assert_close(mean_similarity(support.repeat(1, 1, 3, 1), query, DISTANCES[name]()), logits)


@pytest.mark.parametrize("learned", [Learned, Bilinear])
def test_a_learned_distance_and_embeddings_get_their_gradients_through_the_mean(learned: type[Learned]):
    (support, query), distance = episodes(), learned()
    leaves = [support.requires_grad_(), query.requires_grad_(), *distance.parameters()]
    logits = mean_similarity(support, query, distance)
    each = one_by_one(query, support.flatten(1, 2), distance).unflatten(2, (WAYS, SHOTS))
    loop = sum(each[..., shot] for shot in range(SHOTS)) / SHOTS
    torch.testing.assert_close(logits, loop)
    for got, expected in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (logits, loop)), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected)


def test_mean_similarities_that_are_nan_are_seen_to_be():
    (support, query), diverged = episodes(), Learned()
    with torch.no_grad():
        diverged.scale.fill_(torch.nan)
        assert not torch.isfinite(mean_similarity(support, query, diverged)).any()
