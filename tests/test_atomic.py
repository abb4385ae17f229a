"""Files written as a whole: a refusal of the system leaves what was there, and is one clear error."""

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
from safetensors.torch import save_file

from pml_fewshot.atomic import CannotWriteError, whole_file, write_text, writing


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file may grow above 20 kB: what a full disk does, and a limit that needs no disk of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def to_python_file(path: Path) -> None:
    path.write_bytes(bytes(100_000))


def by_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"weight": torch.zeros(100_000)}, file)


def by_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(100_000)}, path)


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("write", [to_python_file, by_torch, by_safetensors])
def test_full_disk_leaves_the_old_file_and_nothing_beside_it(write: Callable[[Path], None], tmp_path: Path) -> None:
    write_text(tmp_path / "kept", "old")
    with (
        pytest.raises(CannotWriteError, match=r"^expected to write .*kept, got .*File too large.*free space"),
        whole_file(tmp_path / "kept") as unfinished,
    ):
        write(unfinished)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


@pytest.mark.usefixtures("_small_files")
def test_a_database_that_cannot_grow_is_the_same_error(tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "logs.db")) as connection,
        pytest.raises(CannotWriteError, match=r"logs\.db"),
        writing(tmp_path / "logs.db"),
    ):
        connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (hex(zeroblob(100000)));")


def test_folder_that_is_not_there_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "gone" / "file", "text")


@pytest.fixture
def _not_root() -> Iterator[None]:
    """The system refuses root nothing: be nobody for a while."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    yield
    os.seteuid(before)


@pytest.mark.usefixtures("_not_root")
def test_read_only_folder_is_the_same_error() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o500)
        with pytest.raises(CannotWriteError, match="Permission denied"):
            write_text(Path(folder) / "file", "text")


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as unfinished:
        print(unfinished.write_text("half") / 0)
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_process_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.unfinished").write_text("half of what once was, and longer")
    write_text(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_the_first_refusal_is_told_where_the_clean_up_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has become read-only refuses everything."""

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CannotWriteError, match=r"^expected to write .*file, got .*Read-only file system"):
        write_text(tmp_path / "file", "text")


def test_a_link_at_the_unfinished_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / ".table.csv.unfinished").symlink_to(tmp_path / "thesis")
    write_text(tmp_path / "table.csv", "numbers")
    assert (tmp_path / "thesis").read_text() == "mine"
    assert (tmp_path / "table.csv").read_text() == "numbers"
    assert not (tmp_path / "table.csv").is_symlink()
