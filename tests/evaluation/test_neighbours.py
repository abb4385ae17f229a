"""nearest_neighbours against a full sort of distances written out in numpy."""

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

from pml_fewshot.evaluation import neighbours
from pml_fewshot.evaluation.neighbours import nearest_neighbours


def rows(count: int, dims: int, seed: int) -> Tensor:
    """Rows of quite different lengths, so that cosine, dot product and Euclid rank differently."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3 * torch.rand(count, 1, generator=generator)
    return torch.randn(count, dims, generator=generator) * lengths


def unit(values: np.ndarray, p: float = 2) -> np.ndarray:
    return values / (np.abs(values) ** p).sum(axis=-1, keepdims=True) ** (1 / p)


def snr(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.var(query - reference, axis=-1, ddof=1) / np.var(query, axis=-1, ddof=1)


# PML distance, and the same as "smaller is nearer" of one query (D,) and all references (M, D)
Far = Callable[[np.ndarray, np.ndarray], np.ndarray]
DISTANCES: dict[str, tuple[Callable[[], BaseDistance | None], Far]] = {
    "none": (lambda: None, lambda q, r: np.sqrt(((q - r) ** 2).sum(1))),
    "Euclid": (lambda: LpDistance(normalize_embeddings=False), lambda q, r: np.sqrt(((q - r) ** 2).sum(1))),
    "power 0.5": (lambda: LpDistance(normalize_embeddings=False, power=0.5), lambda q, r: ((q - r) ** 2).sum(1)),
    "normalised": (LpDistance, lambda q, r: ((unit(q) - unit(r)) ** 2).sum(1)),
    "cosine": (CosineSimilarity, lambda q, r: -(unit(r) @ unit(q))),
    "dot": (lambda: DotProductSimilarity(normalize_embeddings=False), lambda q, r: -(r @ q)),
    "dot cubed": (lambda: DotProductSimilarity(normalize_embeddings=False, power=3), lambda q, r: -((r @ q) ** 3)),
    "dot squared": (lambda: DotProductSimilarity(normalize_embeddings=False, power=2), lambda q, r: -((r @ q) ** 2)),
    "p=1": (lambda: LpDistance(p=1, normalize_embeddings=False), lambda q, r: np.abs(q - r).sum(1)),
    "p=1, normalised": (lambda: LpDistance(p=1), lambda q, r: np.abs(unit(q, 1) - unit(r, 1)).sum(1)),
    "p=4": (lambda: LpDistance(p=4, normalize_embeddings=False), lambda q, r: ((q - r) ** 4).sum(1)),
    "dot, p=1": (lambda: DotProductSimilarity(p=1), lambda q, r: -(unit(r, 1) @ unit(q, 1))),
    "SNR": (lambda: SNRDistance(normalize_embeddings=False), snr),
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_neighbours_equal_a_full_sort(name: str, k: int):
    distance, far = DISTANCES[name]
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    found = nearest_neighbours(query, reference, k, distance())
    assert found.shape == (25, k)
    assert found.dtype == torch.int64
    q, r = query.double().numpy(), reference.double().numpy()
    for i in range(25):
        assert len(set(found[i].tolist())) == k
        distances = far(q[i], r)
        # compared by distance, for float32 may swap two references that are all but equally far
        np.testing.assert_allclose(distances[found[i]], np.sort(distances)[:k], rtol=1e-5, atol=1e-5)


def test_the_rankings_differ_so_that_the_test_above_tells_them_apart():
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    chosen = ("none", "normalised", "dot", "dot squared", "p=1", "p=1, normalised", "p=4", "dot, p=1", "SNR")
    found = {nearest_neighbours(query, reference, 7, DISTANCES[name][0]()).numpy().tobytes() for name in chosen}
    assert len(found) == len(chosen)


def test_a_subclass_keeps_its_own_formula():
    class FirstOnly(LpDistance):
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb[:, None, 0] - ref_emb[None, :, 0]).abs()

    query, reference = rows(10, 5, 0), rows(30, 5, 1)
    found = nearest_neighbours(query, reference, 4, FirstOnly(normalize_embeddings=False))
    expected = (query[:, None, 0] - reference[None, :, 0]).abs().argsort(dim=1)[:, :4]
    assert torch.equal(found, expected)


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    distance = LpDistance(p=1, normalize_embeddings=False)
    whole = nearest_neighbours(query, reference, 7, distance)
    for block in (1, 60, 179, 1500):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        assert torch.equal(nearest_neighbours(query, reference, 7, distance), whole)


@pytest.mark.parametrize("name", ["none", "cosine", "p=1"])
def test_embeddings_of_any_float_type_and_layout_with_gradients_are_searched(name: str):
    distance = DISTANCES[name][0]()
    query, reference = rows(10, 6, 0), rows(40, 6, 1)
    expected = nearest_neighbours(query, reference, 5, distance)
    assert torch.equal(nearest_neighbours(query.double(), reference.double(), 5, distance), expected)
    assert torch.equal(nearest_neighbours(query.T.contiguous().T, reference.repeat(2, 1)[:40], 5, distance), expected)
    assert torch.equal(nearest_neighbours(query.clone().requires_grad_(), reference, 5, distance), expected)


def clustered(count: int = 3000, dims: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(30, dims, generator=torch.Generator().manual_seed(7))
    return centres[torch.randint(30, (count,), generator=generator)] + torch.randn(count, dims, generator=generator)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("name", ["none", "cosine", "dot"])
def test_approximate_indices_find_nearly_all_on_clustered_data(index: neighbours.Index, name: str):
    distance = DISTANCES[name][0]()
    query, reference = clustered(200, seed=1), clustered()
    exact = nearest_neighbours(query, reference, 10, distance)
    found = nearest_neighbours(query, reference, 10, distance, index)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    # a graph's links lead badly to the few long rows that win all inner products
    assert recall > (0.8 if name == "dot" else 0.97)


@pytest.mark.parametrize("count", [1, 30, 39, 100, 500])
def test_an_inverted_list_index_of_few_items_is_exact(count: int, capfd: pytest.CaptureFixture[str]):
    query, reference = rows(20, 4, 0), rows(count, 4, 1)
    k = min(5, count)
    found = nearest_neighbours(query, reference, k, None, "ivf")
    if count < 300:  # up to eight lists: all are looked into
        assert torch.equal(found, nearest_neighbours(query, reference, k))
    captured = capfd.readouterr()
    if count >= 39:
        assert "WARNING" not in captured.err + captured.out  # faiss prints one for too few training points


def test_places_that_an_approximate_index_could_not_fill_are_minus_one():
    """Lists far apart: the looked-into ones hold fewer items than asked for."""
    reference = clustered(2000)
    found = nearest_neighbours(clustered(5, seed=1), reference, 2000, None, "ivf")
    assert found.shape == (5, 2000)
    assert (found == -1).any()
    for row in found.tolist():
        real = [i for i in row if i >= 0]
        assert len(set(real)) == len(real)
        assert row[len(real) :] == [-1] * (2000 - len(real))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_needs_a_distance_that_faiss_knows(index: neighbours.Index):
    with pytest.raises(ValueError, match=f"expected Euclid, cosine or dot product for index '{index}', got LpDistance"):
        nearest_neighbours(rows(3, 4, 0), rows(9, 4, 1), 2, LpDistance(p=1), index)
