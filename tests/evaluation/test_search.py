"""exact_search against a full sort of distances written out in numpy in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation import search as module
from pml_fewshot.evaluation.search import Ranking, exact_neighbors, exact_search, product
from tests.evaluation.formulas import DISTANCES, RawDot, RawLp, all_distances


def rows(count: int, dims: int, seed: int) -> Tensor:
    """Rows of quite different lengths, so that cosine, dot product and Euclid rank differently."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3 * torch.rand(count, 1, generator=generator)
    return torch.randn(count, dims, generator=generator) * lengths


way = pytest.mark.parametrize("way", ["tiles", "faiss"])


def go(patch: pytest.MonkeyPatch, way: str, **constants: int) -> None:
    """Makes all searches that can take one way, with other constants of the module."""
    for name, value in {"FEW_QUERIES": 0 if way == "tiles" else 10**9, **constants}.items():
        patch.setattr(module, name, value)


def search(query: Tensor, reference: Tensor | None, k: int, name: str = "none") -> Tensor:
    return exact_search(query, reference, k, Ranking.of(DISTANCES[name][0]))


def assert_nearest(found: Tensor, distances: np.ndarray, k: int) -> None:
    """Compares by distance, for float32 may swap two references that are all but equally far."""
    assert (found.shape, found.dtype) == ((len(distances), k), torch.int64)
    assert all(len(set(row)) == k for row in found.tolist())
    nearest = np.take_along_axis(distances, found.numpy(), axis=1)
    np.testing.assert_allclose(nearest, np.sort(distances, axis=1)[:, :k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@way
def test_neighbors_equal_a_full_sort(name: str, way: str, monkeypatch: pytest.MonkeyPatch):
    go(monkeypatch, way)
    query, reference = rows(25, 5, 0), rows(60, 5, 1)
    for k in (1, 7, 60):
        assert_nearest(search(query, reference, k, name), all_distances(query, reference, name), k)


def test_a_subclass_keeps_its_own_formula():
    class FirstOnly(LpDistance):
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb[:, None, 0] - ref_emb[None, :, 0]).abs()

    query, reference = rows(10, 5, 0), rows(30, 5, 1)
    found = exact_search(query, reference, 4, Ranking.of(FirstOnly(normalize_embeddings=False)))
    assert torch.equal(found, (query[:, None, 0] - reference[None, :, 0]).abs().argsort(dim=1)[:, :4])


def test_a_set_among_itself_computes_each_pair_once(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, int]] = []
    points = rows(40, 3, 0)
    go(monkeypatch, "tiles", STEP=2, GROUP=2, CPU_TILE=16)  # 3 x 3 tiles
    monkeypatch.setattr(module, "product", lambda a, b: calls.append((len(a), len(b))) or product(a, b))
    search(points, points, 2)
    assert calls == [(14, 14)] * 9
    calls.clear()
    assert_nearest(search(points, None, 2), all_distances(points, points), 2)
    assert len(calls) == 6


