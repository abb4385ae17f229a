"""Heads: batched logits of episodes against one call of the distance for each episode."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.distances.base_distance import BaseDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation import heads

EPISODES, WAYS, SHOTS, DIMS = 3, 5, 4, 6
SOFT, VOTES = partial(heads.soft_nearest_neighbour, temperature=0.5), partial(heads.k_nearest_neighbours, k=4)
HEADS = [heads.nearest_prototype, heads.nearest_neighbour, heads.mean_similarity, SOFT, VOTES]


class Heavier(LpDistance):
    """A subclass with a formula of its own must not be taken for plain squared Euclid."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return 10 * super().compute_mat(query_emb, ref_emb)


class Learned(BaseDistance):
    """A distance with parameters: L1 after a linear map, scaled."""

    def __init__(self) -> None:
        super().__init__(normalize_embeddings=False)
        generator = torch.Generator().manual_seed(4)
        self.map = nn.Parameter(torch.randn(DIMS, 4, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.scale * ((query_emb @ self.map)[:, None] - (ref_emb @ self.map)[None]).abs().sum(dim=2)


DISTANCES: dict[str, Callable[[], BaseDistance | None]] = {
    "none": lambda: None,
    "squared": lambda: LpDistance(normalize_embeddings=False, power=2),
    "euclidean": lambda: LpDistance(normalize_embeddings=False),
    "normalized, squared": lambda: LpDistance(power=2),
    "p=3, squared": lambda: LpDistance(p=3, power=2, normalize_embeddings=False),
    "collects statistics": lambda: LpDistance(collect_stats=True),
    "subclass": lambda: Heavier(normalize_embeddings=False, power=2),
    "cosine": CosineSimilarity,
    "dot": lambda: DotProductSimilarity(normalize_embeddings=False),
    "SNR": lambda: SNRDistance(normalize_embeddings=False),
    "learned": Learned,
}


def episodes(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Overlapping classes: support (3, 5, 4, 6) and query (3, 40, 6)."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(EPISODES, WAYS, 1, DIMS, generator=generator, dtype=dtype)
    support = centres + torch.randn(EPISODES, WAYS, SHOTS, DIMS, generator=generator, dtype=dtype)
    query = centres.repeat(1, 1, 8, 1) + torch.randn(EPISODES, WAYS, 8, DIMS, generator=generator, dtype=dtype)
    return support, query.flatten(1, 2)


def one_by_one(query: Tensor, reference: Tensor, distance: BaseDistance | None) -> Tensor:
    """Similarity of each pair of each episode: the distance is asked for one episode at a time."""
    if distance is None:
        distance = LpDistance(normalize_embeddings=False, power=2)
    sign = 1 if distance.is_inverted else -1
    return torch.stack([sign * distance(q, r) for q, r in zip(query, reference, strict=True)])


def check_votes(logits: Tensor, each: np.ndarray, k: int) -> int:
    """The whole part of a logit is the vote of the k nearest; ties, whose number is returned, go to the nearest."""
    ties = 0
    for e, n in np.ndindex(*each.shape[:2]):
        voters = [item // SHOTS for item in sorted(range(WAYS * SHOTS), key=lambda item: -each[e, n, item])[:k]]
        assert logits[e, n].floor().tolist() == [voters.count(way) for way in range(WAYS)]
        order = sorted(set(voters), key=lambda way: (-voters.count(way), voters.index(way)))
        assert logits[e, n].argsort(descending=True)[: len(order)].tolist() == order
        ties += len(order) > 1 and voters.count(order[0]) == voters.count(order[1])
    return ties


@pytest.mark.parametrize("name", DISTANCES)
def test_every_head_equals_a_loop_over_episodes_classes_and_items(name: str):
    (support, query), distance = episodes(), DISTANCES[name]()
    with torch.no_grad():
        prototypes = sum(support[:, :, k] for k in range(SHOTS)) / SHOTS
        logits = heads.nearest_prototype(support, query, distance)
        assert logits.shape == (EPISODES, 40, WAYS)
        torch.testing.assert_close(logits, one_by_one(query, prototypes, distance))
        each = torch.stack([one_by_one(query, support[:, way], distance) for way in range(WAYS)], dim=2)
        torch.testing.assert_close(heads.nearest_neighbour(support, query, distance), each.max(dim=3).values)
        loop = sum(each[..., k] for k in range(SHOTS)) / SHOTS
        torch.testing.assert_close(heads.mean_similarity(support, query, distance), loop)
        for temperature in (1.0, 7.0):
            shares = heads.soft_nearest_neighbour(support, query, distance, temperature).softmax(dim=2)
            of_items = (each / temperature).flatten(2).softmax(dim=2)
            torch.testing.assert_close(shares, of_items.unflatten(2, (WAYS, SHOTS)).sum(dim=3))
        check_votes(heads.k_nearest_neighbours(support, query, distance), each.flatten(2).numpy(), k=3)


@pytest.mark.parametrize("k", [1, 2, 4, 9, 20])
def test_votes_of_any_number_of_neighbours(k: int):
    support, query = episodes()
    each = one_by_one(query, support.flatten(1, 2), None).numpy()
    ties = check_votes(heads.k_nearest_neighbours(support, query, k=k), each, k)
    assert ties >= {2: 5, 4: 5, 20: 120}.get(k, 0)  # every query ties where all twenty items vote


def test_prototypes_by_hand_in_float32_far_from_the_origin():
    support, query = episodes(torch.float32)
    means, logits = support.double().mean(dim=2), heads.nearest_prototype(support, query)
    expected = -(query.double()[:, :, None] - means[:, None]).square().sum(dim=3)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    far = heads.nearest_prototype(support + 3000, query + 3000)
    assert torch.equal(far.argmax(2), logits.argmax(2))


@pytest.mark.parametrize("name", ["none", "SNR", "learned"])
def test_gradients_equal_those_of_a_loop(name: str):
    (support, query), distance = (part.requires_grad_() for part in episodes()), DISTANCES[name]()
    leaves = [support, query, *(distance.parameters() if distance is not None else ())]
    each = one_by_one(query, support.flatten(1, 2), distance).unflatten(2, (WAYS, SHOTS))
    pairs = [
        (heads.nearest_prototype(support, query, distance), one_by_one(query, support.mean(dim=2), distance)),
        (heads.nearest_neighbour(support, query, distance), each.amax(dim=3)),
        (heads.mean_similarity(support, query, distance), each.mean(dim=3)),
    ]
    for ours, loop in pairs:
        got, expected = (torch.autograd.grad(logits.sin().sum(), leaves, retain_graph=True) for logits in (ours, loop))
        torch.testing.assert_close(got, expected)


class Lazy(BaseDistance):
    """Euclidean after a linear map that takes its size from the first embeddings."""

    def __init__(self) -> None:
        super().__init__(normalize_embeddings=False)
        self.map = nn.LazyLinear(3, bias=False)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(self.map(query_emb), self.map(ref_emb))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("inference", [False, True])
def test_a_distance_without_weights_yet_gets_them_and_can_be_trained(inference: bool):
    (support, query), distance = episodes(torch.float32), Lazy()
    with torch.inference_mode(inference):
        logits = heads.nearest_prototype(support, query, distance)
    torch.testing.assert_close(logits, one_by_one(query, support.mean(dim=2), distance))
    heads.nearest_prototype(support, query, distance).sum().backward()
    assert all(parameter.grad is not None for parameter in distance.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_similarities_that_are_nan_are_not_hidden_by_the_logits(head: Callable[..., Tensor]):
    """Classes chosen by NaN must be seen to be: the evaluator refuses logits that are not finite."""
    (support, query), diverged = episodes(), Learned()
    with torch.no_grad():
        diverged.scale.fill_(torch.nan)
        assert not torch.isfinite(head(support, query, diverged)).any()


def test_wrong_options_are_refused():
    for temperature in (0.0, float("nan")):
        with pytest.raises(UsageError, match=r"expected a temperature above 0, got .*; raise it"):
            heads.soft_nearest_neighbour(*episodes(), temperature=temperature)
    support, query = torch.zeros(2, 3, 1, 4), torch.zeros(2, 5, 6)
    with pytest.raises(UsageError, match="expected queries and support of one width, got 6 and 4"):
        heads.nearest_prototype(support, query)
    with pytest.raises(UsageError, match=r"expected a support \(E, W, K, D\), got a list; stack classes"):
        heads.nearest_prototype([support], query)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected k to be an integer of at least 1, got 0"):
        heads.k_nearest_neighbours(*episodes(), k=0)
    with pytest.raises(UsageError, match="expected k of at most 20, the support items, got 21; lower k"):
        heads.k_nearest_neighbours(*episodes(), k=21)


SHAPES = (3, 2, 4, 5, 6), (3, 2, 7, 6)  # support and queries of three batches of two episodes


def test_a_head_within_vmap_and_without_gradients_gives_the_same():
    support, query = (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda s, q: heads.nearest_prototype(s, q))(support, query)
        one_by_one = torch.stack([heads.nearest_prototype(*each) for each in zip(support, query, strict=True)])
    torch.testing.assert_close(mapped, one_by_one)
