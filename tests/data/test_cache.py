"""The loaders' cache: hits, misses, replaced and failed entries."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_fewshot.atomic import CannotWriteError
from pml_fewshot.data import cache
from pml_fewshot.data.cache import Source, cached_images, default_cache_dir, files_state


class Made:
    """A source of `count` noise images that counts how often it is read, and fails after `fail_at` of them."""

    def __init__(self, count: int = 5, announced: int | None = None, fail_at: int | None = None, seed: int = 0) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 1, 3, 4), dtype=np.uint8)
        self.labels = [7 * i % 3 for i in range(count)]
        self.announced = count if announced is None else announced
        self.fail_at = fail_at
        self.reads = 0
        self.yielded = 0

    def __call__(self) -> Source:
        self.reads += 1
        return Source(self.items(), self.announced, (1, 3, 4), lambda: {"yielded": self.yielded, "name": "Ωmega"})

    def items(self) -> Iterator[tuple[np.ndarray, int]]:
        for i, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            if i == self.fail_at:
                raise RuntimeError("the disk is on fire")
            self.yielded += 1
            yield image, label


def entries(folder: Path) -> list[str]:
    """Also hidden ones, but for the locks."""
    names = os.listdir(folder) if folder.exists() else []  # noqa: PTH208
    return sorted(name for name in names if not name.endswith("-lock"))


def test_what_is_read_once_comes_back_the_same_without_reading(tmp_path: Path):
    made = Made()
    cold = cached_images("set", ("here", 28), "1", made, tmp_path / "new" / "cache")
    warm = cached_images("set", ("here", 28), "1", made, tmp_path / "new" / "cache")
    assert made.reads == 1
    for cached in (cold, warm):
        assert cached.images.dtype == torch.uint8
        assert cached.labels.dtype == torch.int64
        np.testing.assert_array_equal(cached.images.numpy(), made.images)
        assert cached.labels.tolist() == made.labels
        assert cached.about == {"yielded": 5, "name": "Ωmega"}  # asked after the last item
    assert len(entries(tmp_path / "new" / "cache")) == 1


def test_fewer_items_than_announced_leave_no_blank_images(tmp_path: Path):
    made = Made(count=3, announced=10)
    cached = cached_images("set", (), "1", made, tmp_path)
    np.testing.assert_array_equal(cached.images.numpy(), made.images)
    assert len(cached.labels) == 3


def test_another_state_replaces_the_entry_and_another_source_stands_beside_it(tmp_path: Path):
    first = Made(seed=0)
    cached_images("set", ("a",), "1", first, tmp_path)
    cached_images("set", ("b",), "1", Made(), tmp_path)
    cached_images("other", ("a",), "1", Made(), tmp_path)
    before = entries(tmp_path)
    assert len(before) == 3
    changed = Made(seed=1)
    cached = cached_images("set", ("a",), "2", changed, tmp_path)
    np.testing.assert_array_equal(cached.images.numpy(), changed.images)
    assert len(entries(tmp_path)) == 3
    assert len(set(before) & set(entries(tmp_path))) == 2
    cached_images("set", ("a",), "1", first, tmp_path)
    assert first.reads == 2


def test_sources_that_read_alike_when_joined_are_still_two(tmp_path: Path):
    cached_images("set", ("ab", "c"), "1", Made(), tmp_path)
    cached_images("set", ("a", "bc"), "1", Made(), tmp_path)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("fail_at", [0, 3])
def test_a_failure_leaves_nothing_behind_and_the_old_entry_as_it_was(tmp_path: Path, fail_at: int):
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        cached_images("set", (), "1", Made(fail_at=fail_at), tmp_path)
    assert entries(tmp_path) == []
    old = Made()
    cached_images("set", (), "1", old, tmp_path)
    before = entries(tmp_path)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        cached_images("set", (), "2", Made(fail_at=fail_at), tmp_path)
    assert entries(tmp_path) == before
    cached_images("set", (), "1", old, tmp_path)
    assert old.reads == 1


def test_a_read_that_fails_at_once_leaves_nothing_behind(tmp_path: Path):
    def read() -> Source:
        raise ValueError("no such set")

    with pytest.raises(ValueError, match="no such set"):
        cached_images("set", (), "1", read, tmp_path)
    assert entries(tmp_path) == []


def test_a_full_disk_is_one_error_before_anything_is_decoded_and_leaves_nothing_behind(tmp_path: Path):
    old, new = Made(), Made(count=1000)
    cached_images("set", (), "1", old, tmp_path)
    before, limits = entries(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow above it
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*set-.*, got .*File too large"):
            cached_images("set", (), "2", new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert new.yielded == 0
    assert entries(tmp_path) == before
    cached_images("set", (), "1", old, tmp_path)
    assert old.reads == 1
    np.testing.assert_array_equal(cached_images("set", (), "2", new, tmp_path).images.numpy(), new.images)


@pytest.mark.parametrize("folder", ["/sys", "/sys/pml_fewshot_cache"])  # where root itself may write nothing
def test_a_read_only_folder_is_one_error(folder: str):
    made = Made()
    with pytest.raises(CannotWriteError, match=r"^expected to write /sys"):
        cached_images("set", (), "1", made, folder)
    assert made.reads == 0


def test_what_the_source_cannot_read_is_no_error_of_writing(tmp_path: Path):
    def items() -> Iterator[tuple[np.ndarray, int]]:
        yield np.zeros((1, 3, 4), np.uint8), 0
        raise PermissionError(13, "not yours", "a.png")

    with pytest.raises(PermissionError, match=r"not yours.*a\.png") as error:
        cached_images("set", (), "1", lambda: Source(items(), 2, (1, 3, 4), dict), tmp_path)
    assert not isinstance(error.value, CannotWriteError)
    assert entries(tmp_path) == []


def test_killed_while_it_removes_an_old_entry_it_leaves_none_that_looks_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(path: Path, ignore_errors: bool = False) -> None:
        (path / "labels.npy").unlink()
        raise KeyboardInterrupt

    old = Made()
    cached_images("set", (), "1", old, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_images("set", (), "2", Made(seed=1), tmp_path)
    np.testing.assert_array_equal(cached_images("set", (), "1", old, tmp_path).images.numpy(), old.images)
    assert old.reads == 2
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    ("images", "announced"),
    [
        (np.zeros((3, 1, 3, 4), np.uint8), 2),
        (np.zeros((2, 1, 3, 5), np.uint8), 2),
        (np.zeros((2, 1, 3, 4), np.float32), 2),
    ],
)
def test_images_other_than_announced_are_refused(images: np.ndarray, announced: int, tmp_path: Path):
    source = Source(((image, 0) for image in images), announced, (1, 3, 4), dict)
    with pytest.raises(ValueError, match=r"expected 2 images \(1, 3, 4\) of bytes, got "):
        cached_images("set", (), "1", lambda: source, tmp_path)
    assert entries(tmp_path) == []


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from pml_fewshot.data.cache import Source, cached_images
cache, number, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def items():
    (cache / f"built-by-{number}").touch()
    time.sleep(seconds)
    yield np.full((1, 3, 4), number, np.uint8), 0
cached = cached_images("set", (), "1", lambda: Source(items(), 1, (1, 3, 4), dict), cache)
print(int(cached.images.max()))
"""


