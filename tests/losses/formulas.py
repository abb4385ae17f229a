"""Slow second ways to the losses: loops over items, pairs and triplets, written from the papers."""

from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from torch import Tensor

from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss

DIMS = 5
QUERY_LABELS = torch.tensor([0, 7, 3, 7, 11, 0, 3, 3])
SUPPORT_LABELS = torch.tensor([7, 0, 7, 11, 7, 3, 5])  # uneven shots, and a class 5 without queries
BATCH_LABELS = torch.tensor([4, 4, 8, 11, 4, 11, 11, 11])  # 8 stands alone
SCALE, TEMPERATURE, MARGIN, NEGATIVE_WEIGHT = 1.7, 0.7, 0.3, 0.4
LOSSES: dict[str, Any] = {
    "prototypical": partial(PrototypicalLoss, scale=SCALE),
    "matching": partial(MatchingLoss, scale=SCALE),
    "pairs": partial(PairVerificationLoss, balanced=False, negative_weight=NEGATIVE_WEIGHT),
    "ntxent": partial(DenseNTXentLoss, temperature=TEMPERATURE),
    "triplet": partial(DenseTripletMarginLoss, margin=MARGIN),
}
SQUARED_EUCLID = partial(LpDistance, normalize_embeddings=False, power=2)
Mined = tuple[Tensor, ...] | None
Element = tuple[Tensor, tuple[int, ...]]  # a loss, and the numbers of its anchor and of what that is compared with
each_input = pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learned(dim: int = DIMS, seed: int = 0) -> WeightedL1Similarity:
    """A similarity in float64 as if it had been trained: weights of both signs, and a bias."""
    similarity = WeightedL1Similarity(dim).double()
    with torch.no_grad():
        similarity.score.weight.copy_(normal(dim, seed=100 + seed))
        similarity.score.bias.fill_(0.3)
    return similarity


DISTANCES = {
    "Lp normalized": LpDistance,
    "L1 normalized": partial(LpDistance, p=1),
    "squared, normalized": partial(LpDistance, power=2),
    "Euclid": partial(LpDistance, normalize_embeddings=False),
    "squared Euclid": SQUARED_EUCLID,
    "L1 cubed": partial(LpDistance, normalize_embeddings=False, p=1, power=3),
    "SNR normalized": SNRDistance,
    "SNR": partial(SNRDistance, normalize_embeddings=False),
    "cosine": CosineSimilarity,
    "cosine cubed": partial(CosineSimilarity, power=3),
    "dot product normalized": DotProductSimilarity,
    "dot product": partial(DotProductSimilarity, normalize_embeddings=False),
    "weighted L1": learned,
}


def arguments(episode: bool, dtype: torch.dtype = torch.float64, mined: Mined = None) -> tuple[Any, ...]:
    """What a loss is called with: 8 queries and 7 support items, or a batch of 8."""
    items = 0.5 * normal(8, DIMS, seed=5, dtype=dtype)  # near enough for losses on both sides of margins
    if episode:
        return items, QUERY_LABELS, mined, 0.5 * normal(7, DIMS, seed=2, dtype=dtype), SUPPORT_LABELS
    return items, BATCH_LABELS, mined


def leaves_of(given: tuple[Any, ...]) -> list[Tensor]:
    """The embeddings among the arguments, which get a gradient from here on."""
    return [x.requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()]


def outcome(loss: Any, given: tuple[Any, ...], *parameters: Tensor) -> list[Tensor]:
    """Value and gradients of the embeddings, and of parameters."""
    leaves = [*leaves_of(given), *parameters]
    value = loss(*given)
    return [value, *torch.autograd.grad(value, leaves)]


def check_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def similarity(distance: Any, query: Tensor, reference: Tensor) -> Tensor:
    """Of one pair, from the distances' definitions; that of a distance is its negative."""
    x, y = query.double(), reference.double()
    if isinstance(distance, WeightedL1Similarity):
        weights, bias = (part.detach().double() for part in (distance.score.weight, distance.score.bias))
        return bias + sum(w * (a - b).abs() for w, a, b in zip(weights, x, y, strict=True))
    if distance.normalize_embeddings:
        x = x / (x.abs() ** distance.p).sum() ** (1 / distance.p)
        y = y / (y.abs() ** distance.p).sum() ** (1 / distance.p)
    if isinstance(distance, LpDistance):
        value = ((x - y).abs() ** distance.p).sum() ** (1 / distance.p)
    elif isinstance(distance, SNRDistance):
        value = (x - y).var() / x.var()
    else:
        value = (x * y).sum()
    return value**distance.power if distance.is_inverted else -(value**distance.power)


