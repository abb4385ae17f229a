"""Heads: batched logits of episodes against one call of the distance for each episode."""

from collections.abc import Callable

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
from torch import Tensor

from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype, similarities

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


@pytest.mark.parametrize("head", [nearest_prototype, nearest_neighbour])
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
