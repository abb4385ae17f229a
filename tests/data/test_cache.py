"""The loaders' cache: hits, misses, replaced, damaged and unfinished entries, and what a memory-mapped load reads."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pml_fewshot.checks import UsageError
from pml_fewshot.data import cache
from pml_fewshot.data.cache import Source, cached_sets
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.io.atomic import CannotWriteError
from tests.data.loading import entries


class Made:
    """A source of noise images in two sets that counts how often it is read, and fails after `fail_at` of them."""

    def __init__(self, count: int = 5, fail_at: int | None = None, seed: int = 0) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 1, 3, 4), dtype=np.uint8)
        self.labels = [min(i // 2, 2) for i in range(count)]
        self.fail_at = fail_at
        self.reads = 0
        self.notes = {"yielded": 0}

    def __call__(self) -> Source:
        self.reads += 1
        return Source(self.items(), len(self.images), (1, 3, 4), {"train": ["ä", "b"], "test": ["c"]}, self.notes)

    def items(self) -> Iterator[tuple[np.ndarray, int]]:
        for i, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            if i == self.fail_at:
                raise PermissionError(13, "not yours", "a.png")
            self.notes["yielded"] += 1
            yield image, label


def load(folder: Path | None, read: Made, *files: Path, source: Any = (), memory_map: bool = False) -> Any:
    return cached_sets("set", source, files, read, folder, memory_map)[0]


def images(sets: dict[str, FewShotDataset]) -> np.ndarray:
    return np.concatenate([part.images.numpy() for part in sets.values()])


def test_what_is_read_once_comes_back_the_same_without_reading(tmp_path: Path):
    made, folder = Made(), tmp_path / "new" / "cache"
    for memory_map in (False, False, True, True):
        sets, notes = cached_sets("set", ("here", 28), [], made, folder, memory_map)
        np.testing.assert_array_equal(images(sets), made.images)
        assert {name: part.class_names for name, part in sets.items()} == {"train": ("ä", "b"), "test": ("c",)}
        assert [part.labels.tolist() for part in sets.values()] == [[0, 0, 1, 1], [0]]
        assert notes == {"yielded": 5}  # filled while the items were read
        for part in sets.values():
            assert part.recorded_checksum == part.checksum(recompute=True)
            part.images.zero_()  # writes never reach the file
    assert made.reads == 1
    assert len(entries(folder)) == 1


def test_a_changed_file_or_format_replaces_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    a, b, made = tmp_path / "a", tmp_path / "b", Made()

    def reads(*files: Path, source: tuple[object, ...] = ("ab", "c")) -> int:
        load(tmp_path / "cache", made, *files, source=source)
        return made.reads

    for file in (a, b):
        file.write_text("one")
        os.utime(file, ns=(10, 10))
    assert reads(a, b, source=("a", "bc")) == 1  # alike when joined: it stands beside the other
    assert reads(a, b) == reads(b, a) == 2
    assert reads(a) == 3
    os.utime(a, ns=(10, 11))
    assert reads(a) == 4
    a.write_text("longer")
    os.utime(a, ns=(10, 11))
    assert reads(a) == 5
    a.rename(tmp_path / "c")
    assert reads(tmp_path / "c") == 6
    monkeypatch.setattr(cache, "FORMAT_VERSION", cache.FORMAT_VERSION + 1)
    assert reads(tmp_path / "c") == 7
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("fail_at", [0, 3])
def test_what_the_source_raises_passes_and_leaves_the_cache_as_it_was(tmp_path: Path, fail_at: int):
    old = Made()
    load(tmp_path, old)
    before = entries(tmp_path)
    with pytest.raises(PermissionError, match=r"not yours.*a\.png") as error:
        load(tmp_path, Made(fail_at=fail_at), Path(__file__))
    assert not isinstance(error.value, CannotWriteError)  # it is the source that cannot be read
    assert entries(tmp_path) == before
    load(tmp_path, old)
    assert old.reads == 1


@pytest.mark.parametrize("limit", [10_000, 12_120])  # of 12,128 bytes: the last image but in part
def test_a_full_disk_is_one_error_and_costs_no_older_entry(tmp_path: Path, limit: int):
    old, new = Made(), Made(count=1000)
    load(tmp_path, old)
    before, limits = entries(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # no file may grow above it
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*set-.*, got .*File too large"):
            load(tmp_path, new, Path(__file__))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == before
    np.testing.assert_array_equal(images(load(tmp_path, new, Path(__file__))), new.images)
    (tmp_path / "file").touch()
    with pytest.raises(CannotWriteError, match=r"^expected to write .*file/cache"):
        load(tmp_path / "file" / "cache", new)


@pytest.mark.parametrize("signal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_killed_process_left_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: bool):
    if signal:
        code = "import os, sys; from tests.data.test_cache import *; Made.items = lambda _: os.kill(os.getpid(), 9)"
        command = [sys.executable, "-c", f"{code}; load(Path(sys.argv[1]), Made())", str(tmp_path)]
        assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == -9
        assert list(tmp_path.glob(".*-lock"))  # which nobody holds
    else:
        with monkeypatch.context() as patch:
            patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # as with a kill, nothing is removed
            with pytest.raises(PermissionError):
                load(tmp_path, Made(fail_at=2))
        assert [name[0] for name in entries(tmp_path)] == ["."]
    made = Made()
    np.testing.assert_array_equal(images(load(tmp_path, made)), made.images)
    assert len(entries(tmp_path)) == 1


def test_of_two_that_want_the_same_entry_one_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second asks while the first builds, and it is the lock that it waits for: no clock is involved."""
    building, waiting = threading.Event(), threading.Event()

    class Slow(Made):
        def items(self) -> Iterator[tuple[np.ndarray, int]]:
            building.set()
            waiting.wait()
            yield from super().items()

    class Lock(cache.FileLock):
        def acquire(self) -> object:  # type: ignore[override]
            if building.is_set():
                waiting.set()
            return super().acquire()

    monkeypatch.setattr(cache, "FileLock", Lock)
    first, second = Slow(), Made(seed=1)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(load, tmp_path, first)]
        building.wait()
        results.append(pool.submit(load, tmp_path, second))
    assert (first.reads, second.reads) == (1, 0)
    for result in results:
        np.testing.assert_array_equal(images(result.result()), first.images)