def all_pairs(labels: Tensor, ref_labels: Tensor | None = None) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Matching pairs and the others; without references an item is no pair with itself."""
    others = labels if ref_labels is None else ref_labels
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(others)) if ref_labels is not None or i != j]
    matching = [(i, j) for i, j in pairs if labels[i] == others[j]]
    return matching, [pair for pair in pairs if pair not in matching]


def pairs_of(mined: Mined, labels: Tensor, ref_labels: Tensor | None) -> tuple[list[Any], list[Any], list[Any]]:
    """Matching pairs, others and triplets, of what a miner found or else all."""
    if mined is None:
        matching, different = all_pairs(labels, ref_labels)
    else:
        found = [index.tolist() for index in mined]
        matching = list(zip(*found[:2], strict=True))
        different = list(zip(found[2 if len(found) == 4 else 0], found[-1], strict=True))
        if len(found) == 3:
            return matching, different, list(zip(*found, strict=True))
    return matching, different, [(a, p, n) for a, p in matching for b, n in different if a == b]


def class_losses(name: str, distance: Any, given: tuple[Any, ...]) -> list[Element]:
    """Of each query, minus the logarithm of the probability of its class: Snell et al. eq. 2, Vinyals et al. eq. 1."""
    query, labels, mined, support, support_labels = (*given, None, None)[:5]
    alone = support is None
    support, support_labels = (query, labels) if alone else (support, support_labels)
    anchors = () if mined is None else mined if alone else mined[:: 2 if len(mined) == 4 else 3]
    named = [i for index in anchors for i in index.tolist()]
    most = max(map(named.count, named), default=1)
    losses = []
    for i, x in enumerate(query):
        mass: dict[int, Any] = {}
        others = [j for j in range(len(support)) if not (alone and i == j)]
        for c in {int(support_labels[j]) for j in others}:
            members = [support[j].double() for j in others if support_labels[j] == c]
            if name == "prototypical":
                members = [sum(members) / len(members)]
            mass[c] = sum((SCALE * similarity(distance, x, y)).exp() for y in members)
        if int(labels[i]) in mass:
            weight = 1.0 if mined is None else named.count(i) / most
            losses.append((-weight * (mass[int(labels[i])] / sum(mass.values())).log(), (i,)))
    return losses


def losses_by_hand(name: str, distance: Any, given: tuple[Any, ...]) -> list[Element]:
    """All losses of a call, before a reducer."""
    if name in ("prototypical", "matching"):
        return class_losses(name, distance, given)
    query, labels, mined, support, support_labels = (*given, None, None)[:5]
    references = query if support is None else support
    matching, different, triplets = pairs_of(mined, labels, support_labels)
    s = [[similarity(distance, x, y) for y in references] for x in query]
    if name == "pairs":  # binary cross-entropy
        probability = [[1 / (1 + (-value).exp()) for value in row] for row in s]
        losses = [(-probability[i][j].log(), (i, j)) for i, j in matching]
        return losses + [(-NEGATIVE_WEIGHT * (1 - probability[i][j]).log(), (i, j)) for i, j in different]
    if name == "ntxent":
        mass = [[(value / TEMPERATURE).exp() for value in row] for row in s]
        away = [sum(mass[i][j] for a, j in different if a == i) for i in range(len(query))]
        return [(-(mass[i][j] / (mass[i][j] + away[i])).log(), (i, j)) for i, j in matching]
    return [((s[a][n] - s[a][p] + MARGIN).clamp(min=0), (a, p, n)) for a, p, n in triplets]


def mean_by_hand(name: str, elements: list[Element]) -> Tensor:
    """As the default reducers do: the mean, of triplets only of those beyond the margin."""
    losses = torch.stack([loss for loss, _ in elements])
    return losses[losses > 0].mean() if name == "triplet" else losses.mean()
