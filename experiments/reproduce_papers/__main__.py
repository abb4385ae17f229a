"""Every method against its paper, on real data: trains what is missing, and writes the tables of docs/results.

    python -m experiments.reproduce_papers --data-root ../shared/data --list
    python -m experiments.reproduce_papers --data-root ../shared/data --only omniglot/protonet
    python -m experiments.reproduce_papers --data-root ../shared/data --budget-minutes 120

Each training is an ordinary run folder below --folder, one for each method and seed. The same command again continues:
what is finished is not run again, and what was interrupted is resumed. Started several times, on machines that share
the folder, it divides the trainings among them. All of them take days on two cores.
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

from experiments.reproduce_papers.papers import lake_rows, rows_of_papers
from experiments.reproduce_papers.rows import PAPER_SEEDS, Row
from experiments.reproduce_papers.tables import write_tables
from pml_fewshot.checks import LockedError, UsageError, check_choice
from pml_fewshot.experiment.command_line import one_line_errors, program

DOCS = Path(__file__).parents[2] / "docs"
CONFIGS = [training for row in rows_of_papers() for training in row.trainings]  # which `pml-fewshot evaluate` looks for


def reproduce(
    rows: Sequence[Row], folder: Path, seeds: Sequence[int], data_root: Path | None = None, minutes: float | None = None
) -> dict[str, str]:
    """Runs what is not finished, one training after the other: a first seed of every row before a second of any.

    Args:
        minutes: after so many the training at hand is saved, as after Ctrl-C, and no other one begins; never when None.

    Returns:
        Why some failed, by the folders of their figures below `folder`.
    """
    failed: dict[str, str] = {}
    try:
        with budget(minutes):
            for seed, row in product(seeds, rows):
                for training in row.trainings:
                    name = row.place(folder, training, seed).relative_to(folder).as_posix()
                    print(f"\n{name}", flush=True)
                    try:
                        row.make(folder, training, seed, data_root)
                    except LockedError:
                        print("another process is running it")
                    except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost the others' hours)
                        traceback.print_exc()
                        failed[name] = f"{type(error).__name__}: {error}"
    except BudgetOver:
        print(f"\n{minutes:g} minutes are over; the same command again continues")
    return failed


class BudgetOver(Exception):
    """The minutes of a budget are over."""


@contextmanager
def budget(minutes: float | None) -> Iterator[None]:
    """Interrupts what runs within after so many minutes, as SIGTERM does, and then raises BudgetOver."""
    over = threading.Event()

    def interrupt() -> None:
        over.set()
        signal.raise_signal(signal.SIGTERM)

    def taken(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    alarm = threading.Timer(60 * (minutes or 0), interrupt)
    alarm.daemon = True
    before = signal.signal(signal.SIGTERM, taken)
    try:
        if minutes is not None:
            alarm.start()
        yield
    except KeyboardInterrupt:
        if over.is_set():
            raise BudgetOver from None
        raise
    finally:
        alarm.cancel()
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
    """Runs what is not finished of the trainings behind docs/results, then writes the tables of what is.

    Args:
        only: rows, like omniglot/protonet, or whole tables, like omniglot; when not given all but what needs a GPU
        seeds: of the trainings
        budget_minutes: stop after so many and save the training at hand; the same command continues
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        folder: of the runs
        lake: unpacked all_runs.zip of Lake et al. 2015, for their one-shot task within alphabets
        tables: folder of the CSV files; docs/results of this checkout when not given, whose pages are filled too
        list_only: show what there is and what is finished, and run nothing
    """
    every = [*rows_of_papers(), *(lake_rows(lake.resolve()) if lake else ())]
    for wanted in only:
        check_choice("a row or a table", wanted, sorted({name for row in every for name in (row.name, row.table)}))
    rows = [
        row
        for row in every
        if {row.name, row.table} & set(only) or (not only and (not row.long or torch.cuda.is_available()))
    ]
    if list_only:
        for row, seed in product(rows, seeds):
            for training in row.trainings:
                place = row.place(folder, training, seed)
                state = "begun" if place.exists() else "to do"
                print(f"{'finished' if row.finished(folder, training, seed) else state:9} {place.relative_to(folder)}")
        return
    for made in (folder, tables or DOCS / "results"):
        made.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    try:
        failed = reproduce(rows, folder, seeds, data_root, budget_minutes)
    finally:
        with FileLock(folder / ".tables.lock"):
            write_tables(folder, every, tables or DOCS / "results", failed)
            if tables is None:
                subprocess.run([sys.executable, DOCS / "render.py"], check=True)
    if failed:
        raise UsageError(f"expected all trainings to end, got {len(failed)} failures: {'; '.join(failed)}; see above")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog=program())
