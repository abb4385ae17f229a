"""exact_search against a full sort of distances written out in numpy in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import (
    BaseDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from torch import Tensor

from pml_fewshot.evaluation import exact_search as module
from pml_fewshot.evaluation.exact_search import exact_search, product
from pml_fewshot.evaluation.ranking import Ranking
from pml_fewshot.evaluation.running_best import largest


def rows(count: int, dims: int, seed: int) -> Tensor:
    """Rows of quite different lengths, so that cosine, dot product and Euclid rank differently."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3 * torch.rand(count, 1, generator=generator)
    return torch.randn(count, dims, generator=generator) * lengths


def unit(values: np.ndarray, p: float = 2) -> np.ndarray:
    return values / (np.abs(values) ** p).sum(axis=-1, keepdims=True) ** (1 / p)


def euclid(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.sqrt(((query - reference) ** 2).sum(axis=1))


def snr(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.var(query - reference, axis=-1, ddof=1) / np.var(query, axis=-1, ddof=1)


# PML distance, and the same as "smaller is nearer" of one query (D,) and all references (M, D)
Far = Callable[[np.ndarray, np.ndarray], np.ndarray]
DISTANCES: dict[str, tuple[Callable[[], BaseDistance | None], Far]] = {
    "none": (lambda: None, euclid),
    "Euclid": (lambda: LpDistance(normalize_embeddings=False), euclid),
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
SYMMETRIC = ("none", "cosine", "dot")  # of these a set among itself computes each pair once


# (side of a tile, groups in a row of it for each neighbour): without the second tiles keep square, so that a set among
# itself takes each pair once; with it they are wide enough to pass groups over
TILES = [(7, 0), (32, 0), (48, 0), (7, 4), (64, 4)]


def set_tiles(patch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    patch.setattr(module, "FEW_QUERIES", 0)  # these and many neighbours go another way
    patch.setattr(module, "MANY_NEIGHBOURS", 10**9)
    patch.setattr(module, "STEP", 1)
    patch.setattr(module, "CPU_TILE", tile[0])
    patch.setattr(module, "GROUPS_PER_NEIGHBOUR", tile[1])


def search(query: Tensor, reference: Tensor, k: int, name: str = "none") -> Tensor:
    return exact_search(query, reference, k, Ranking.of(DISTANCES[name][0]()))


def all_distances(query: Tensor, reference: Tensor, name: str) -> np.ndarray:
    r = reference.double().numpy()
    return np.stack([DISTANCES[name][1](q, r) for q in query.double().numpy()])


def assert_nearest(found: Tensor, distances: np.ndarray, k: int) -> None:
    """Compares by distance, for float32 may swap two references that are all but equally far."""
    assert found.shape == (len(distances), k)
    assert found.dtype == torch.int64
    assert all(len(set(row)) == k for row in found.tolist())
    nearest = np.take_along_axis(distances, found.numpy(), axis=1)
    np.testing.assert_allclose(nearest, np.sort(distances, axis=1)[:, :k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("few", [0, 1000])
def test_neighbours_equal_a_full_sort(name: str, k: int, few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FEW_QUERIES", few)
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    assert_nearest(search(query, reference, k, name), all_distances(query, reference, name), k)


@pytest.mark.parametrize("name", ["none", "cosine", "p=1"])
@pytest.mark.parametrize(("count", "k"), [(300, 129), (300, 300), (2200, 130), (2200, 2200)])
@pytest.mark.parametrize("few", [0, 1000])
def test_many_neighbours_equal_a_full_sort(name: str, count: int, k: int, few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FEW_QUERIES", few)
    query, reference = rows(9, 4, 0), rows(count, 4, 1)
    assert_nearest(search(query, reference, k, name), all_distances(query, reference, name), k)


def test_the_rankings_differ_so_that_the_tests_above_tell_them_apart():
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    chosen = ("none", "normalised", "dot", "dot squared", "p=1", "p=1, normalised", "p=4", "dot, p=1", "SNR")
    found = {search(query, reference, 7, name).numpy().tobytes() for name in chosen}
    assert len(found) == len(chosen)


def test_a_subclass_keeps_its_own_formula():
    class FirstOnly(LpDistance):
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb[:, None, 0] - ref_emb[None, :, 0]).abs()

    query, reference = rows(10, 5, 0), rows(30, 5, 1)
    found = exact_search(query, reference, 4, Ranking.of(FirstOnly(normalize_embeddings=False)))
    expected = (query[:, None, 0] - reference[None, :, 0]).abs().argsort(dim=1)[:, :4]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["none", "cosine", "dot", "p=1"])
@pytest.mark.parametrize("tile", TILES)
def test_many_tiles_and_a_ragged_last_one_equal_a_full_sort(
    name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    query, reference = rows(75, 5, 0), rows(101, 5, 1)
    set_tiles(monkeypatch, tile)
    for k in (1, 7, 101):
        assert_nearest(search(query, reference, k, name), all_distances(query, reference, name), k)


@pytest.mark.parametrize("tile", TILES)
def test_many_neighbours_of_small_tiles(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    query, reference = rows(20, 5, 0), rows(200, 5, 1)
    set_tiles(monkeypatch, tile)
    assert_nearest(search(query, reference, 150), all_distances(query, reference, "none"), 150)


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("tile", [*TILES, (2048, 4)])
def test_a_set_among_itself_equals_a_search_in_its_copy(
    name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    points = rows(101, 5, 2)
    set_tiles(monkeypatch, tile)
    for k in (1, 7, 101):
        found = search(points, points, k, name)
        assert torch.equal(found, search(points, points.clone(), k, name))
        assert_nearest(found, all_distances(points, points, name), k)


def test_a_set_among_itself_computes_each_pair_once(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, int]] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append((len(a), len(b)))
        return product(a, b)

    points = rows(40, 3, 0)
    set_tiles(monkeypatch, (16, 0))  # 3 x 3 tiles
    monkeypatch.setattr(module, "product", counted)
    search(points, points.clone(), 4)
    assert len(calls) == 9
    calls.clear()
    search(points, points, 4)
    assert len(calls) == 6


# Points whose distances of these kinds are exact in float32 in any order of summation, for 2^n of them
SQUARE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def repeated(count: int, seed: int) -> Tensor:
    return SQUARE[torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("name", ["none", "cosine", "dot", "p=1"])
@pytest.mark.parametrize("tile", [*TILES, (2048, 4)])
def test_equally_near_ones_come_in_the_order_of_their_index(
    name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    points = repeated(128, 0)
    expected = all_distances(points, points, name).round(9).argsort(axis=1, kind="stable")
    set_tiles(monkeypatch, tile)
    for k in (1, 5, 40, 128):  # 5 and 40 cut through the copies of a point
        for reference in (points, points.clone()):
            np.testing.assert_array_equal(search(points, reference, k, name).numpy(), expected[:, :k])


@pytest.mark.parametrize("name", ["none", "cosine", "dot", "p=1"])
@pytest.mark.parametrize(("count", "k"), [(256, 130), (4096, 130), (4096, 100)])
def test_equally_near_ones_among_many_neighbours_come_in_order_too(name: str, count: int, k: int):
    points = repeated(count, 1)
    expected = all_distances(SQUARE, points, name).round(9).argsort(axis=1, kind="stable")
    np.testing.assert_array_equal(search(SQUARE, points, k, name).numpy(), expected[:, :k])


@pytest.mark.parametrize("way", ["among itself", "in a copy", "few queries"])
@pytest.mark.parametrize("dims", [64, 128])
def test_copies_of_any_point_come_in_order_in_tiles_of_the_real_size(dims: int, way: str):
    """The products of a point with its copies must not depend on where in which tile they stand."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(50, dims, generator=generator)
    pick = torch.randint(50, (module.CPU_TILE + 5,), generator=generator)
    points = distinct[pick]
    order = all_distances(distinct, distinct, "none").round(9)[:, pick].argsort(axis=1, kind="stable")
    queries = slice(-4, None) if way == "few queries" else slice(None)
    found = search(points[queries], points if way == "among itself" else points.clone(), 20)
    assert (found.numpy() != order[pick, :20][queries]).any(axis=1).sum() == 0


@pytest.mark.parametrize("name", ["none", "cosine", "dot", "normalised"])
@pytest.mark.parametrize("few", [0, 1000])
def test_few_and_many_queries_are_ranked_the_same(name: str, few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FEW_QUERIES", few)
    query, reference, points = rows(30, 5, 0), rows(101, 5, 1), repeated(128, 0)
    expected = all_distances(points, points, name).round(9).argsort(axis=1, kind="stable")
    for count in (1, 2, 19, 30):  # faiss itself goes another way from 20 on
        for k in (1, 7, 100, 101):
            found = search(query[:count], reference, k, name)
            assert_nearest(found, all_distances(query[:count], reference, name), k)
        for k in (1, 5, 40, 127, 128):
            np.testing.assert_array_equal(search(points[:count], points, k, name).numpy(), expected[:count, :k])


@pytest.mark.parametrize("count", [1, 5, 19, 20, 30])
@pytest.mark.parametrize("name", ["none", "p=1"])
def test_any_number_of_queries_far_from_the_origin_is_ranked_right(name: str, count: int):
    query, reference = rows(count, 8, 0) + 1e4, rows(150, 8, 1) + 1e4
    assert_nearest(search(query, reference, 10, name), all_distances(query, reference, name), 10)


@given(
    count=st.integers(1, 90),
    queries=st.integers(1, 40),
    dims=st.integers(1, 3),
    tile=st.sampled_from([*TILES, (3, 0), (16, 1), (33, 2), (2048, 4)]),
    same=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_inner_products_of_small_integers_equal_a_stable_sort(
    count: int, queries: int, dims: int, tile: tuple[int, int], same: bool, share: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(-1, 3, (count, dims), generator=generator).float()
    query = reference if same else torch.randint(-1, 3, (queries, dims), generator=generator).float()
    k = max(1, round(share * count))
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, tile)
        found = search(query, reference, k, "dot")
    expected = (-(query.numpy() @ reference.numpy().T)).argsort(axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", ["none", "cosine", "p=1"])
def test_embeddings_of_any_float_type_and_layout_with_gradients_are_searched(name: str):
    query, reference = rows(10, 6, 0), rows(40, 6, 1)
    expected = search(query, reference, 5, name)
    assert torch.equal(search(query.double(), reference.double(), 5, name), expected)
    assert torch.equal(search(query.T.contiguous().T, reference.repeat(2, 1)[:40], 5, name), expected)
    wide = torch.stack([reference, rows(40, 6, 3)], dim=2)
    assert torch.equal(search(query, wide[..., 0], 5, name), expected)
    assert torch.equal(search(query.clone().requires_grad_(), reference, 5, name), expected)
    half, half_reference = query.half(), reference.half()
    expected = search(half.float(), half_reference.float(), 5, name)
    assert torch.equal(search(half, half_reference, 5, name), expected)
    assert torch.equal(
        search(half_reference, half_reference, 5, name), search(half_reference, reference.half(), 5, name)
    )


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_mapped_embeddings_are_searched(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points = rows(70, 6, 0).numpy().astype(dtype)
    np.save(tmp_path / "rows.npy", points)
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
    set_tiles(monkeypatch, (16, 0))
    expected = search(torch.from_numpy(points), torch.from_numpy(points.copy()), 5, name)
    for query, reference in ((mapped, mapped), (mapped, mapped.clone()), (mapped.clone(), mapped)):
        assert torch.equal(search(query, reference, 5, name), expected)


@pytest.mark.parametrize("name", ["none", "p=1"])
def test_embeddings_far_from_the_origin_are_ranked_right(name: str, monkeypatch: pytest.MonkeyPatch):
    query, reference = rows(30, 8, 0) + 1e4, rows(150, 8, 1) + 1e4
    set_tiles(monkeypatch, (64, 0))
    assert_nearest(search(query, reference, 10, name), all_distances(query, reference, name), 10)
    assert_nearest(search(reference, reference, 10, name), all_distances(reference, reference, name), 10)


@pytest.mark.parametrize("few", [0, 1000])
def test_one_item_far_off_does_not_spoil_the_order_of_the_others(few: int, monkeypatch: pytest.MonkeyPatch):
    """Euclid alone: distances among the others are exact to float32, wherever that one lies."""
    monkeypatch.setattr(module, "FEW_QUERIES", few)
    query, reference = rows(19, 8, 0), rows(200, 8, 1)
    reference[5] = 1e7
    assert_nearest(search(query, reference, 3), all_distances(query, reference, "none"), 3)


def test_a_distance_that_is_not_a_number_is_refused():
    query, reference = rows(6, 4, 0), rows(9, 4, 1)
    query[2] = 1.0  # a signal without variance: SNR divides by 0
    reference[3] = 1.0
    with pytest.raises(
        ValueError, match=r"^expected finite distances by SNRDistance\(.*in 1 of 6 rows, first in row 2"
    ):
        search(query, reference, 3, "SNR")


@pytest.mark.parametrize("name", ["none", "dot"])
@pytest.mark.parametrize("which", ["query", "reference", "both"])
@pytest.mark.parametrize("k", [3, 150])
@pytest.mark.parametrize("few", [0, 1000])
def test_embeddings_whose_squared_length_overflows_are_refused(
    name: str, which: str, k: int, few: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "FEW_QUERIES", few)
    query, reference = rows(10, 4, 0), rows(160, 4, 1)
    if which == "query":
        query[4] = 1e25
    else:
        reference[4] = 1e25
    with pytest.raises(ValueError, match=r"^expected finite lengths of the embeddings in float32, got "):
        search(reference if which == "both" else query, reference, k, name)


def test_cosine_of_embeddings_whose_length_overflows_is_right_or_refused():
    query, reference = rows(10, 4, 0), rows(40, 4, 1)
    try:
        found = search(query * 1e25, reference * 1e25, 3, "cosine")
    except ValueError:
        return
    assert_nearest(found, all_distances(query, reference, "cosine"), 3)


def test_no_queries_have_no_neighbours():
    assert search(torch.empty(0, 4), rows(9, 4, 0), 3).shape == (0, 3)


@pytest.mark.parametrize("shapes", [(1, 1, 1), (5, 7, 3), (33, 2, 64), (70, 100, 1), (100, 17, 130)])
def test_the_product_is_that_of_matrices(shapes: tuple[int, int, int]):
    n, m, dims = shapes
    a, b = rows(n, dims, 0), rows(m, dims, 1)
    expected = a.double().numpy() @ b.double().numpy().T
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T), (a.repeat(1, 2)[:, :dims], b)):
        found = product(left, right)
        assert found.shape == (n, m)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@given(
    rows_=st.integers(1, 8),
    columns=st.integers(1, 80),
    share=st.floats(0, 1),
    levels=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_the_largest_equal_a_stable_sort(rows_: int, columns: int, share: float, levels: int, seed: int):
    values = torch.randint(levels, (rows_, columns), generator=torch.Generator().manual_seed(seed)).float()
    k = max(1, round(share * columns))
    expected = (-values.numpy()).argsort(axis=1, kind="stable")[:, :k]
    found, column = largest(values, k)
    np.testing.assert_array_equal(column.numpy(), expected)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(values.numpy(), expected, axis=1))


@pytest.mark.parametrize(
    ("distance", "kind", "normalize", "text"),
    [
        (None, "Euclid", False, "Euclid"),
        (LpDistance(), "Euclid", True, "LpDistance(p=2, power=1, normalized)"),
        (LpDistance(normalize_embeddings=False, power=2), "Euclid", False, "LpDistance(p=2, power=2)"),
        (LpDistance(power=-1), "distance", False, "LpDistance(p=2, power=-1, normalized)"),
        (LpDistance(p=3), "distance", False, "LpDistance(p=3, power=1, normalized)"),
        (CosineSimilarity(), "inner product", True, "CosineSimilarity(p=2, power=1, normalized)"),
        (
            DotProductSimilarity(normalize_embeddings=False),
            "inner product",
            False,
            "DotProductSimilarity(p=2, power=1)",
        ),
        (DotProductSimilarity(power=2), "distance", False, "DotProductSimilarity(p=2, power=2, normalized)"),
        (SNRDistance(), "distance", False, "SNRDistance(p=2, power=1, normalized)"),
    ],
)
def test_a_ranking_is_the_simplest_with_the_order_of_the_distance(
    distance: BaseDistance | None, kind: str, normalize: bool, text: str
):
    ranking = Ranking.of(distance)
    assert (ranking.kind, ranking.normalize, str(ranking)) == (kind, normalize, text)
