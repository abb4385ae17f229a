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
from pytorch_metric_learning.distances import LpDistance
from safetensors.torch import save_file

from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation import gallery as module
from pml_fewshot.evaluation.gallery import Gallery, recipe, training_sample
from pml_fewshot.io.atomic import CannotWriteError
from tests.evaluation.formulas import DISTANCES, all_distances

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
        (lambda: Gallery(empty), r"at least one reference, got none"),
        (lambda: Gallery(clustered(9), "ivf", "", LpDistance(p=1)), r"Euclid, cosine or dot product for index 'ivf', "),
        (lambda: Gallery(clustered(9), "hnsw", "", LpDistance(power=-1)), r"Euclid, cosine or dot product for index "),
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


def test_galleries_of_version_05_are_read(tmp_path: Path):
    Gallery(clustered(100), "flat", distance=LpDistance()).save(tmp_path / "gallery")
    tensors, texts = module.read_tensors(tmp_path / "gallery" / "labels.safetensors")
    metadata = json.loads(texts["gallery"]) | {"kind": "Euclid", "dims": 8}
    module.write_tensors(tmp_path / "gallery" / "labels.safetensors", tensors, {"gallery": json.dumps(metadata)})
    assert str(Gallery.load(tmp_path / "gallery").ranking) == "euclidean, normalized"


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