@given(
    name=st.sampled_from(["none", "dot", "p=1"]),
    count=st.integers(1, 90),
    queries=st.integers(0, 40),  # 0: the references among themselves
    dims=st.integers(1, 3),
    side=st.sampled_from([4, 8, 16, 30, 2048]),
    faiss_block=st.sampled_from([0, 7, 30, 2048]),  # 0: by tiles
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_small_integers_are_ranked_as_by_a_stable_sort_in_tiles_and_blocks_of_any_size(
    name: str, count: int, queries: int, dims: int, side: int, faiss_block: int, share: float, seed: int
):
    """Their distances are exact in float32, so that equally near ones must come in the order of their index."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(-1, 3, (count, dims), generator=generator).float()
    query = torch.randint(-1, 3, (queries, dims), generator=generator).float() if queries else reference
    k = max(1, round(share**3 * count))
    with pytest.MonkeyPatch.context() as patch:
        go(patch, "faiss" if faiss_block else "tiles", STEP=2, GROUP=2, CPU_TILE=side, FAISS_BLOCK=faiss_block)
        found = search(query, reference if queries else None, k, name)
    expected = all_distances(query, reference, name).argsort(axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("among", [True, False])
def test_threads_that_take_tiles_in_any_order_find_the_same(among: bool, monkeypatch: pytest.MonkeyPatch):
    go(monkeypatch, "tiles", STEP=2, GROUP=2, CPU_TILE=16)
    points = torch.randint(-1, 3, (200, 3), generator=torch.Generator().manual_seed(0)).float()  # many equally near
    expected = all_distances(points, points).argsort(axis=1, kind="stable")[:, :5]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(10):
            found = search(points, None if among else points, 5)
            np.testing.assert_array_equal(found.numpy(), expected)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_rows_of_16_bits_are_converted_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch):
    converted: list[int] = []
    prepare = Ranking.prepare
    monkeypatch.setattr(
        Ranking, "prepare", lambda self, rows, *c: converted.append(len(rows)) or prepare(self, rows, *c)
    )
    go(monkeypatch, "tiles", CPU_TILE=128)
    points = rows(2000, 4, 0).bfloat16()
    assert torch.equal(search(points, None, 3), search(points.float(), None, 3))
    assert max(converted) <= 1000  # the sample for the center; blocks are of 128


@pytest.mark.parametrize("name", ["none", "dot", "cosine"])
@pytest.mark.parametrize("room", [1, 100, 10**6])
def test_neighbors_come_with_the_values_of_their_pairs(name: str, room: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PAIR_NUMBERS", room)
    query, reference, ranking = rows(40, 5, 0), rows(90, 5, 1), Ranking.of(DISTANCES[name][0])
    index, values = exact_neighbors(ranking.prepare(query), ranking.prepare(reference), 7, ranking)
    assert torch.equal(index, search(query, reference, 7, name))
    sign = 1 if name == "none" else -1
    expected = sign * np.sort(all_distances(query, reference, name), axis=1)[:, :7]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "dot"])
@pytest.mark.parametrize("among", ["itself", "a copy", 2, 25])
def test_copies_of_any_point_come_in_order_in_tiles_of_the_real_size(among: str | int, name: str):
    """The products of a point with its copies must not depend on where in which tile they are."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(50, 128, generator=generator)
    pick = torch.randint(50, (module.CPU_TILE + 5,), generator=generator)
    points = distinct[pick]
    order = all_distances(distinct, distinct, name).round(9)[:, pick].argsort(axis=1, kind="stable")
    queries = slice(-among, None) if isinstance(among, int) else slice(None)
    for k in (20, 300):
        found = search(points[queries], None if among == "itself" else points.clone(), k, name)
        np.testing.assert_array_equal(found.numpy(), order[pick, :k][queries])


@pytest.mark.parametrize(("numpy_errs", "torch_errs"), [(0, 0), (1, 0), (1, 1)])
def test_the_first_product_that_treats_copies_alike_is_taken(
    numpy_errs: int, torch_errs: int, monkeypatch: pytest.MonkeyPatch
):
    def product_that(errs: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: module._rounded(a, b) * torch.where(torch.arange(len(b)) < 12, 1, 1 + errs * 2**-22)

    by_numpy, by_torch = product_that(numpy_errs), product_that(torch_errs)
    monkeypatch.setattr(module, "_by_numpy", by_numpy)
    monkeypatch.setattr(module, "_by_torch", by_torch)
    expected = module._rounded if torch_errs else by_torch if numpy_errs else by_numpy
    assert module._cpu_product.__wrapped__() is expected


@pytest.mark.parametrize("multiply", [module._by_numpy, module._by_torch, module._rounded])
def test_products_are_those_of_float64(multiply: Callable[[Tensor, Tensor], Tensor]):
    a, b = rows(5, 7, 0), rows(6, 7, 1)
    expected = a.numpy().astype(float) @ b.numpy().astype(float).T
    np.testing.assert_allclose(multiply(a, b).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert multiply(a, b).dtype == torch.float32


@pytest.mark.parametrize("count", [1, 5, 19, 20, 40])
@pytest.mark.parametrize("name", ["none", "p=1"])
def test_embeddings_far_from_the_origin_are_ranked_right(name: str, count: int):
    query, reference = rows(count, 8, 0) + 1e4, rows(150, 8, 1) + 1e4
    for k in (10, 100):
        assert_nearest(search(query, reference, k, name), all_distances(query, reference, name), k)
    assert_nearest(search(query, None, 1, name), all_distances(query, query, name), 1)


@way
def test_one_item_far_off_does_not_spoil_the_order_of_the_others(way: str, monkeypatch: pytest.MonkeyPatch):
    go(monkeypatch, way)
    query, reference = rows(19, 8, 0), rows(200, 8, 1)
    reference[5] = 1e7
    assert_nearest(search(query, reference, 3), all_distances(query, reference), 3)


@pytest.mark.parametrize("name", ["none", "cosine", "p=1"])
def test_embeddings_of_any_float_type_and_layout_are_searched(name: str, tmp_path: Path):
    query, reference = rows(40, 6, 0), rows(90, 6, 1)
    expected = search(query, reference, 5, name)
    assert torch.equal(search(query.double(), reference.double(), 5, name), expected)
    assert torch.equal(search(query.T.contiguous().T.requires_grad_(), reference, 5, name), expected)
    wide = torch.stack([reference, rows(90, 6, 3)], dim=2)
    assert torch.equal(search(query, wide[..., 0], 5, name), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(search(query, reference, 5, name), expected)
    half = reference.half()
    assert torch.equal(search(half, None, 5, name), search(half.float(), None, 5, name))
    np.save(tmp_path / "rows.npy", reference.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
    assert torch.equal(search(query, mapped, 5, name), expected)
    assert torch.equal(search(mapped, None, 5, name), search(reference, None, 5, name))


def test_a_distance_that_is_not_a_number_is_refused():
    query, reference = rows(6, 4, 0), rows(9, 4, 1)
    query[2] = 1.0  # a signal without variance: SNR divides by 0
    reference[3] = 1.0
    with pytest.raises(UsageError, match=r"^expected finite distances by SNRDistance\(.*, got NaN.*, first in row 2"):
        search(query, reference, 3, "SNR")


@pytest.mark.parametrize("name", ["none", "dot", "cosine"])
@pytest.mark.parametrize("which", [0, 1])
@way
def test_squared_lengths_that_overflow_are_refused(name: str, which: int, way: str, monkeypatch: pytest.MonkeyPatch):
    go(monkeypatch, way)
    sets = rows(10, 4, 0), rows(160, 4, 1)
    sets[which][4] = 1e25
    with pytest.raises(UsageError, match=r"^expected finite lengths of the embeddings in float32, got "):
        search(*sets, 3, name)


def test_no_queries_have_no_neighbors():
    for name in ("none", "p=1"):
        assert search(torch.empty(0, 4), rows(9, 4, 0), 3, name).shape == (0, 3)


def test_a_ranking_is_the_simplest_with_the_order_of_the_distance():
    for distance, kind, normalize, text in (
        (None, "euclidean", False, "euclidean"),
        (LpDistance(), "euclidean", True, "LpDistance(p=2, power=1, normalized)"),
        (RawLp(power=2), "euclidean", False, "LpDistance(p=2, power=2)"),
        (LpDistance(power=-1), "distance", False, "LpDistance(p=2, power=-1, normalized)"),
        (LpDistance(p=3), "distance", False, "LpDistance(p=3, power=1, normalized)"),
        (CosineSimilarity(), "inner product", True, "CosineSimilarity(p=2, power=1, normalized)"),
        (RawDot(), "inner product", False, "DotProductSimilarity(p=2, power=1)"),
        (DotProductSimilarity(power=2), "distance", False, "DotProductSimilarity(p=2, power=2, normalized)"),
        (SNRDistance(), "distance", False, "SNRDistance(p=2, power=1, normalized)"),
    ):
        ranking = Ranking.of(distance)
        assert (ranking.kind, ranking.normalize, str(ranking)) == (kind, normalize, text)


def test_a_distance_that_computes_in_float64_finds_the_same() -> None:
    class Exact(LpDistance):
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return super().compute_mat(query_emb.double(), ref_emb.double())

    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    found = exact_search(rows, None, 5, Ranking.of(Exact(normalize_embeddings=False)))
    assert torch.equal(found, torch.cdist(rows.double(), rows.double()).sort(dim=1).indices[:, :5])
