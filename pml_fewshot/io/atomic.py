"""Atomic file writes: a reader finds the old version or the new one, never half of one."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pml_fewshot.checks import UsageError

# Those of SQLite's many OperationalErrors (a missing table is one too) that are the system's fault.
SQLITE_CODES = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
}


class CannotWriteError(UsageError, OSError):
    """The system refused to write a file: the disk is full or broken, the folder read-only or missing."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames that file to `path` at the end.

    The temporary file, `.<name>.tmp` next to `path`, always has the same name, so one left by a killed process is
    overwritten next time. It is flushed to disk before the rename; otherwise a power cut could leave an empty file.

    Raises:
        CannotWriteError: the system refused to write; the file at `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with translate_write_errors(path):
            temporary.unlink(missing_ok=True)  # a link there would lead elsewhere
            temporary.touch()
            mode = temporary.stat().st_mode  # the user's own, because some writers make files that nobody else may read
            yield temporary
            temporary.chmod(mode)
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    except BaseException:
        with suppress(OSError):  # a read-only disk refuses this too, and the first error is the one to show
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk, where they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_write_errors(path: str | Path) -> Iterator[None]:
    """Turns the system's errors, for which SQLite and safetensors have their own classes, into a CannotWriteError.

    Everything within the block should be a write to `path`; our own errors pass unchanged.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        if isinstance(error, sqlite3.OperationalError) and (error.sqlite_errorcode & 0xFF) not in SQLITE_CODES:
            raise
        raise CannotWriteError(
            f"expected to write {path}, got {error}; free space, make the folder writable, name another (of a "
            "run: --run-dir) or close what holds the file, and try again: what was there before is unharmed"
        ) from error
