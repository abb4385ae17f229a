"""sweep: runs several experiments under one budget, in one table; a repeated call continues an interrupted sweep."""

import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated

import tyro
from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows, where each worker considers itself the only one: it repeats failures, draws the report
    fcntl = None  # type: ignore[assignment]

from pml_fewshot.checks import LockedError, UsageError, check_choice
from pml_fewshot.distributed import check_no_torchrun
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.command_line import one_line_errors, parse
from pml_fewshot.experiment.config import OPTIONS, ExperimentConfig
from pml_fewshot.experiment.run import run
from pml_fewshot.experiment.runs_report import draw_runs
from pml_fewshot.io.atomic import translate_write_errors, write_text
from pml_fewshot.training.interruption import TrainingInterrupted

BUDGET = ("steps", "seed", "num_episodes", "device", "data_root")
FAILURES = ".failures.json"
POLL_SECONDS = 2.0  # between two checks on other workers


def sweep(configs: Sequence[ExperimentConfig], folder: str | Path, only: Sequence[str] = ()) -> ResultTable:
    """Runs every experiment in its own folder below `folder` and returns one table, the best first.

    The table is written after each experiment, as results.md and the rest. A repeated call with the same folder reads
    finished experiments, resumes interrupted ones and retries failed ones; the line of a failed one gives the reason.

    The same call in several processes, on one machine or on many that see the folder, shares the experiments among
    them: each is run by one process, and resumed by another if that one dies. All return the whole table.

    Args:
        configs: the experiments.
        folder: sweep folder.
        only: names of the experiments to run; all when empty. Others that are finished are in the table too.

    Raises:
        UsageError: no experiment, two of the same name, an unknown name in `only`, a folder that cannot be written, or
            processes of torchrun: runs do not share work here.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C or SIGTERM; the same call continues.
    """
    check_no_torchrun("a sweep")
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise UsageError(f"expected names that are all different, got {names}; rename the experiments")
    if not names:
        raise UsageError("expected at least one experiment, got none; give their configs")
    only = (only,) if isinstance(only, str) else tuple(only)
    for wanted in only:
        check_choice("the name of an experiment", wanted, names)
    folder = Path(folder)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".workers").touch()
    to_run = [c for c in configs if not only or c.name in only or (folder / c.name / "figures.csv").exists()]
    try:
        with _among_workers(folder) as workers:
            table = _run_all(to_run, names, folder)
            with FileLock(folder / ".lock"):
                last = _alone(workers)
                if fcntl is not None:
                    fcntl.flock(workers, fcntl.LOCK_UN)
    except KeyboardInterrupt as stop:
        event = stop.event if isinstance(stop, TrainingInterrupted) else "interrupted"
        raise TrainingInterrupted(event, "the same command again continues") from stop
    print(f"\n{table}\nwritten to {folder / 'results.md'}")
    if last and any(config.report for config in to_run):
        draw_runs([folder / name for name in names if (folder / name / "config.json").exists()], folder, table.failures)
    return table


def _run_all(configs: Sequence[ExperimentConfig], names: Sequence[str], folder: Path) -> ResultTable:
    """Runs the experiments that no other worker is running, then waits for the rest, taking over from dead workers."""
    failures: dict[str, str] = {}
    table, to_do, first_pass = ResultTable(), list(configs), True
    while to_do:
        elsewhere: dict[str, ExperimentConfig] = {}
        for config in to_do:
            try:
                # (held until a failure is noted, unlike the lock of the run folder)
                with FileLock(folder / f".{config.name.replace('/', '_')}.lock", timeout=0):
                    if first_pass:
                        print(f"\n[{configs.index(config) + 1} of {len(configs)}] {config.name}", flush=True)
                    if failure := _run_one(config, folder):
                        failures[config.name] = failure
            except (Timeout, LockedError):
                elsewhere[config.name] = config
            if first_pass or config.name not in elsewhere:
                with FileLock(folder / ".lock"):
                    table = _write_table(names, folder, failures, list(elsewhere))
        if elsewhere and first_pass:
            print(f"\nwaiting for other workers, which are running {', '.join(elsewhere)}", flush=True)
        if len(elsewhere) == len(to_do):
            time.sleep(POLL_SECONDS)
        to_do, first_pass = list(elsewhere.values()), False
    return table


def _run_one(config: ExperimentConfig, folder: Path) -> str:
    """Runs an experiment or reads its results; returns the reason if it fails, or has failed in another worker."""
    if config.name in (noted := _noted(folder)):
        return noted[config.name]
    try:
        run(replace(config, run_dir=folder / config.name), resume=True)
        return ""
    except LockedError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost hours of other experiments)
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    with FileLock(folder / ".lock"):
        write_text(folder / FAILURES, json.dumps({**_noted(folder), config.name: failure}))
    return failure


def _write_table(
    names: Sequence[str], folder: Path, failures: Mapping[str, str], elsewhere: Sequence[str]
) -> ResultTable:
    finished = [name for name in names if (folder / name / "figures.csv").exists() and name not in failures]
    rows = [row for name in finished for row in ResultTable.read(folder / name).rows]
    running = {name: "another process is running it" for name in elsewhere if name not in finished}
    table = ResultTable(rows, {**failures, **running}).best_first()
    table.write(folder)
    return table


def _noted(folder: Path) -> dict[str, str]:
    """Reasons of the experiments that have failed in any worker since the first worker began."""
    file = folder / FAILURES
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@contextmanager
def _among_workers(folder: Path) -> Iterator[IO[bytes]]:
    """Shares a lock with all workers of a sweep; the first one clears earlier failures so that they are retried."""
    with (folder / ".workers").open("a+b") as file:
        with FileLock(folder / ".lock"):
            if _alone(file):
                (folder / FAILURES).unlink(missing_ok=True)
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH)
        yield file


def _alone(workers: IO[bytes]) -> bool:
    """Whether no other worker shares the lock, which the operating system frees when a worker dies."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(workers, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class _Options:
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    only: tuple[str, ...] = ()
    """names of the experiments to run; all when not given"""


def sweep_main(name: str, configs: Sequence[ExperimentConfig]) -> ResultTable:
    """Runs the sweep with the command line's changes to all its experiments (`--help` lists the options).

    `--run-dir` is the sweep folder, by default named by steps, episodes and seed, so that repeating the command
    continues an interrupted sweep. Exit codes are those of `main`, and 1 after the table if an experiment failed.
    """
    with one_line_errors():
        options = parse(_Options(configs[0]), f"Runs {len(configs)} experiments: {name}.")
        own = options.config
        # one budget for all, and the other options that were changed
        changes = {n: getattr(own, n) for n in OPTIONS if n in BUDGET or getattr(own, n) != getattr(configs[0], n)}
        length = f"{own.steps}_steps_{own.num_episodes}_episodes_seed{own.seed}"
        folder = own.run_dir or Path("runs") / name / length
        table = sweep([replace(config, **changes) for config in configs], folder, options.only)
        if table.failures:
            failed = ", ".join(table.failures)
            raise UsageError(f"expected all experiments to end, got failures of {failed}; the table says why")
        return table
