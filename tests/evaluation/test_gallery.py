"""Gallery: what its indexes find against a full sort in numpy, what it keeps in files, and what it refuses."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from safetensors.torch import save_file

from pml_fewshot.atomic import CannotWriteError
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation import gallery as module
from pml_fewshot.evaluation.gallery import Gallery, recipe, training_sample
from pml_fewshot.evaluation.retrieval import RetrievalTester

pytestmark = pytest.mark.filterwarnings("ignore:faiss's OpenBLAS")  # of the machine, not of the gallery

DISTANCES: dict[str, Callable[[], BaseDistance | None]] = {
    "none": lambda: None,
    "normalised": LpDistance,
    "cosine": CosineSimilarity,
    "dot": lambda: DotProductSimilarity(normalize_embeddings=False),
}
# parameters that make each index look at everything
EXHAUSTIVE = {
    "ivf": "nprobe=1000",
    "ivfpq": "nprobe=1000,k_factor_rf=1000",
    "hnsw": "efSearch=4000",
    "IVF16,Flat": "nprobe=16",
    "Flat": "",
}


def clustered(count: int, seed: int = 0, dims: int = 8) -> EmbeddingBank:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(30, dims, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(30, (count,), generator=generator)
    rows = centres[labels] + torch.randn(count, dims, generator=generator)
    return EmbeddingBank(rows * (0.5 + torch.rand(count, 1, generator=generator)), labels)


def all_distances(query: torch.Tensor, reference: torch.Tensor, name: str) -> np.ndarray:
    """(N, M), smaller is nearer, in float64."""
    q, r = query.double().numpy(), reference.double().numpy()
    if name in ("normalised", "cosine"):
        q, r = (x / np.sqrt((x**2).sum(axis=1, keepdims=True)) for x in (q, r))
    if name in ("cosine", "dot"):
        return -(q @ r.T)
    return np.sqrt(((q[:, None] - r) ** 2).sum(axis=2))


def share_found(found: torch.Tensor, distances: np.ndarray) -> float:
    """Share of the found that are as near as the k-th nearest in truth."""
    kth = np.sort(distances, axis=1)[:, found.shape[1] - 1 : found.shape[1]]
    near = np.take_along_axis(distances, found.numpy(), axis=1) <= kth + 1e-5
    return float((near & (found.numpy() >= 0)).mean())


@pytest.mark.parametrize("index", EXHAUSTIVE)
@pytest.mark.parametrize("name", DISTANCES)
def test_an_index_that_looks_at_everything_finds_the_nearest(index: str, name: str):
    bank, query = clustered(800), clustered(60, seed=1).embeddings
    gallery = Gallery(bank, index, EXHAUSTIVE[index], DISTANCES[name]())
    found, distances = gallery.search(query, 10), all_distances(query, bank.embeddings, name)
    assert found.shape == (60, 10)
    assert found.dtype == torch.int64
    assert all(len(set(row)) == 10 for row in found.tolist())
    # a graph's links need not lead to every item
    assert share_found(found, distances) > (0.95 if index == "hnsw" else 0.9999)
    ordered = np.take_along_axis(distances, found.numpy(), axis=1)
    assert (np.diff(ordered, axis=1) >= -1e-5).all()  # nearest first


def test_codes_of_eight_bits_find_nearly_all():
    bank, query = clustered(800), clustered(60, seed=1).embeddings
    found = Gallery(bank, "IVF16,SQ8", "nprobe=16").search(query, 10)
    assert 0.9 < share_found(found, all_distances(query, bank.embeddings, "none")) <= 1


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
@pytest.mark.parametrize("name", ["none", "cosine", "dot"])
def test_the_chosen_parameters_find_nearly_all_on_clustered_data(index: str, name: str):
    bank, query = clustered(3000, dims=16), clustered(100, seed=1, dims=16).embeddings
    found = Gallery(bank, index, distance=DISTANCES[name]()).search(query, 10)
    # a graph's links lead badly to the few long rows that win all inner products
    assert share_found(found, all_distances(query, bank.embeddings, name)) > (0.8 if name == "dot" else 0.95)


def test_parameters_go_before_those_of_the_recipe():
    bank = clustered(400)
    gallery = Gallery(bank, "ivf", "nprobe=3")
    assert gallery.faiss_index.nprobe == 3
    assert str(gallery) == "IVF10,Flat nprobe=3"
    assert Gallery(bank, "ivf").faiss_index.nprobe == 8
    graph = Gallery(bank, "hnsw", "efConstruction=37,efSearch=41").faiss_index.hnsw
    assert (graph.efConstruction, graph.efSearch) == (37, 41)
    graph = Gallery(bank, "hnsw").faiss_index.hnsw
    assert (graph.efConstruction, graph.efSearch) == (100, 128)
    refined = Gallery(clustered(700), "ivfpq", "nprobe=2,k_factor_rf=3").faiss_index
    assert refined.k_factor == 3
    assert faiss.downcast_index(refined.base_index).nprobe == 2


@pytest.mark.parametrize(
    ("index", "parameters"),
    [
        ("nonsense", ""),
        ("flat", ""),
        ("IVF", ""),
        ("IVF4,PQ5", ""),  # 8 dimensions are no multiple of 5
        ("ivf", "nprob=3"),
        ("ivf", "nprobe=many"),
        ("ivf", "nprobe"),
        ("hnsw", "nprobe=3"),
        ("Flat", "efSearch=3"),
    ],
)
def test_what_faiss_does_not_know_is_refused(index: str, parameters: str):
    with pytest.raises(ValueError, match=r"^expected an index and parameters that faiss can build, got") as error:
        Gallery(clustered(100), index, parameters)
    assert repr(index) in str(error.value)
    assert repr(parameters) in str(error.value)
    assert "\n" not in str(error.value)


def test_more_lists_than_references_are_refused():
    with pytest.raises(ValueError, match=r"^expected "):
        Gallery(clustered(100), "IVF500,Flat")


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw", "Flat"])
@pytest.mark.parametrize("distance", [LpDistance(p=1), DotProductSimilarity(power=2), LpDistance(power=-1)])
def test_a_distance_that_faiss_cannot_rank_by_is_refused(index: str, distance: BaseDistance):
    with pytest.raises(ValueError, match=rf"^expected Euclid, cosine or dot product for index '{index}', got "):
        Gallery(clustered(100), index, distance=distance)


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "Flat"])  # a graph depends on the order of its links
def test_blocks_of_any_size_give_the_same_gallery(index: str, monkeypatch: pytest.MonkeyPatch):
    bank, query = clustered(700), clustered(20, seed=1).embeddings
    whole = Gallery(bank, index)
    monkeypatch.setattr(module, "BLOCK", 7)
    blocks = Gallery(bank, index)
    assert len(blocks) == len(whole) == blocks.faiss_index.ntotal == 700
    assert torch.equal(blocks.search(query, 9), whole.search(query, 9))
    assert torch.equal(blocks.labels, bank.labels)


def test_a_graph_added_to_in_blocks_finds_the_nearest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    bank, query = clustered(300), clustered(20, seed=1).embeddings
    found = Gallery(bank, "hnsw", "efSearch=1000").search(query, 5)
    assert share_found(found, all_distances(query, bank.embeddings, "none")) > 0.99


def test_what_is_added_later_follows_on(monkeypatch: pytest.MonkeyPatch):
    bank, query = clustered(300), clustered(20, seed=1).embeddings
    monkeypatch.setattr(module, "BLOCK", 7)
    gallery = Gallery(EmbeddingBank(bank.embeddings[:200], bank.labels[:200]), "Flat")
    gallery.add(EmbeddingBank(bank.embeddings[200:], bank.labels[200:]))
    assert torch.equal(gallery.search(query, 9), Gallery(bank, "Flat").search(query, 9))
    assert torch.equal(gallery.labels, bank.labels)
    assert len(gallery) == 300


def test_adding_another_width_is_refused_and_changes_nothing():
    gallery = Gallery(clustered(100), "Flat")
    with pytest.raises(ValueError, match=r"^expected "):
        gallery.add(clustered(5, dims=3))
    assert len(gallery) == gallery.faiss_index.ntotal == 100


def test_queries_of_another_width_and_no_neighbours_are_refused():
    gallery = Gallery(clustered(100), "Flat")
    with pytest.raises(ValueError, match=r"^expected queries of shape \(N, 8\), got \(2, 3\); use one embedder"):
        gallery.search(torch.zeros(2, 3), 1)
    for k in (0, -1, True):
        with pytest.raises(ValueError, match=r"^expected k to be an integer of at least 1"):
            gallery.search(torch.zeros(2, 8), k)


def test_the_seed_chooses_the_training_sample(monkeypatch: pytest.MonkeyPatch):
    def few(count: int, description: str, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(count, generator=generator)[:200].sort().values

    monkeypatch.setattr(module, "training_sample", few)
    bank, query = clustered(800), clustered(50, seed=1).embeddings
    first, again, other = (Gallery(bank, "ivf", "nprobe=1", seed=seed).search(query, 5) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "index",
    [
        *("SQ8", "PQ2x4", "PQ2x4fs", "LSH", "IVF4,SQ8", "IVF4,PQ4x4", "OPQ2,IVF4,PQ2x4", "PCA4,Flat", "L2norm,Flat"),
        *("HNSW4,SQ8", "HNSW4,PQ2x4", "IVF4_HNSW4,Flat", "IVF4,PQ2x4fs,Refine(SQ8)", "PCAR4,SQ4", "RR8,IVF4,Flat"),
    ],
)
def test_indexes_of_the_factory_read_back_the_same(index: str, tmp_path: Path):
    bank, query = clustered(700), clustered(20, seed=1).embeddings
    gallery = Gallery(bank, index)
    gallery.save(tmp_path / "gallery")
    assert torch.equal(Gallery.load(tmp_path / "gallery").search(query, 3), gallery.search(query, 3))


def test_an_index_of_unknown_parts_is_not_saved(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected an index of parts that are known .*, got IndexIVFRaBitQ"):
        Gallery(clustered(700), "IVF4,RaBitQ").save(tmp_path / "gallery")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw", "Flat"])
@pytest.mark.parametrize("name", ["none", "cosine"])
def test_a_saved_gallery_reads_back_the_same(index: str, name: str, tmp_path: Path):
    bank, query = clustered(700), clustered(20, seed=1).embeddings
    high = EmbeddingBank(bank.embeddings, bank.labels + 2**53)  # odd ones fit no float64
    parameters = {"ivf": "nprobe=3", "ivfpq": "nprobe=3,k_factor_rf=2", "hnsw": "efSearch=20", "Flat": ""}[index]
    gallery = Gallery(high, index, parameters, DISTANCES[name]())
    gallery.save(tmp_path / "new" / "gallery")
    again = Gallery.load(str(tmp_path / "new" / "gallery"))
    assert torch.equal(again.search(query, 9), gallery.search(query, 9))
    assert again.labels.dtype == torch.int64
    assert torch.equal(again.labels - 2**53, bank.labels)
    assert (again.description, again.parameters, str(again)) == (gallery.description, gallery.parameters, str(gallery))
    assert (again.ranking.kind, again.ranking.normalize) == (gallery.ranking.kind, gallery.ranking.normalize)
    if index == "ivf":
        assert again.faiss_index.nprobe == 3
    assert sorted(path.name for path in (tmp_path / "new" / "gallery").iterdir()) == [
        "index.faiss",
        "labels.safetensors",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gallery"]
    again.add(EmbeddingBank(bank.embeddings[:3], bank.labels[:3]))
    assert len(again) == 703


def test_a_read_gallery_is_not_said_to_rank_by_euclid(tmp_path: Path):
    bank = clustered(100)
    Gallery(bank, "Flat", distance=CosineSimilarity()).save(tmp_path / "gallery")
    again = Gallery.load(tmp_path / "gallery")
    assert str(again.ranking) != "Euclid"
    assert "Euclid" not in RetrievalTester().test(clustered(50, seed=1), again).ranking


def test_an_existing_folder_is_left_as_it_is(tmp_path: Path):
    gallery = Gallery(clustered(100), "Flat")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    for name in ("there", "empty", "file"):
        with pytest.raises(FileExistsError, match=rf"^expected a new folder .*, got .*{name}, which exists"):
            gallery.save(tmp_path / name)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    assert list((tmp_path / "empty").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "there"]


@pytest.mark.parametrize("writer", ["write_index", "write_tensors"])
def test_a_save_that_fails_leaves_nothing_behind(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def disk_full(*arguments: object) -> None:
        raise OSError("No space left on device")

    gallery = Gallery(clustered(100), "Flat")
    with monkeypatch.context() as patch:
        patch.setattr(faiss if writer == "write_index" else module, writer, disk_full)
        with pytest.raises(OSError, match="No space left"):
            gallery.save(tmp_path / "gallery")
    assert list(tmp_path.iterdir()) == []
    gallery.save(tmp_path / "gallery")
    assert len(Gallery.load(tmp_path / "gallery")) == 100


@pytest.mark.parametrize("index", ["Flat", "ivfpq", "hnsw"])
@pytest.mark.parametrize("missing", [1, 500, 3000, 5000, 20_000])
def test_a_disk_that_is_a_few_bytes_too_small_is_one_error(index: str, missing: int, tmp_path: Path):
    gallery = Gallery(clustered(1000), index)
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
    assert len(Gallery.load(tmp_path / "old")) == 1000


def test_a_read_only_folder_is_one_error():
    with pytest.raises(CannotWriteError, match=r"^expected to write /sys/gallery, got "):  # nor may root write there
        Gallery(clustered(100), "Flat").save("/sys/gallery")


def test_a_gallery_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: dict[int, bool] = {}
    fsync = os.fsync

    def noted(file: int) -> None:
        fsync(file)
        synced.setdefault(os.fstat(file).st_ino, (tmp_path / "gallery").exists())

    monkeypatch.setattr(os, "fsync", noted)
    Gallery(clustered(100), "Flat").save(tmp_path / "gallery")
    inside = [tmp_path / "gallery" / name for name in (".", "index.faiss", "labels.safetensors")]
    assert [synced.get(path.stat().st_ino) for path in inside] == [False] * 3
    assert synced.get(tmp_path.stat().st_ino) is True  # the name itself


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from pml_fewshot.evaluation.gallery import Gallery
folder, moments = Path(sys.argv[1]), random.Random(7)
gallery = Gallery.load(folder / "old")
start = time.monotonic()
gallery.save(folder / "whole")
seconds = time.monotonic() - start
for number in range(20):
    child = os.fork()
    if child == 0:
        gallery.save(folder / f"new-{number}")
        os._exit(0)
    time.sleep(moments.uniform(0, 1.3) * seconds)
    os.kill(child, signal.SIGKILL)  # one that has ended waits to be collected
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status))
"""