def builder(cache: Path, number: int, seconds: float) -> subprocess.Popen[str]:
    cache.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILDER, str(cache), str(number), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def test_of_two_processes_that_want_the_same_entry_one_builds_it_and_a_killed_one_leaves_the_cache_usable(
    tmp_path: Path,
):
    with builder(tmp_path, 1, 600) as killed:
        wait_for(tmp_path / "built-by-1")
        with builder(tmp_path, 2, 0.5) as second, builder(tmp_path, 3, 0.5) as third:
            killed.kill()
            seen = {process.communicate(timeout=60)[0].strip() for process in (second, third)}
    builders = {path.name[-1] for path in tmp_path.glob("built-by-*")}
    assert builders - {"1"} == seen  # one of the two, whose images both have
    assert len(seen) == 1
    assert [name for name in entries(tmp_path) if not name.startswith(("built-by", "set-"))] == []


def test_writes_to_the_images_never_reach_the_file(tmp_path: Path):
    made = Made()
    cached_images("set", (), "1", made, tmp_path).images.zero_()
    np.testing.assert_array_equal(cached_images("set", (), "1", made, tmp_path).images.numpy(), made.images)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("images.npy", None),
        ("labels.npy", None),
        ("about.json", None),
        ("images.npy", b"half of"),
        ("labels.npy", b"half of"),
        ("about.json", b'{"half": '),
        ("about.json", b"\xff\xfe"),
        ("labels.npy", b""),
        ("images.npy", b""),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, file: str, content: bytes | None):
    cached_images("set", (), "1", Made(), tmp_path)
    (damaged,) = tmp_path.glob(f"*/{file}")
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole cache entry in .*; delete that folder and run again"):
        cached_images("set", (), "1", Made(), tmp_path)


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "about.json"])
@pytest.mark.parametrize("place", [-1, -9])
def test_one_changed_byte_is_seen(tmp_path: Path, file: str, place: int):
    cached_images("set", (), "1", Made(), tmp_path)
    (damaged,) = tmp_path.glob(f"*/{file}")
    content = bytearray(damaged.read_bytes())
    content[place] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole cache entry in .*; delete that folder and run again"):
        cached_images("set", (), "1", Made(), tmp_path)


