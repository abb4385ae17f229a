"""Gallery: what its indexes find against a full sort in numpy, what it keeps in files, and what it refuses."""

import json
import os
import re
import resource
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance, SNRDistance
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError, UsageTypeError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation import gallery as module
from pml_fewshot.evaluation.gallery import Gallery, recipe, training_sample
from pml_fewshot.evaluation.neighbors import Neighbors
from pml_fewshot.io.atomic import CannotWriteError
from tests.evaluation.formulas import DISTANCES, RawDot, RawLp, all_distances

# index, parameters that make it search everything, distance
EXHAUSTIVE = [
    ("flat", "", "none"),
    *(("ivf", "nprobe=1000", name) for name in ("none", "normalized", "cosine", "dot")),
    ("ivfpq", "nprobe=1000,k_factor_rf=1000", "none"),
    ("hnsw", "efSearch=4000", "none"),
    ("IVF16,Flat", "nprobe=16", "none"),
]


def clustered(count: int, seed: int = 0, dims: int = 8) -> EmbeddingBank:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(30, dims, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(30, (count,), generator=generator)
    rows = centers[labels] + torch.randn(count, dims, generator=generator)
    return EmbeddingBank(rows * (0.5 + torch.rand(count, 1, generator=generator)), labels)


QUERY = clustered(20, seed=1).embeddings


def share_found(found: torch.Tensor, distances: np.ndarray) -> float:
    """Share of those found that are as near as the k-th nearest in truth."""
    kth = np.sort(distances, axis=1)[:, found.shape[1] - 1 : found.shape[1]]
    near = np.take_along_axis(distances, found.numpy(), axis=1) <= kth + 1e-5
    return float((near & (found.numpy() >= 0)).mean())


@pytest.mark.parametrize(("index", "parameters", "name"), EXHAUSTIVE)
def test_an_index_that_searches_everything_finds_the_nearest(index: str, parameters: str, name: str):
    bank = clustered(800)
    found = Gallery(bank, index, parameters, DISTANCES[name][0]).search(QUERY, 10).indices
    distances = all_distances(QUERY, bank.embeddings, name)
    assert (found.shape, found.dtype) == ((20, 10), torch.int64)
    assert all(len(set(row)) == 10 for row in found.tolist())
    # a graph's links need not lead to every item
    assert share_found(found, distances) > (0.95 if index == "hnsw" else 0.9999)
    assert (np.diff(np.take_along_axis(distances, found.numpy(), axis=1), axis=1) >= -1e-5).all()  # nearest first


def by_pml(query: torch.Tensor, reference: torch.Tensor, distance: BaseDistance | None) -> np.ndarray:
    """(N, M) values of a PML distance, in float64, for its products cancel."""
    return (distance or RawLp())(query.double(), reference.double()).numpy()


UNITS = {
    "none": None,
    "normalized": LpDistance(),
    "squared": RawLp(power=2),
    "normalized, power 3": LpDistance(power=3),
    "cosine": CosineSimilarity(),
    "dot": RawDot(),
    "p=1": RawLp(p=1),
    "dot squared": RawDot(power=2),
    "inverse": LpDistance(power=-1),
    "SNR": SNRDistance(normalize_embeddings=False),
}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("index", ["flat", "Flat"])
def test_a_flat_gallery_is_a_loop_over_pmls_distance(name: str, index: str):
    distance, bank = UNITS[name], clustered(90)
    query = clustered(40, seed=1).embeddings
    gallery = Gallery(bank, index, distance=distance)
    expected = by_pml(query, bank.embeddings, distance)
    larger_is_nearer = distance is not None and distance.is_inverted
    order = (-expected if larger_is_nearer else expected).argsort(axis=1, kind="stable")
    for k in (1, 10, 90):
        for queries in (query, query[:3]):  # by tiles and by faiss
            found = gallery.search(queries, k)
            np.testing.assert_array_equal(found.indices.numpy(), order[: len(queries), :k])
            values = np.take_along_axis(expected, order, axis=1)[: len(queries), :k]
            np.testing.assert_allclose(found.distances.numpy(), values, rtol=2e-5, atol=2e-6)
            assert torch.equal(found.labels, bank.labels[found.indices])
            assert torch.equal(gallery.rank(queries, k), found.indices)
            assert found.distances.dtype == torch.float32


@given(
    count=st.integers(1, 60),
    queries=st.integers(1, 50),
    share=st.floats(0, 1),
    name=st.sampled_from(["squared", "dot", "p=1"]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_equally_near_references_stand_in_the_order_of_their_index(
    count: int, queries: int, share: float, name: str, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(-1, 3, (count, 3), generator=generator).float()
    query, k = torch.randint(-1, 3, (queries, 3), generator=generator).float(), max(1, round(share * count))
    found = Gallery(EmbeddingBank(reference, torch.arange(count)), "flat", distance=UNITS[name]).search(query, k)
    formula = {"squared": "power 0.5"}.get(name, name)  # which it writes as the square
    expected = all_distances(query, reference, formula)
    order = expected.argsort(axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.indices.numpy(), order)
    values = np.take_along_axis(expected, order, axis=1) * (-1 if name == "dot" else 1)
    np.testing.assert_allclose(found.distances.numpy(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", [3, 40])
def test_the_order_is_that_of_the_distances_that_are_given(queries: int):
    """v and -v are equally far from 0, which products of rows less a center only nearly tell."""
    rows = clustered(60).embeddings
    reference = torch.cat([rows, -rows])[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    found = Gallery(EmbeddingBank(reference, torch.arange(120)), "flat").search(torch.zeros(queries, 8), 120)
    order = reference.double().norm(dim=1).argsort(stable=True)
    assert torch.equal(found.indices, order.expand(queries, 120))
    assert (found.distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_distances_far_from_the_origin_do_not_cancel(count: int, index: str):
    bank, query = clustered(200), clustered(count, seed=1).embeddings + 1e4
    far = EmbeddingBank(bank.embeddings + 1e4, bank.labels)
    found = Gallery(far, index, "nprobe=9" if index == "ivf" else "").search(query, 5)
    expected = np.sort(all_distances(query, far.embeddings), axis=1)[:, :5]
    np.testing.assert_allclose(found.distances.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["none", "normalized", "squared", "cosine", "dot"])
@pytest.mark.parametrize(
    ("index", "parameters"), [("ivf", "nprobe=2"), ("ivfpq", "nprobe=2,k_factor_rf=2"), ("hnsw", ""), ("SQ8", "")]
)
def test_distances_of_other_indexes_are_those_of_the_floats_or_nearly(name: str, index: str, parameters: str):
    distance, bank = UNITS[name], clustered(700)
    found = Gallery(bank, index, parameters, distance).search(QUERY[:8], 150)
    there = (found.indices >= 0).numpy()
    assert there.any(axis=1).all()
    assert there.all() == (index in ("hnsw", "SQ8"))
    assert (found.distances.isnan().numpy() == ~there).all()
    pairs = bank.embeddings[found.indices.clamp(min=0)]
    expected = np.stack([by_pml(q[None], r, distance)[0] for q, r in zip(QUERY[:8], pairs, strict=True)])
    tolerance = 0.1 if index == "SQ8" else 1e-4
    np.testing.assert_allclose(found.distances.numpy()[there], expected[there], rtol=tolerance, atol=tolerance)


def test_queries_may_be_any_rows_of_numbers():
    for index in ("flat", "ivf"):
        gallery = Gallery(clustered(300), index)
        expected = gallery.search(QUERY, 4)
        read_only = QUERY.numpy().copy()
        read_only.flags.writeable = False
        for query in (
            QUERY.double(),
            QUERY.numpy(),
            read_only,
            QUERY.numpy().astype(">f8"),
            QUERY.tolist(),
            list(QUERY),
        ):
            found = gallery.search(query, 4)
            assert torch.equal(found.indices, expected.indices)
            assert torch.equal(found.distances, expected.distances)
            assert torch.equal(gallery.rank(query, 4), found.indices)
        half = gallery.search(QUERY.half(), 4)
        assert torch.equal(half.distances, gallery.search(QUERY.half().float().numpy(), 4).distances)
        assert torch.equal(
            gallery.search([[1, 0, 2, 0, 0, 0, 0, 3]], 4).indices,
            gallery.search(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]), 4).indices,
        )
        for wrong in ("nonsense", [["a"] * 8], [[1.0], [1.0, 2.0]], clustered(9)):
            with pytest.raises(
                UsageTypeError, match=r"^expected queries as rows of numbers, got \w+ \(.*; give embeddings"
            ):
                gallery.search(wrong, 4)
        for single in (QUERY[0], QUERY[0].tolist()):
            with pytest.raises(UsageError, match=r"of shape \(N, 8\), got \(8,\); add an axis: queries\[None\]"):
                gallery.search(single, 4)


def scattered(gallery: Gallery, query: torch.Tensor) -> np.ndarray:
    """(N, M) distances of all references, by their index, found by a search for all of them."""
    found = gallery.search(query, len(gallery))
    assert (found.indices.sort(dim=1).values == torch.arange(len(gallery))).all()
    assert torch.equal(found.labels, gallery.labels[found.indices])
    return torch.empty_like(found.distances).scatter_(1, found.indices, found.distances).numpy()


REMOVABLE = [
    ("flat", ""),
    ("ivf", "nprobe=99"),
    ("ivfpq", "nprobe=99,k_factor_rf=1"),
    ("IVF9,SQ8", "nprobe=9"),
    ("IVF9,PQ1x4", "nprobe=9"),
    ("IVF9,PQ4x4fs", "nprobe=9"),
    ("IVF9_HNSW8,Flat", "nprobe=9"),
    ("PCA4,IVF9,Flat", "nprobe=9"),
    ("PCA4,IVF9,PQ2x4fsr,RFlat", "nprobe=9"),
    ("SQ8", ""),
    ("PQ1x4", ""),
    ("PQ4x4fs", ""),
    ("PCA4,SQ8,RFlat", ""),
]


@pytest.mark.parametrize(("index", "parameters"), REMOVABLE)
def test_references_are_removed_and_added_in_any_order(index: str, parameters: str, tmp_path: Path):
    bank = clustered(900)

    def part(first: int, last: int) -> EmbeddingBank:
        return EmbeddingBank(bank.embeddings[first:last], torch.arange(first, last))

    gallery = Gallery(part(0, 700), index, parameters)
    gallery.add(part(700, 750))
    gallery.save(tmp_path / "before")
    whole = Gallery.load(tmp_path / "before")
    whole.add(part(750, 900))
    expected = scattered(whole, QUERY)
    kept, generator = np.arange(750), np.random.default_rng(0)
    for step, (first, last) in enumerate(((750, 750), (750, 800), (800, 900))):
        if last > first:
            gallery.add(part(first, last))
        kept = np.append(kept, np.arange(first, last))
        ids = generator.permutation(np.union1d(generator.choice(len(kept), 60, replace=False), [0, len(kept) - 2]))
        gallery.remove(ids)
        kept = np.delete(kept, ids)
        np.testing.assert_allclose(scattered(gallery, QUERY), expected[:, kept], rtol=1e-5, atol=1e-5)
        assert gallery.labels.tolist() == kept.tolist()
        assert len(gallery) == gallery.faiss_index.ntotal == len(kept)
        gallery.save(tmp_path / str(step))
        again = Gallery.load(tmp_path / str(step))
        np.testing.assert_array_equal(scattered(again, QUERY), scattered(gallery, QUERY))
        gallery = again if step == 1 else gallery


def test_ids_to_remove_may_be_of_any_container():
    for ids in (
        5,
        [5, 2],
        (2, 5),
        np.array([5, 2], dtype=np.uint8),
        torch.tensor([2, 5]),
        range(2, 6, 3),
        [],
        np.int64(5),
    ):
        gallery = Gallery(clustered(20), "flat")
        gallery.remove(ids)
        removed = {ids} if np.ndim(ids) == 0 else set(np.asarray(ids).tolist())
        kept = [i for i in range(20) if i not in removed]
        assert torch.equal(gallery.labels, clustered(20).labels[kept])
        assert torch.equal(gallery.search(clustered(20).embeddings[kept], 1).indices[:, 0], torch.arange(len(kept)))
    gallery.remove(range(len(gallery)))
    assert len(gallery) == 0
    gallery.add(clustered(3))
    assert gallery.search(clustered(3).embeddings, 1).indices.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("index", ["hnsw", "HNSW8,SQ8", "NSG8", "IVF3,FlatDedup", "HNSW8,RFlat", "Flat,Refine(HNSW8)"])
def test_indexes_that_cannot_be_removed_from_stay_as_they_are(index: str):
    bank = clustered(200)
    gallery = Gallery(bank, index)
    before = gallery.search(QUERY, 9)
    with pytest.raises(
        UsageError, match=r"^expected an index that references can be removed from, got .*; build it again"
    ):
        gallery.remove([3, 5])
    after = gallery.search(QUERY, 9)
    assert torch.equal(after.indices, before.indices)
    assert torch.equal(after.distances.nan_to_num(), before.distances.nan_to_num())
    assert len(gallery) == gallery.faiss_index.ntotal == len(bank)


def test_ids_that_are_not_there_are_named():
    gallery = Gallery(clustered(20), "ivf")
    for ids, says in (
        ([3, 20, -1, 99], r"different indices from 0 to 19, got 3 unknown, \[-1, 20, 99\] first; leave them out"),
        ([3, 4, 3, 4, 4], r"different indices from 0 to 19, got 2 repeated, \[3, 4\] first"),
        (np.array([2**64 - 1], dtype=np.uint64), "different indices from 0 to 19, got 1 unknown"),
        ([0.5], "ids as integers of one axis, got list of float64"),
        (torch.zeros(20, dtype=torch.bool), "ids as integers of one axis, got Tensor of bool"),
        ([[1, 2]], r"ids as integers of one axis, got list of int64 and shape \(1, 2\)"),
        ("3", "ids as integers of one axis, got str"),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            gallery.remove(ids)
        assert len(gallery) == gallery.faiss_index.ntotal == 20


def loop_vote(labels: list[int], indices: list[int]) -> tuple[int, float]:
    voters = [label for label, index in zip(labels, indices, strict=True) if index >= 0]
    if not voters:
        return -1, 0.0
    most = max(voters.count(label) for label in voters)
    return next(label for label in voters if voters.count(label) == most), most / len(voters)


@given(
    k=st.integers(1, 9),
    used=st.integers(1, 9),
    classes=st.integers(1, 4),
    missing=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_vote_equals_a_loop(k: int, used: int, classes: int, missing: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (12, k), generator=generator)
    indices = torch.where(torch.rand(12, k, generator=generator) < missing**2, -1, 7)
    labels = labels.masked_fill(indices < 0, 0)
    names = ("ant", "bee", "cat", "dog")
    used = min(used, k)
    votes = Neighbors(indices, labels.float(), labels, names).vote(used)
    expected = [loop_vote(row[:used], at[:used]) for row, at in zip(labels.tolist(), indices.tolist(), strict=True)]
    assert votes.labels.tolist() == [label for label, _ in expected]
    assert votes.shares.tolist() == pytest.approx([share for _, share in expected])
    assert votes.names == [None if label < 0 else names[label] for label, _ in expected]


def test_a_vote_without_ties_equals_scikit_learn():
    bank, query = clustered(600), clustered(200, seed=1).embeddings
    found = Gallery(bank, "flat").search(query, 9)
    for k in (1, 4, 9, None):
        votes = found.vote(k)
        model = KNeighborsClassifier(k or 9).fit(bank.embeddings.numpy(), bank.labels.numpy())
        shares = np.sort(model.predict_proba(query.numpy()), axis=1)
        clear = shares[:, -1] > shares[:, -2]
        assert clear.sum() > 100
        np.testing.assert_array_equal(votes.labels.numpy()[clear], model.predict(query.numpy())[clear])
        np.testing.assert_allclose(votes.shares.numpy(), shares[:, -1], rtol=1e-6)
    assert votes.names == votes.labels.tolist()  # a gallery without names
    for k, says in ((0, "k to be an integer of at least 1"), (10, "k of at most 9, the neighbors found, got 10")):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            found.vote(k)


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
@pytest.mark.parametrize("name", ["none", "cosine"])
def test_the_chosen_parameters_find_nearly_all_on_clustered_data(index: str, name: str):
    bank, query = clustered(3000, dims=16), clustered(100, seed=1, dims=16).embeddings
    found = Gallery(bank, index, "", DISTANCES[name][0]).search(query, 10).indices
    assert share_found(found, all_distances(query, bank.embeddings, name)) > 0.95


def test_the_callers_parameters_override_those_of_the_recipe():
    gallery = Gallery(clustered(400), "ivf", "nprobe=3")
    assert gallery.faiss_index.nprobe == 3
    assert str(gallery) == "IVF10,Flat nprobe=3"
    graph = Gallery(clustered(400), "hnsw", "efConstruction=37").faiss_index.hnsw
    assert (graph.efConstruction, graph.efSearch) == (37, 128)
    refined = Gallery(clustered(700), "ivfpq", "nprobe=2,k_factor_rf=3").faiss_index
    assert refined.k_factor == 3
    assert faiss.downcast_index(refined.base_index).nprobe == 2


def test_what_faiss_cannot_build_and_other_wrong_arguments_are_refused():
    # 8 dimensions are no multiple of 5, and there are only 100 references
    wrong = [("IVF", ""), ("IVF4,PQ5", ""), ("IVF500,Flat", ""), ("ivf", "nprob=3"), ("ivf", "nprobe=many")]
    for index, parameters in (*wrong, ("Flat", "efSearch=3")):
        says = f"expected an index and parameters that faiss can build, got {index!r} with {parameters!r} for 100 "
        with pytest.raises(UsageError, match=rf"^{re.escape(says)}.*\Z"):  # in one line
            Gallery(clustered(100), index, parameters)
    empty = EmbeddingBank(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    gallery = Gallery(clustered(100), "flat")
    for action, says in (
        (lambda: Gallery(clustered(100), "hnws"), r"index as one of .*, got 'hnws'; did you mean 'hnsw'"),
        (lambda: Gallery(QUERY, "flat"), r"an EmbeddingBank, got Tensor; make one"),
        (lambda: gallery.add(QUERY), r"an EmbeddingBank, got Tensor"),
        (lambda: Gallery(empty), r"at least one reference, got none"),
        (
            lambda: Gallery(clustered(9), "ivf", "", LpDistance(p=1)),
            r"Euclidean distance, cosine or dot product for index 'ivf', ",
        ),
        (
            lambda: Gallery(clustered(9), "hnsw", "", LpDistance(power=-1)),
            r"Euclidean distance, cosine or dot product for index ",
        ),
        (lambda: gallery.add(clustered(5, dims=3)), r"references of shape \(N, 8\), got \(5, 3\); use one embedder"),
        (lambda: gallery.search(torch.zeros(2, 3), 1), r"queries of shape \(N, 8\), got \(2, 3\); use one embedder"),
        (lambda: gallery.search(QUERY, 0), r"k to be an integer of at least 1"),
        (lambda: gallery.search(QUERY, 101), r"k of at most 100, the gallery's size, got 101"),
        (lambda: gallery.search(QUERY / 0, 1), r"finite queries, got NaN or infinity in 20 of 20 rows"),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            action()
    assert len(gallery) == gallery.faiss_index.ntotal == 100


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "Flat"])  # a graph depends on the order of its links
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_maps_are_added_in_blocks(index: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bank = clustered(700)
    np.save(tmp_path / "rows.npy", bank.embeddings.numpy().astype(dtype))
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
    floats = mapped.clone().float()
    whole = Gallery(EmbeddingBank(floats[:600], bank.labels[:600]), index)
    whole.add(EmbeddingBank(floats[600:], bank.labels[600:]))
    monkeypatch.setattr(module, "ADD_ROWS", 97)
    blocks = Gallery(EmbeddingBank(mapped[:600], bank.labels[:600]), index)
    blocks.add(EmbeddingBank(mapped[600:], bank.labels[600:]))
    assert len(blocks) == len(whole) == blocks.faiss_index.ntotal == 700
    assert torch.equal(blocks.labels, bank.labels)
    assert torch.equal(blocks.search(QUERY, 9).indices, whole.search(QUERY, 9).indices)


def test_the_seed_chooses_the_training_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "training_sample", lambda n, _, generator: torch.randperm(n, generator=generator)[:200])
    first, again, other = (
        Gallery(clustered(800), "ivf", "nprobe=1", seed=seed).search(QUERY, 5).indices for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("index", "parameters"),
    [("flat", ""), ("ivf", "nprobe=3"), ("ivfpq", "nprobe=3,k_factor_rf=2"), ("hnsw", "efSearch=20"), ("PCA4,SQ8", "")],
)
def test_a_saved_gallery_reads_back_the_same(index: str, parameters: str, tmp_path: Path):
    bank = clustered(700)
    high = EmbeddingBank(bank.embeddings, bank.labels + 2**53)  # odd ones fit no float64
    for name in ("none", "cosine"):
        gallery = Gallery(high, index, parameters, DISTANCES[name][0])
        gallery.save(tmp_path / name / "gallery")
        again = Gallery.load(str(tmp_path / name / "gallery"))
        assert torch.equal(again.search(QUERY, 9).indices, gallery.search(QUERY, 9).indices)
        assert torch.equal(again.labels - 2**53, bank.labels)
        assert str(again) == str(gallery)
        assert (again.ranking.kind, again.ranking.normalize) == (gallery.ranking.kind, gallery.ranking.normalize)
        assert {path.name for path in (tmp_path / name / "gallery").iterdir()} == {"index.faiss", "labels.safetensors"}
        assert [path.name for path in (tmp_path / name).iterdir()] == ["gallery"]
        again.add(EmbeddingBank(bank.embeddings[:3], bank.labels[:3]))
        assert len(again) == 703


def test_an_existing_folder_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(ExistingFileError, match=rf"^expected a new folder .*, got .*{name}, which exists"):
            Gallery(clustered(100), "flat").save(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "file"}


@pytest.mark.parametrize("missing", [1, 3_000])
def test_a_disk_that_is_a_few_bytes_too_small_is_one_error_and_leaves_nothing(missing: int, tmp_path: Path):
    gallery = Gallery(clustered(1000), "flat")
    gallery.save(tmp_path / "old")
    size = (tmp_path / "old" / "index.faiss").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*new, got .*File too large"):
            gallery.save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_gallery_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: dict[int, bool] = {}
    fsync = os.fsync

    def noted(file: int) -> None:
        fsync(file)
        synced.setdefault(os.fstat(file).st_ino, (tmp_path / "gallery").exists())

    monkeypatch.setattr(os, "fsync", noted)
    Gallery(clustered(100), "flat").save(tmp_path / "gallery")
    inside = [tmp_path / "gallery" / name for name in (".", "index.faiss", "labels.safetensors")]
    assert [synced.get(path.stat().st_ino) for path in inside] == [False] * 3
    assert synced.get(tmp_path.stat().st_ino) is True  # the name itself


def test_what_is_missing_or_does_not_belong_together_is_refused(tmp_path: Path):
    for name, count in (("one", 100), ("other", 90), ("third", 80)):
        Gallery(clustered(count), "flat").save(tmp_path / name)
    (tmp_path / "other" / "labels.safetensors").replace(tmp_path / "one" / "labels.safetensors")
    save_file({"labels": torch.arange(80)}, tmp_path / "third" / "labels.safetensors")  # of another tool
    for name, error, says in (
        ("one", UsageError, r"a gallery in .*one, got an index with checksum .*two galleries"),
        ("other", MissingFileError, r"labels\.safetensors in .*other, got none"),
        ("nowhere", MissingFileError, r"index\.faiss in .*nowhere, got none"),
        ("third", UsageError, "a gallery in .*third, got "),
    ):
        with pytest.raises(error, match=f"^expected {says}"):
            Gallery.load(tmp_path / name)


@pytest.mark.parametrize("name", ["index.faiss", "labels.safetensors"])
def test_damage_is_seen(name: str, tmp_path: Path):
    Gallery(clustered(300), "ivf").save(tmp_path / "gallery")
    path = tmp_path / "gallery" / name
    whole = path.read_bytes()
    damaged = [b"", whole[:-1], whole + b"\0", b"nonsense" * 40]
    for place in np.random.default_rng(0).integers(len(whole), size=20):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(place % 8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"^expected a "):
            Gallery.load(tmp_path / "gallery")


def test_the_distance_of_a_saved_gallery_is_kept_or_it_is_not_saved(tmp_path: Path):
    for number, (index, name) in enumerate((index, name) for index in ("flat", "ivf") for name in list(UNITS)[:6]):
        gallery = Gallery(clustered(100), index, distance=UNITS[name])
        gallery.save(tmp_path / str(number))
        found = Gallery.load(tmp_path / str(number)).search(QUERY, 5)
        assert torch.equal(found.distances, gallery.search(QUERY, 5).distances)
    with pytest.raises(
        UsageError, match=r"^expected a gallery ranked by Euclid.*, got LpDistance\(p=1, power=1\); a dist"
    ):
        Gallery(clustered(100), "flat", distance=RawLp(p=1)).save(tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_galleries_of_version_05_are_read(tmp_path: Path):
    Gallery(clustered(100), "flat", distance=LpDistance()).save(tmp_path / "gallery")
    tensors, texts = module.read_tensors(tmp_path / "gallery" / "labels.safetensors")
    metadata = json.loads(texts["gallery"]) | {"kind": "Euclid", "dims": 8}
    del metadata["power"]
    module.write_tensors(tmp_path / "gallery" / "labels.safetensors", tensors, {"gallery": json.dumps(metadata)})
    old = Gallery.load(tmp_path / "gallery")
    assert str(old.ranking) == "euclidean, normalized"
    found = old.search(QUERY, 3)
    assert torch.equal(
        found.distances, Gallery(clustered(100), "flat", distance=LpDistance()).search(QUERY, 3).distances
    )
    old.remove(found.indices[0])
    assert len(old) == 97


def test_recipes():
    for index, count, dims, *expected in (
        ("ivf", 38, 8, "IVF1,Flat", "nprobe=1"),
        ("ivf", 1000, 8, "IVF25,Flat", "nprobe=8"),
        ("ivf", 1_000_000, 8, "IVF4000,Flat", "nprobe=250"),
        ("ivfpq", 623, 8, "IVF15,SQ8,RFlat", "nprobe=8,k_factor_rf=10"),
        ("ivfpq", 624, 1, "IVF16,PQ1x4fsr,RFlat", "nprobe=8,k_factor_rf=10"),
        ("ivfpq", 1_000_000, 9, "IVF4000,PQ3x4fsr,RFlat", "nprobe=500,k_factor_rf=10"),
        ("ivfpq", 1_000_000, 128, "IVF4000,PQ64x4fsr,RFlat", "nprobe=500,k_factor_rf=10"),
    ):
        assert recipe(index, count, dims) == tuple(expected)


def test_a_training_sample_has_enough_for_each_list():
    for lists, expected in (("IVF100", 20_000), ("IVF400,PQ8x4fsr", 25_600), ("IVF700", 30_000), ("HNSW32", 20_000)):
        sample = training_sample(30_000, lists, torch.Generator().manual_seed(0))
        assert len(set(sample.tolist()) & set(range(30_000))) == len(sample) == expected
        assert sample.double().mean().item() == pytest.approx(15_000, rel=0.02)  # from all over the set


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
@pytest.mark.parametrize(("count", "dims"), [(1, 4), (5, 1), (30, 7), (39, 8), (100, 13)])
def test_small_galleries_are_searched_exactly(index: str, count: int, dims: int):
    bank, query = clustered(count, dims=dims), clustered(20, seed=1, dims=dims).embeddings
    found = Gallery(bank, index, "k_factor_rf=100" if index == "ivfpq" else "").search(query, min(5, count)).indices
    assert share_found(found, all_distances(query, bank.embeddings)) == 1
