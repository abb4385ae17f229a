"""The loaders' cache: hits, misses, replaced, damaged and unfinished entries, and what a memory-mapped load reads."""

import hashlib
import os
import re
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
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.data import cache
from pml_fewshot.data.cache import Source, Stored, cached_images
from pml_fewshot.data.dataset import FewShotDataset, digests_of
from pml_fewshot.io.atomic import CannotWriteError
from tests.data.loading import entries


class Made:
    """A source of noise images that counts how often it is read, and fails after `fail_at` of them."""

    def __init__(self, count: int = 5, fail_at: int | None = None, seed: int = 0, dtype: type = np.uint8) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 1, 3, 4)).astype(dtype)
        self.fail_at = fail_at
        self.reads = 0
        self.notes = {"yielded": 0}

    def __call__(self) -> Source:
        self.reads += 1
        return Source(self.items(), len(self.images), (1, 3, 4), self.notes, self.images.dtype)

    def items(self) -> Iterator[np.ndarray]:
        for i, image in enumerate(self.images):
            if i == self.fail_at:
                raise PermissionError(13, "not yours", "a.png")
            self.notes["yielded"] += 1
            yield image


def load(folder: Path | None, read: Made, *files: Path, source: Any = (), memory_map: bool = False) -> Stored:
    return cached_images("set", source, files, read, folder, memory_map)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_read_once_comes_back_the_same_without_reading(tmp_path: Path, dtype: type):
    made, folder = Made(dtype=dtype), tmp_path / "new" / "cache"
    for memory_map in (False, False, True, True):
        images, digests, notes = load(folder, made, source=("here", 28), memory_map=memory_map)
        np.testing.assert_array_equal(images.numpy(), made.images)
        assert digests.tolist() == digests_of(made.images).tolist()
        assert notes == {"yielded": 5}  # filled while the items were read
        images.zero_()  # writes never reach the file
    assert made.reads == 1
    assert len(entries(folder)) == 1


def test_equal_images_have_equal_digests_and_no_others():
    images = Made(count=50).images
    images[7] = images[3]
    digests = digests_of(images).tolist()
    assert digests[7] == digests[3]
    assert len(set(digests)) == 49
    expected = hashlib.blake2b(images[0].tobytes(), digest_size=8).digest()
    assert digests[0] == int.from_bytes(expected, "little", signed=True)


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
    (tmp_path / "c").write_text("lOnger")  # of the same size and time
    os.utime(tmp_path / "c", ns=(10, 11))
    assert reads(tmp_path / "c") == 8
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
def test_where_the_cache_cannot_be_written_the_images_are_in_memory_and_an_older_entry_stays(
    tmp_path: Path, limit: int
):
    old, new = Made(), Made(count=1000)
    load(tmp_path, old)
    before, limits = entries(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # no file may grow above it
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*set-.*, got .*File too large"):
            load(tmp_path, new, Path(__file__), memory_map=True)  # of images that may not fit into memory
        with pytest.warns(UserWarning, match=r"the cache in .* cannot keep .* of set .*File too large.*PML_FEWSHOT_CA"):
            found = load(tmp_path, new, Path(__file__))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == before
    for each in (found, load(tmp_path, new, Path(__file__))):
        np.testing.assert_array_equal(each.images.numpy(), new.images)
        assert each.digests.tolist() == digests_of(new.images).tolist()
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"the cache in .*file/cache cannot keep the images of set"):
        assert len(load(tmp_path / "file" / "cache", new).images) == 1000


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
    np.testing.assert_array_equal(load(tmp_path, made).images.numpy(), made.images)
    assert len(entries(tmp_path)) == 1