def test_a_process_killed_while_it_saves_leaves_whole_galleries_only(tmp_path: Path):
    bank, query = clustered(20_000, dims=64), clustered(5, seed=1, dims=64).embeddings
    gallery = Gallery(bank, "Flat")
    gallery.save(tmp_path / "old")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    ends = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert set(ends) <= {"killed", "0"}
    assert ends.count("killed") >= 5
    expected = gallery.search(query, 3)
    for folder in ("old", "whole", *(path.name for path in tmp_path.glob("new-*"))):
        assert torch.equal(Gallery.load(tmp_path / folder).search(query, 3), expected)


def test_what_is_missing_or_does_not_belong_together_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"^expected index\.faiss in .*nowhere, got none"):
        Gallery.load(tmp_path / "nowhere")
    Gallery(clustered(100), "Flat").save(tmp_path / "one")
    Gallery(clustered(90), "Flat").save(tmp_path / "other")
    (tmp_path / "one" / "labels.safetensors").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"^expected labels\.safetensors in .*one, got none"):
        Gallery.load(tmp_path / "one")
    (tmp_path / "other" / "labels.safetensors").rename(tmp_path / "one" / "labels.safetensors")
    with pytest.raises(ValueError, match=r"expected a gallery in .*one, got .*expected an index with checksum"):
        Gallery.load(tmp_path / "one")
    (tmp_path / "kept").rename(tmp_path / "one" / "labels.safetensors")
    (tmp_path / "one" / "index.faiss").unlink()
    with pytest.raises(FileNotFoundError, match=r"^expected index\.faiss in .*one, got none"):
        Gallery.load(tmp_path / "one")


