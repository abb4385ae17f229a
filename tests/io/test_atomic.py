"""Atomic writes: whatever fails, the old file stays whole, nothing is left beside it, and the error is one of ours."""

import errno
import os
import resource
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pml_fewshot import EmbeddingBank, UsageError, export_embedder, save_bank
from pml_fewshot.io.atomic import CannotWriteError, atomic_write, translate_write_errors, write_text
from pml_fewshot.io.checkpoint import save_checkpoint

LARGE = torch.zeros(30_000, 1)


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file may grow above 20 kB: the effect of a full disk without a disk of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        lambda path: save_checkpoint(path, {"weight": LARGE}),
        lambda path: export_embedder(path, torch.nn.Linear(300, 300)),
        lambda path: save_bank(path, EmbeddingBank(LARGE, torch.arange(len(LARGE)))),
    ],
    ids=["text", "checkpoint", "embedder", "bank"],
)
def test_full_disk_leaves_the_old_file_and_nothing_beside_it(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    write_text(path, "old")
    with pytest.raises(CannotWriteError, match=r"^expected to write .*kept.*, got .*File too large.*; free space"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.usefixtures("_small_files")
def test_a_database_that_cannot_grow_is_the_same_error_and_a_wrong_query_and_our_own_pass(tmp_path: Path) -> None:
    grow = "CREATE TABLE t (a); INSERT INTO t VALUES (hex(zeroblob(100000)));"
    with closing(sqlite3.connect(tmp_path / "logs.db")) as connection:
        with pytest.raises(CannotWriteError, match=r"logs\.db"), translate_write_errors(tmp_path / "logs.db"):
            connection.executescript(grow)
        with pytest.raises(sqlite3.OperationalError, match="no such table"), translate_write_errors(tmp_path):
            connection.execute("SELECT * FROM nowhere")
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    with pytest.raises(CannotWriteError, match="disk is full"), translate_write_errors(tmp_path):
        raise full
    with pytest.raises(UsageError, match="expected mine"), translate_write_errors(tmp_path):
        raise UsageError("expected mine")


@pytest.fixture
def _not_root() -> Iterator[None]:
    """The system refuses root nothing: be nobody for a while."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    yield
    os.seteuid(before)


@pytest.mark.usefixtures("_not_root")
def test_folders_that_cannot_be_written_are_the_same_error() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o500)
        with pytest.raises(CannotWriteError, match="Permission denied"):
            write_text(Path(folder) / "file", "x")
        with pytest.raises(CannotWriteError, match="No such file"):
            export_embedder(Path(folder) / "gone" / "file", torch.nn.Linear(1, 1))


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_other_errors_pass_and_leave_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_killed_process_left_is_overwritten_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "thesis")
    write_text(tmp_path / "file", "whole")
    (tmp_path / ".file.tmp").write_text("half of an old one, and longer")
    write_text(tmp_path / "file", "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]
    assert (tmp_path / "file").read_text() == "again"
    assert (tmp_path / "thesis").read_text() == "mine"


def test_the_first_error_is_shown_where_cleaning_up_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CannotWriteError, match=r"^expected to write .*file, got .*Read-only file system"):
        write_text(tmp_path / "file", "text")


def test_the_bytes_are_on_disk_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append("rename"), real_replace(old, new))[1])
    write_text(tmp_path / "file", "text")
    assert events == ["fsync", "rename", "fsync"]  # the file, its name, the folder that has the name