def test_a_memory_mapped_entry_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """B6: its bytes are neither compared with the checksum nor is that computed again for whom asks the sets for it."""
    expected = [part.checksum(recompute=True) for part in load(tmp_path, Made()).values()]
    hashed, digest = [], hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda data, **options: hashed.append(data) or digest(data, **options))
    assert [part.checksum() for part in load(tmp_path, Made(), memory_map=True).values()] == expected
    assert len(hashed) == 2  # the two parts of the entry's name


def test_one_changed_byte_of_the_images_is_seen_at_once_or_when_asked(tmp_path: Path):
    right = load(tmp_path, Made())["test"].checksum()
    (damaged,) = tmp_path.glob("*/images.npy")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UsageError, match=r"expected a whole cache entry in .*other images.*; delete that folder"):
        load(tmp_path, Made())
    part = load(tmp_path, Made(), memory_map=True)["test"]
    assert (part.checksum(), part.checksum(recompute=True) == right) == (right, False)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "another", "pickle"])
@pytest.mark.parametrize("file", ["images.npy", "rest.safetensors"])
def test_a_damaged_entry_is_named(tmp_path: Path, file: str, damage: str, memory_map: bool):
    load(tmp_path, Made())
    (path,) = tmp_path.glob(f"*/{file}")
    content = path.read_bytes()
    another = content.replace(b"(5, 1, 3, 4)", b"(5, 1, 2, 4)").replace(b"b", b"x")  # shape or class name
    path.write_bytes({"empty": b"", "cut": content[:-1], "another": another}.get(damage, content))
    if damage == "pickle":
        with path.open("wb") as opened:
            np.save(opened, np.array([object()]), allow_pickle=True)
    elif damage == "missing":
        path.unlink()
    with pytest.raises(UsageError, match=r"expected a whole cache entry in .*; delete that folder and run again"):
        load(tmp_path, Made(), memory_map=memory_map)


def test_the_default_folder_follows_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = {"PML_FEWSHOT_CACHE": "own", "XDG_CACHE_HOME": "xdg/pml_fewshot", "HOME": ".cache/pml_fewshot"}
    for variable, folder in folders.items():
        monkeypatch.setenv(variable, str(tmp_path / folder.removesuffix("pml_fewshot").removesuffix(".cache/")))
    for variable, folder in folders.items():
        load(None, Made())
        assert len(entries(tmp_path / folder)) == 1
        monkeypatch.delenv(variable)
