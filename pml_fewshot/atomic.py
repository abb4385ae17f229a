"""Files that are there as a whole or not at all: a reader finds the old one or the new one, never half of one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

SAID = ("I/O error", "disk is full", "readonly", "unable to open", "locked")


class CannotWriteError(OSError):
    """The system refused to write a file: the disk is full or broken, the folder read-only."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives the path to write to instead; what was written there takes the place of `path` when it is whole.

    The name beside it, `.<name>.unfinished`, is always the same: what a killed process left is written over next time.
    The bytes are on the disk before the rename, or a power cut could leave an empty file.

    Raises:
        CannotWriteError: the system refused to write; the file at `path` is as it was.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with writing(path):
            unfinished.unlink(missing_ok=True)  # a link there would lead elsewhere
            yield unfinished
            to_disk(unfinished)
            unfinished.replace(path)
            to_disk(path.parent)
    except BaseException:
        with suppress(OSError):  # a read-only disk refuses this too, and the first refusal is the one to be told
            unfinished.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk, where they outlast a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text as a whole file, in UTF-8."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says against a write to `path`, through whatever library, into a CannotWriteError."""
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise CannotWriteError(
            f"expected to write {path}, got {reason}; free space, make the folder writable or close what holds "
            "the file, and go on (a run with --resume): what was there before is unharmed"
        ) from error


def _refusal(error: BaseException) -> str | None:
    """What the system said, if that is what the error comes down to.

    torch.save hides an OSError behind a RuntimeError of its own, SQLite and safetensors have only words for it.
    """
    cause: BaseException | None = error
    while cause is not None:
        words = type(cause).__module__.startswith("sqlite3") or isinstance(cause, SafetensorError)
        refused = any(said in str(cause) for said in SAID)
        if (isinstance(cause, OSError) and cause.errno in REFUSALS) or (words and refused):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None
