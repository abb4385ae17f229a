"""build_gallery: the same index as one process builds, list by list; several workers, kills, and what it refuses."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from filelock import FileLock
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance, SNRDistance

from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError
from pml_fewshot.embedders.bank import EmbeddingBank, load_bank
from pml_fewshot.evaluation import gallery as gallery_module
from pml_fewshot.evaluation import mapped_index, sharded_gallery
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.sharded_gallery import build_gallery
from pml_fewshot.io.atomic import CannotWriteError

BLOCK = 64  # rows that a shard has at least, here
DISTANCES = {"none": None, "normalized": LpDistance(), "cosine": CosineSimilarity(), "cubed": LpDistance(power=3)}
KINDS = [
    *(("ivf", "nprobe=4", name) for name in DISTANCES),
    *(("ivfpq", "nprobe=3,k_factor_rf=2", name) for name in DISTANCES),
    ("IVF9,SQ8", "nprobe=3", "none"),
    ("IVF9,SQ4", "nprobe=3", "cosine"),
    ("IVF9,PQ4x4", "nprobe=3", "none"),
    ("IVF9,PQ3x4fs", "nprobe=3", "none"),  # an odd number of half bytes
    ("IVF9_HNSW8,Flat", "nprobe=3", "none"),
    ("PCA6,IVF9,Flat", "nprobe=3", "none"),
    ("OPQ4,IVF9,PQ4x4", "nprobe=3", "cosine"),
    ("PCA6,IVF9,PQ3x4fsr,RFlat", "nprobe=3,k_factor_rf=3", "none"),
    ("IVF200,Flat", "nprobe=50", "none"),  # lists that are empty
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gallery_module, sharded_gallery):
        monkeypatch.setattr(module, "ADD_ROWS", BLOCK)


def clustered(count: int, seed: int = 0, dims: int = 12) -> EmbeddingBank:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(30, (count,), generator=generator)
    centers = 2 * torch.randn(30, dims, generator=torch.Generator().manual_seed(7))
    names = [f"class {number}" for number in range(30)]
    return EmbeddingBank(centers[labels] + torch.randn(count, dims, generator=generator), labels, class_names=names)


QUERY = clustered(40, seed=1).embeddings


def contents(gallery: Gallery) -> list[tuple[list[int], bytes]]:
    """The indices and codes of every list, as faiss holds them."""
    lists = mapped_index.inverted_lists(gallery.faiss_index)
    found = []
    for number in range(lists.nlist):
        size = lists.invlists.list_size(number)
        packed = -(-size // 32) * 32 if "FastScan" in type(lists).__name__ else size  # they stand in blocks of 32
        if size:
            ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size).tolist()
            codes = faiss.rev_swig_ptr(lists.invlists.get_codes(number), packed * lists.code_size)
            found.append((ids, codes.tobytes()))
        else:
            found.append(([], b""))
    return found


def assert_same(found: Gallery, expected: Gallery) -> None:
    assert contents(found) == contents(expected)
    assert (len(found), str(found), found.class_names) == (len(expected), str(expected), expected.class_names)
    assert torch.equal(found.labels, expected.labels)
    for k in (1, 7, 60):
        one, other = found.search(QUERY, k), expected.search(QUERY, k)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.distances.nan_to_num(), other.distances.nan_to_num())
        assert torch.equal(one.labels, other.labels)
        assert one.names == other.names
        assert torch.equal(found.rank(QUERY, k), expected.rank(QUERY, k))


@pytest.mark.parametrize(("index", "parameters", "name"), KINDS)
def test_a_gallery_in_shards_is_that_of_one_process(index: str, parameters: str, name: str, tmp_path: Path):
    bank = clustered(1000)
    expected = Gallery(bank, index, parameters, DISTANCES[name], seed=3)
    assert_same(build_gallery(bank, tmp_path / "g", index, parameters, DISTANCES[name], 3, shards=3), expected)
    (tmp_path / "g").rename(tmp_path / "moved")
    assert_same(Gallery.load(tmp_path / "moved"), expected)


@pytest.mark.parametrize(("count", "shards", "rows"), [(1000, 1, 64), (1000, 7, 64), (1000, 64, 64), (130, 300, 1)])
@pytest.mark.parametrize("index", ["ivf", "ivfpq"])
def test_any_number_of_shards_gives_the_same(
    count: int, shards: int, rows: int, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (gallery_module, sharded_gallery):
        monkeypatch.setattr(module, "ADD_ROWS", rows)
    bank, made = clustered(count), []
    original = sharded_gallery._make_shard
    monkeypatch.setattr(sharded_gallery, "_make_shard", lambda *given: (made.append(given[3]), original(*given)))
    assert_same(build_gallery(bank, tmp_path / "g", index, shards=shards), Gallery(bank, index))
    assert len(made) == min(shards, -(-count // rows))
    assert sorted(place for own in made for place in own) == list(range(count))
    assert not list((tmp_path / "g" / "shards").glob("*.npy"))


@pytest.mark.parametrize(("index", "parameters"), [("ivf", "nprobe=99"), ("ivfpq", "nprobe=99,k_factor_rf=99")])
def test_searching_all_lists_finds_what_a_full_sort_finds(index: str, parameters: str, tmp_path: Path):
    bank = clustered(900)
    found = build_gallery(bank, tmp_path / "g", index, parameters).search(QUERY, 9)
    far = (QUERY.double()[:, None] - bank.embeddings.double()).norm(dim=2)
    expected, order = far.sort(dim=1)
    assert torch.equal(found.indices, order[:, :9])
    np.testing.assert_allclose(found.distances.numpy(), expected[:, :9].numpy(), rtol=1e-4)
    assert torch.equal(found.labels, bank.labels[order[:, :9]])


def test_the_recall_is_a_loop_over_a_full_sort_and_what_the_tester_says(tmp_path: Path):
    bank, query = clustered(900), clustered(300, seed=2)
    gallery = build_gallery(bank, tmp_path / "g", "IVF20,SQ4", "nprobe=2")
    recall = gallery.recall(query.embeddings, bank, k=7)
    order = (query.embeddings.double()[:, None] - bank.embeddings.double()).norm(dim=2).argsort(dim=1)[:, :7].tolist()
    found = gallery.rank(query.embeddings, 7).tolist()
    assert recall.at_1 == np.mean([one[0] == other[0] for one, other in zip(found, order, strict=True)])
    shares = [len(set(one) & set(other)) / 7 for one, other in zip(found, order, strict=True)]
    assert recall.at_k == pytest.approx(np.mean(shares))
    assert 0.1 < recall.at_1 < 1
    tester = RetrievalTester(("precision_at_1",), k=7, index="IVF20,SQ4", parameters="nprobe=2")
    figures = tester.test(query, bank)
    assert figures.index_recall == recall
    assert RetrievalTester(("precision_at_1",), k=7).test(query, gallery) == dict(figures)
    with pytest.raises(
        UsageError, match=r"^expected the bank that the gallery was made of, got 899 references for a g"
    ):
        gallery.recall(query.embeddings, clustered(899))


def saved(bank: EmbeddingBank, folder: Path) -> Path:
    """As a .npy that each process maps, with texts as labels."""
    np.save(folder / "bank.npy", bank.embeddings.numpy())
    np.save(folder / "bank_labels.npy", np.array([bank.class_names[label] for label in bank.labels]))
    return folder / "bank.npy"


def work(bank: Path, folder: Path, index: str, shards: int, dies_in: str = "") -> None:
    """A worker, which may kill itself, like an operating system short of memory, in one of its steps.

    Of three calls of a step that writes a file the last is left half done.
    """
    for module in (gallery_module, sharded_gallery):
        module.ADD_ROWS = BLOCK
    calls = []

    def deadly(original: Any) -> Any:
        def step(*given: Any, **named: Any) -> Any:
            calls.append(given)
            if len(calls) < 3 and dies_in == "_make_shard":
                return original(*given, **named)
            Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # before a file gets its name
            return original(*given, **named)

        return step

    if dies_in:
        setattr(sharded_gallery, dies_in, deadly(getattr(sharded_gallery, dies_in)))
    build_gallery(load_bank(bank), folder, index, shards=shards)


SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.long
def test_workers_share_the_work(tmp_path: Path):
    path = saved(clustered(1500), tmp_path)
    workers = [SPAWN.Process(target=work, args=(path, tmp_path / "g", "ivfpq", 12)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert_same(Gallery.load(tmp_path / "g"), Gallery(load_bank(path), "ivfpq"))


@pytest.mark.long
@pytest.mark.parametrize(
    "step",
    [
        "_make_shard",
        "write_lists",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("train", "write_index", "write_text", "write_labels")
        ),
    ],
)
def test_after_a_kill_the_same_call_goes_on(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(clustered(700), tmp_path)
    worker = SPAWN.Process(target=work, args=(path, tmp_path / "g", "ivfpq", 5, step))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    made = []
    original = sharded_gallery._make_shard
    monkeypatch.setattr(sharded_gallery, "_make_shard", lambda *given: (made.append(given[0].stem), original(*given)))
    expected = Gallery(load_bank(path), "ivfpq")
    assert_same(build_gallery(load_bank(path), tmp_path / "g", "ivfpq", shards=5), expected)
    left = {"_make_shard": ["2", "3", "4"], "write_lists": [], "write_labels": []}
    assert made == left.get(step, ["0", "1", "2", "3", "4"])
    (tmp_path / "g" / "shards" / "2.npy").touch()  # as if the merge had been killed after the labels
    assert_same(build_gallery(load_bank(path), tmp_path / "g", "ivfpq", shards=5), expected)
    assert not list((tmp_path / "g" / "shards").glob("*.npy"))
    for name in ("train", "_make_shard", "write_lists"):
        monkeypatch.setattr(sharded_gallery, name, None)  # it is finished: none is called
    assert_same(build_gallery(load_bank(path), tmp_path / "g", "ivfpq", shards=5), expected)


def hold(lock: Path, held: Any) -> None:
    with FileLock(lock):
        held.set()
        time.sleep(3600)


@pytest.mark.slow
def test_what_a_dead_worker_had_taken_is_taken_over(tmp_path: Path):
    path, folder, held = saved(clustered(700), tmp_path), tmp_path / "g", SPAWN.Event()
    (folder / "shards").mkdir(parents=True)
    holder = SPAWN.Process(target=hold, args=(folder / "shards" / "1.lock", held))
    worker = SPAWN.Process(target=work, args=(path, folder, "ivf", 4))
    holder.start()
    held.wait()
    worker.start()
    while {each.stem for each in (folder / "shards").glob("[0-9].npy")} != {"0", "2", "3"}:
        assert worker.is_alive()
        time.sleep(0.01)
    assert not (folder / "labels.safetensors").exists()
    with pytest.raises(MissingFileError, match=r"^expected labels\.safetensors in .*g, got none"):
        Gallery.load(folder)
    holder.kill()
    worker.join()
    assert worker.exitcode == 0
    assert_same(Gallery.load(folder), Gallery(load_bank(path), "ivf"))


def changed(bank: EmbeddingBank, what: str) -> EmbeddingBank:
    rows, labels, names = bank.embeddings.clone(), bank.labels.clone(), list(bank.class_names)
    if what == "a number":
        rows[517, 3] = rows[517, 3].nextafter(torch.tensor(9.0))
    elif what == "a label":
        labels[517] = (labels[517] + 1) % 30
    elif what == "a name":
        names[4] = "another"
    elif what == "a row":
        rows, labels = rows[:-1], labels[:-1]
    elif what == "the type":
        rows = rows.double()
    return EmbeddingBank(rows, labels, class_names=names)


@pytest.mark.parametrize("finished", [False, True])
def test_another_gallery_than_the_folders_is_refused_by_name(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bank, folder = clustered(600), tmp_path / "g"
    given: dict[str, Any] = {"index": "ivf", "parameters": "nprobe=2", "distance": None, "seed": 1, "shards": 3}
    if finished:
        build_gallery(bank, folder, **given)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(sharded_gallery, "_make_shards", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build_gallery(bank, folder, **given)
    for name, value, says in (
        ("index", "ivfpq", "index 'ivf', .* got index 'ivfpq'"),
        ("parameters", "nprobe=3", "parameters 'nprobe=2', .* got parameters 'nprobe=3'"),
        ("distance", LpDistance(), r"distance 'euclidean', .* got distance 'LpDistance\(p=2, power=1, normalized\)'"),
        ("seed", 2, "seed 1, .* got seed 2"),
        ("shards", 4, "shards 3, .* got shards 4"),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}; give the same as before, or name another folder"):
            build_gallery(bank, folder, **{**given, name: value})
    for what in ("a number", "a label", "a name", "a row", "the type"):
        with pytest.raises(
            UsageError, match=r"^expected bank '600 x 12 crc32:.*', with which .* was begun, got bank '"
        ):
            build_gallery(changed(bank, what), folder, **given)
    same = EmbeddingBank(bank.embeddings.T.contiguous().T, bank.labels, class_names=bank.class_names)
    assert_same(build_gallery(same, folder, **given), Gallery(bank, "ivf", "nprobe=2", seed=1))


WITHOUT = [
    "flat",
    "hnsw",
    "SQ8",
    "HNSW8,SQ8",
    "IVF3,FlatDedup",
    "IVF9,PQ4x4fs_64",
    "IVF9,PQ4+4",
    "IVF9,Flat,Refine(SQ8)",
]


@pytest.mark.parametrize("index", WITHOUT)
def test_an_index_without_lists_that_can_be_mapped_is_refused(index: str, tmp_path: Path):
    with pytest.raises(UsageError, match=r"^expected an index of inverted lists, .* got '.*' \(Index\w+\); take 'ivf'"):
        build_gallery(clustered(700), tmp_path / "g", index)
    assert not list(tmp_path.iterdir())


def test_what_else_cannot_be_built_is_refused(tmp_path: Path):
    bank = clustered(700)
    for given, says in (
        ({"shards": 0}, "shards to be an integer of at least 1, got 0"),
        ({"index": "IVF9,Nonsense"}, "an index and parameters that faiss can build, got 'IVF9,Nonsense'"),
        (
            {"index": "ivf", "distance": SNRDistance()},
            "Euclidean distance, cosine or dot product for index 'ivf', got SNRDistance",
        ),
    ):
        with pytest.raises(UsageError, match=f"^expected {says}"):
            build_gallery(bank, tmp_path / "g", **given)
    assert not list(tmp_path.iterdir())
    Gallery(bank, "ivf").save(tmp_path / "saved")
    with pytest.raises(ExistingFileError, match=r"^expected a new folder or one that build_gallery began, got .*saved"):
        build_gallery(bank, tmp_path / "saved", "ivf")


@pytest.mark.parametrize("size", [500, 3_000, 20_000, 70_000])
def test_a_full_disk_is_named_and_the_same_call_goes_on(size: int, tmp_path: Path):
    """Files end at so many bytes: the index, a shard, the lists and the floats are the first that are too large."""
    bank = clustered(1600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*, got .*File too large") as refused:
            build_gallery(bank, tmp_path / "g", "ivfpq")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wanted = {500: "index.faiss", 3_000: "index.faiss", 20_000: "lists.bin", 70_000: "floats.npy"}
    assert wanted[size] in str(refused.value)
    assert_same(build_gallery(bank, tmp_path / "g", "ivfpq"), Gallery(bank, "ivfpq"))


def test_what_is_mapped_is_not_changed(tmp_path: Path):
    gallery = build_gallery(clustered(700), tmp_path / "g", "ivfpq")
    files = {path.name: path.read_bytes() for path in (tmp_path / "g").glob("*.*")}
    for change, says in (
        (lambda: gallery.add(clustered(9)), "add to, got one whose .* from .*g; build it again with all references"),
        (lambda: gallery.remove([3]), "remove from, got one whose .* from .*g; build it again without them"),
        (lambda: gallery.save(tmp_path / "other"), "save, got one whose .* from .*g; copy that folder"),
    ):
        with pytest.raises(UsageError, match=f"^expected a gallery in memory to {says}"):
            change()
    assert {path.name: path.read_bytes() for path in (tmp_path / "g").glob("*.*")} == files
    shutil.copytree(tmp_path / "g", tmp_path / "copied")
    shutil.rmtree(tmp_path / "g")
    assert_same(Gallery.load(tmp_path / "copied"), Gallery(clustered(700), "ivfpq"))


@pytest.mark.parametrize("name", ["lists.bin", "floats.npy"])
def test_files_that_are_cut_off_or_missing_are_named(name: str, tmp_path: Path):
    build_gallery(clustered(700), tmp_path / "g", "ivfpq")
    path = tmp_path / "g" / name
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(UsageError, match=f"^expected .*{name}.* got .*; build the gallery again"):
            Gallery.load(tmp_path / "g")
    path.unlink()
    with pytest.raises(MissingFileError, match=f"^expected .*{name}, got no such file; build the gallery again"):
        Gallery.load(tmp_path / "g")
