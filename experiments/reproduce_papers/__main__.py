"""Compares every method with its paper on real data: trains what is missing and writes the tables of docs/results.

    python -m experiments.reproduce_papers --data-root ../shared/data --list
    python -m experiments.reproduce_papers --data-root ../shared/data --only omniglot/protonet
    python -m experiments.reproduce_papers --data-root ../shared/data --budget-minutes 120

Each training is an ordinary run folder below --folder, one for each method and seed. Running the same command again
skips finished trainings and resumes interrupted ones. Started several times, on machines that share the folder, it
divides the trainings among them. All of the trainings take days on two cores.
"""

import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import tyro
from filelock import FileLock

from experiments.reproduce_papers.papers import ablations, lake_rows, rows_of_papers
from experiments.reproduce_papers.rows import PAPER_SEEDS, Row
from experiments.reproduce_papers.tables import write_tables
from pml_fewshot.checks import LockedError, UsageError, check_choice
from pml_fewshot.experiment.command_line import one_line_errors, program

DOCS = Path(__file__).parents[2] / "docs"
CONFIGS = [row.training for row in (*rows_of_papers(), *ablations())]  # where `pml-fewshot evaluate` finds the configs


def reproduce(
    rows: Sequence[Row],
    folder: Path,
    seeds: Sequence[int],
    data_root: Path | None = None,
    minutes: float | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, str]:
    """Runs the unfinished trainings one after another: the first seed of every row before the second of any.

    Args:
        minutes: after this many the current training is saved, as after Ctrl-C, and no other one starts; None for no
            limit.
        failed: collects the result as it grows, so that an interruption does not lose it.

    Returns:
        The reasons for failures, by the folders of their figures below `folder`.
    """
    failed = {} if failed is None else failed
    with budget(minutes) as over:
        for seed, row in product(seeds, rows):
            if over.is_set():
                break
            name = row.place(folder, seed).relative_to(folder).as_posix()
            print(f"\n{name}", flush=True)
            try:
                row.make(folder, seed, data_root)
            except LockedError:
                print("another process is running it")
            except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost the others' hours)
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
    if over.is_set():
        print(f"\nthe {minutes:g} minutes are up; the same command again continues")
    return failed


@contextmanager
def budget(minutes: float | None) -> Iterator[threading.Event]:
    """Interrupts and ends the block after this many minutes, as SIGTERM does; the event says whether it did."""
    over = threading.Event()
    if minutes is None:
        yield over
        return
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("expected a budget in the main thread, which signals reach, got another; leave minutes out")
    within = threading.Lock()  # held while the alarm rings, and for good once there is nothing to interrupt

    def ring() -> None:
        if within.acquire(blocking=False):
            over.set()
            signal.raise_signal(signal.SIGTERM)
            within.release()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    alarm = threading.Timer(60 * minutes, ring)
    alarm.daemon = True
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        alarm.start()
        yield over
    except KeyboardInterrupt:
        if not over.is_set():
            raise
    finally:
        alarm.cancel()
        within.acquire()
        signal.signal(signal.SIGTERM, before)


def main(
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = PAPER_SEEDS,
    budget_minutes: float | None = None,
    data_root: Path | None = None,
    folder: Path = Path("runs/papers"),
    lake: Path | None = None,
    tables: Path | None = None,
    list_only: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> None:
    """Runs the unfinished trainings behind docs/results, then writes the tables of the finished ones.

    Args:
        only: rows, like omniglot/protonet, or whole tables, like omniglot; when not given, all except ablations and
            what needs a GPU
        seeds: seeds of the trainings
        budget_minutes: stop after this many and save the current training; the same command resumes it
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        folder: folder of the runs
        lake: unpacked all_runs.zip of Lake et al. 2015, for their one-shot task within alphabets
        tables: folder of the CSV files; when not given, docs/results of this checkout, with the pages filled too
        list_only: list the trainings and which are finished, and run nothing
    """
    usual = [*rows_of_papers(), *(lake_rows(lake.resolve()) if lake else ())]
    every = [*usual, *ablations()]
    if lake is None and any(wanted.split("/")[0] == "lake" for wanted in only):
        raise UsageError("expected --lake DIR for the rows of lake, got none; name the folder of the unpacked runs")
    for wanted in only:
        check_choice("a row or a table", wanted, sorted({name for row in every for name in (row.name, row.table)}))
    asked = only or {row.table for row in usual}
    wide = [row for row in every if not row.long or torch.cuda.is_available()]
    rows = [row for row in every if row.name in asked or (row.table in asked and row in wide)]
    if list_only:
        for row, seed in product(rows, seeds):
            place = row.place(folder, seed)
            state = "finished" if row.finished(folder, seed) else "begun" if place.exists() else "to do"
            print(f"{state:9} {place.relative_to(folder)}")
        return
    for made in (folder, tables or DOCS / "results"):
        made.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    try:
        reproduce(rows, folder, seeds, data_root, budget_minutes, failed)
    finally:
        with FileLock(folder / ".tables.lock"):
            write_tables(folder, every, tables or DOCS / "results", failed, [row.name for row in rows])
            if tables is None:
                subprocess.run([sys.executable, DOCS / "render.py"], check=True)
    if failed:
        raise UsageError(f"expected all trainings to end, got {len(failed)} failures: {'; '.join(failed)}; see above")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog=program())