@pytest.mark.parametrize("broken", ["index", "labels", "foreign labels"])
def test_a_file_that_is_no_gallery_is_said(broken: str, tmp_path: Path):
    Gallery(clustered(100), "Flat").save(tmp_path / "gallery")
    if broken == "foreign labels":
        save_file({"labels": torch.arange(100)}, tmp_path / "gallery" / "labels.safetensors")
    else:
        name = "index.faiss" if broken == "index" else "labels.safetensors"
        (tmp_path / "gallery" / name).write_bytes(b"nonsense" * 40)
    with pytest.raises(ValueError, match=r"^expected "):
        Gallery.load(tmp_path / "gallery")


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "Flat"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_memory_mapped_embeddings_of_any_float_type_are_added(
    index: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BLOCK", 97)
    bank, query = clustered(700), clustered(20, seed=1).embeddings
    np.save(tmp_path / "rows.npy", bank.embeddings.numpy().astype(dtype))
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
    expected = Gallery(EmbeddingBank(mapped.clone().float(), bank.labels), index).search(query, 9)
    gallery = Gallery(EmbeddingBank(mapped, bank.labels), index)
    assert torch.equal(gallery.search(query, 9), expected)
    by_type = query.to(mapped.dtype)
    assert torch.equal(gallery.search(by_type, 9), gallery.search(by_type.float(), 9))


@given(count=st.integers(1, 5_000_000), dims=st.one_of(st.integers(1, 2048), st.sampled_from([1, 2, 3, 7, 509, 1021])))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_recipes_suit_any_size(count: int, dims: int):
    for index in ("ivf", "ivfpq"):
        description, parameters = recipe(index, count, dims)
        lists, *rest = description.removeprefix("IVF").split(",")
        assert int(lists) >= 1
        assert int(lists) == 1 or 39 * int(lists) <= count
        assert int(lists) <= 4 * count**0.5
        probes = int(parameters.split(",")[0].removeprefix("nprobe="))
        assert 1 <= probes <= int(lists)
        if index == "ivf":
            assert rest == ["Flat"]
        elif count < 16 * 39:  # too few to train 4-bit codes on
            assert rest == ["SQ8", "RFlat"]
        else:
            codes = int(rest[0].removeprefix("PQ").removesuffix("x4fsr"))
            assert dims % codes == 0
            assert codes == max(m for m in range(1, dims + 1) if dims % m == 0 and (m == 1 or 2 * m <= dims))
            assert rest[1:] == ["RFlat"]
    assert recipe("IVF7,SQ8", count, dims) == ("IVF7,SQ8", "")


@pytest.mark.parametrize(
    ("count", "description", "expected"),
    [
        (100, "IVF2,Flat", 100),
        (30_000, "IVF100,Flat", 20_000),
        (30_000, "IVF400,PQ8x4fsr,RFlat", 25_600),
        (30_000, "OPQ8,IVF700,PQ8", 30_000),
        (30_000, "HNSW32", 20_000),
    ],
)
def test_a_training_sample_has_enough_for_each_list(count: int, description: str, expected: int):
    sample = training_sample(count, description, torch.Generator().manual_seed(0))
    assert sample.shape == (expected,)
    assert (sample.diff() > 0).all()
    assert sample[0] >= 0
    assert sample[-1] < count
    if expected < count:  # from all over the set
        assert sample.double().mean().item() == pytest.approx(count / 2, rel=0.02)


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
@pytest.mark.parametrize(("count", "dims"), [(1, 4), (5, 1), (5, 7), (5, 8), (30, 7), (39, 8), (100, 1), (100, 13)])
def test_small_galleries_are_searched_exactly(index: str, count: int, dims: int):
    bank, query = clustered(count, dims=dims), clustered(20, seed=1, dims=dims).embeddings
    k = min(5, count)
    found = Gallery(bank, index, "k_factor_rf=100" if index == "ivfpq" else "").search(query, k)
    assert share_found(found, all_distances(query, bank.embeddings, "none")) == 1


@pytest.mark.parametrize("count", [39, 100, 500])
def test_lists_have_the_training_points_that_faiss_wants(count: int, capfd: pytest.CaptureFixture[str]):
    Gallery(clustered(count), "ivf")
    captured = capfd.readouterr()
    assert "WARNING" not in captured.err + captured.out


@pytest.mark.parametrize("index", ["ivf", "ivfpq"])
def test_places_that_could_not_be_filled_are_minus_one(index: str):
    found = Gallery(clustered(1000), index, "nprobe=1").search(clustered(5, seed=1).embeddings, 1000)
    assert found.shape == (5, 1000)
    assert (found == -1).any()
    for row in found.tolist():
        real = [i for i in row if i >= 0]
        assert 0 < len(set(real)) == len(real)
        assert row[len(real) :] == [-1] * (1000 - len(real))


def test_what_the_lists_that_were_looked_into_lack_is_minus_one():
    rows = clustered(60)
    found = Gallery(rows, "IVF12,Flat", "nprobe=1").search(rows.embeddings, 60)
    assert (found[:, 0] >= 0).all()
    assert (found[:, -1] == -1).all()
    with pytest.raises(ValueError, match=r"^expected k of at most 60, the gallery's size, got 61"):
        Gallery(rows, "Flat").search(rows.embeddings, 61)