def test_changed_facts_are_seen(tmp_path: Path):
    cached_images("set", (), "1", Made(), tmp_path)
    (about,) = tmp_path.glob("*/about.json")
    held = json.loads(about.read_text())
    held["facts"]["name"] = "another"
    about.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="expected the checksums as written"):
        cached_images("set", (), "1", Made(), tmp_path)


def test_an_entry_of_an_older_layout_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "LAYOUT", 1)
    cached_images("set", ("a",), "1", Made(), tmp_path)
    cached_images("set", ("b",), "1", Made(), tmp_path)
    monkeypatch.setattr(cache, "LAYOUT", 2)
    cached_images("set", ("a",), "1", Made(), tmp_path)
    assert len(entries(tmp_path)) == 2


def test_pickles_in_an_entry_are_not_loaded(tmp_path: Path):
    cached_images("set", (), "1", Made(), tmp_path)
    (labels,) = tmp_path.glob("*/labels.npy")
    np.save(labels, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        cached_images("set", (), "1", Made(), tmp_path)


def test_the_state_tells_every_change_of_the_files(tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("two")
    os.utime(a, ns=(10, 10))
    os.utime(b, ns=(10, 10))
    states = [files_state([a, b])]
    assert files_state([b, a]) == states[0]
    states.append(files_state([a]))
    os.utime(a, ns=(10, 11))
    states.append(files_state([a, b]))
    a.write_text("longer")
    os.utime(a, ns=(10, 10))
    states.append(files_state([a, b]))
    a.write_text("one")
    os.utime(a, ns=(10, 10))
    a.rename(tmp_path / "c")
    states.append(files_state([tmp_path / "c", b]))
    assert len(set(states)) == 5
    with pytest.raises(FileNotFoundError):
        files_state([a])


def test_the_default_folder_follows_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("PML_FEWSHOT_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    cached_images("set", (), "1", Made())
    assert len(entries(tmp_path / "own")) == 1
    monkeypatch.delenv("PML_FEWSHOT_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "pml_fewshot"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "pml_fewshot"