def test_of_two_that_want_the_same_entry_one_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second asks while the first builds, and it is the lock that it waits for: no clock is involved."""
    building, waiting = threading.Event(), threading.Event()

    class Slow(Made):
        def items(self) -> Iterator[np.ndarray]:
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
        np.testing.assert_array_equal(result.result().images.numpy(), first.images)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


OTHER = r"expected a whole cache entry in .*other images.*; delete that folder"


def test_one_changed_byte_of_the_images_is_seen_at_once_or_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load(tmp_path, Made())
    (damaged,) = tmp_path.glob("*/images.npy")
    flip_last_byte(damaged)
    monkeypatch.setattr(cache, "CHECKED_BYTES", 60)
    with pytest.raises(UsageError, match=OTHER):
        load(tmp_path, Made())
    stored = load(tmp_path, Made(), memory_map=True)  # which is not read through
    part = FewShotDataset(stored.images, [0, 0, 1, 1, 1])
    part.digests = stored.digests
    whole = FewShotDataset(Made().images, [0, 0, 1, 1, 1]).checksum()
    assert part.checksum() == whole
    assert part.checksum(recompute=True) != whole
    monkeypatch.setattr(cache, "CHECKED_BYTES", 59)  # nor are many images
    assert torch.equal(load(tmp_path, Made()).images, stored.images)


@pytest.mark.parametrize("memory_map", [False, True])
def test_what_the_disk_lost_of_a_new_entry_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_map: bool):
    monkeypatch.setattr(cache, "fsync", lambda path: flip_last_byte(path) if path.name == "images.npy" else None)
    with pytest.raises(UsageError, match=OTHER):
        load(tmp_path, Made(), memory_map=memory_map)


@pytest.mark.parametrize("count", [1, 17, 18])
def test_images_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.setattr(cache, "WRITE_BYTES", 24)  # of 12 bytes each: in threes
    made = Made(count=count)
    images, digests, _ = load(tmp_path, made)
    np.testing.assert_array_equal(images.numpy(), made.images)
    assert digests.tolist() == digests_of(made.images).tolist()


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "another", "pickle"])
@pytest.mark.parametrize("file", ["images.npy", "rest.safetensors"])
def test_a_damaged_entry_is_named(tmp_path: Path, file: str, damage: str, memory_map: bool):
    load(tmp_path, Made())
    (path,) = tmp_path.glob(f"*/{file}")
    content = path.read_bytes()
    another = content.replace(b"(5, 1, 3, 4)", b"(5, 1, 2, 4)").replace(b"yielded", b"xielded")  # shape or a note
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


def test_the_command_lists_entries_and_removes_those_named_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("first", "second"):
        cached_images(name, ("/photos", 28), [], Made(), tmp_path)

    def shown(*arguments: str) -> str:
        cache.main(["--cache-dir", str(tmp_path), *arguments])
        return capsys.readouterr().out

    assert re.search(r"^first-\w+-\w+  0 MiB  used \d{4}-\d\d-\d\d  /photos, 28$", shown(), re.MULTILINE)
    with pytest.raises(SystemExit):
        shown("--empty", "third")
    assert "got 'third'" in capsys.readouterr().err
    assert "removed  first-" in shown("--empty", "first")
    assert [name.partition("-")[0] for name in entries(tmp_path)] == ["second"]
    (tmp_path / entries(tmp_path)[0] / "rest.safetensors").write_bytes(b"")
    assert "damaged" in shown()
    assert f"1 entries, 0 MiB, in {tmp_path}" in shown("--empty")
    assert entries(tmp_path) == []
    assert "0 entries" in shown()


def test_the_command_tells_damaged_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("first", "second", "third"):
        cached_images(name, (), [], Made(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}

    def shown(*names: str) -> list[str]:
        cache.main(["--cache-dir", str(tmp_path), "--verify", *names])
        return re.findall(r"^(.*?)-\w+-\w+  ", capsys.readouterr().out, re.MULTILINE)

    assert shown() == ["whole  first", "whole  second", "whole  third"]
    assert times == {path: path.stat().st_mtime_ns for path in times}  # which is no use of them
    flip_last_byte(next(tmp_path.glob("second-*/images.npy")))
    next(tmp_path.glob("third-*/rest.safetensors")).unlink()
    assert shown("fir") == ["whole  first"]
    with pytest.raises(SystemExit, match="1"):
        shown()
    said = capsys.readouterr()
    assert re.search(r"^whole  f.*\ndamaged \(other images.*\)  second-.*\ndamaged \(expected .*\)  third-", said.out)
    assert "2 damaged" in said.err
    with pytest.raises(SystemExit, match="2"):
        shown("fourth")


def test_what_killed_processes_left_is_removed_and_what_is_being_built_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in (".tmp-first-0123-", ".tmp-second-0123-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest.safetensors").touch()
    with cache.FileLock(tmp_path / ".second-0123-lock"):
        cache.main(["--cache-dir", str(tmp_path)])
        assert capsys.readouterr().out.startswith("0 entries")
        cache.main(["--cache-dir", str(tmp_path), "--empty"])
    assert sorted(capsys.readouterr().out.splitlines())[1:] == [
        "in use  .tmp-second-0123-",
        "removed  .tmp-first-0123-",
    ]
    assert entries(tmp_path) == [".tmp-second-0123-"]


def test_entries_are_as_readable_as_the_users_other_files(tmp_path: Path):
    load(tmp_path, Made())
    (tmp_path / "other").touch()
    modes = {path.name: path.stat().st_mode for path in [*tmp_path.glob("set-*/*"), tmp_path / "other"]}
    assert len(modes) == 3
    assert len(set(modes.values())) == 1
