"""The folder of a run: one process at a time, never written over."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pml_fewshot.atomic import writing
from pml_fewshot.checks import require
from pml_fewshot.provenance import check_config, read_provenance


def choose_run_folder(config: Any, resume: bool) -> Path:
    """Returns the folder for a run: `config.run_dir`, else a new one below runs/<name>/, named by time and seed.

    Raises:
        FileExistsError: not to resume, and the folder holds another run, or anything else.
        ValueError: to resume, and there is no run_dir, something else in it, or the run there has another config.
    """
    given = config.run_dir is not None
    require(not resume or given, "the folder of the run to go on with", "none", "name it with --run-dir")
    folder = config.run_dir or Path("runs") / config.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_seed{config.seed}"
    _check_contents(folder, config, resume)
    return folder


@contextmanager
def sole_writer(folder: Path, config: Any, resume: bool) -> Iterator[None]:
    """Makes the folder and keeps all other processes from writing it.

    The lock is the operating system's: a process that is dead holds none, however it died. When an error comes before
    the first step, what was made goes away again, a new folder too.

    Raises:
        BlockingIOError: another process is writing the folder.
        CannotWriteError: (an OSError) it cannot be made.
    """
    made = not folder.exists()
    before = set() if made or not folder.is_dir() else set(folder.iterdir())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"expected a run folder that no other process writes, got {folder}, which one does; wait for its end, "
                "or name another folder with --run-dir"
            ) from error
    try:
        _check_contents(folder, config, resume)  # again: another process may have been here before the lock was ours
        yield
    except BaseException:
        if not (folder / "last.pt").exists():  # not one step was made: leave nothing that looks like a run
            for new in set(folder.iterdir()) - before - {folder / ".lock"}:
                shutil.rmtree(new) if new.is_dir() else new.unlink()
            if made:
                shutil.rmtree(folder)
        raise
    finally:
        lock.release()


def _check_contents(folder: Path, config: Any, resume: bool) -> None:
    # what is written through a link lies outside of the folder, where nobody expects it
    link = next((file for file in folder.rglob("*") if file.is_symlink()), None) if folder.is_dir() else None
    require(link is None, f"a run folder without links at {folder}", str(link), "replace it by what it leads to")
    about = folder / "config.txt"
    # hidden files are the lock and what a killed process had not finished; config.json is written before config.txt
    foreign = folder.exists() and (
        not folder.is_dir() or any(file.name[0] != "." and file.name != "config.json" for file in folder.iterdir())
    )
    if not resume:
        if foreign:
            raise FileExistsError(
                f"expected a new or empty run folder, got {folder}, which holds another run or other files; name "
                "another with --run-dir, or remove it"
            )
        return
    require(
        about.exists() or not foreign,
        f"a run, an empty folder or none at {folder}",
        "other files",
        "name another folder",
    )
    if about.exists():
        check_config(config, read_provenance(folder), folder)
