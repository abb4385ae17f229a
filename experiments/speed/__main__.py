"""All comparisons with other libraries: one command, one table.

    pip install -c constraints.txt -e '.[bench]'
    python -m experiments.speed --quick                  # 3 to 4 minutes on two cores, smaller sizes
    python -m experiments.speed --csv speed.csv
    python -m experiments.speed --only maml-second-order protonet-step --rounds 9

Every benchmark runs with one thread and with all of them, with glibc's default allocator settings, as in a user's own
script, and with freed memory kept, for all contenders alike. Each of these settings runs in a separate process, in
which this library and a peer are checked to do the same and then take turns. Figures are medians over the rounds. The
ratio is the peer's time divided by this library's in the same round, as median and extremes. Memory is how much this
library's first run makes the process grow. Nothing else should run on the machine.
"""

import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from experiments.speed.benchmarks import BENCHMARKS, QUICK, Sizes
from experiments.speed.side_by_side import processor, versions
from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.environment import MALLOPT
from pml_fewshot.experiment.command_line import one_line_errors

PACKAGES = ("torch", "pytorch-metric-learning", "faiss-cpu", "easyfsl", "numpy")
COLUMNS = (
    *("measured", "threads", "allocator", "this library", "peer", "peer's figure"),
    *("ratio", "lowest", "highest", "wanted", "peak memory"),
)
BOOKKEEPING = ("command", "commit", "machine")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
KEPT = {f"MALLOC_{name.upper()}{'_' * (name != 'arena_max')}": str(value) for name, _, value in MALLOPT}


@dataclass(frozen=True)
class Condition:
    """Settings of a process from its start: its number of threads, and whether its allocator keeps freed memory."""

    threads: int
    kept: bool

    @property
    def allocator(self) -> str:
        return "freed memory kept" if self.kept else "as the system has it"

    def environment(self) -> dict[str, str]:
        """Returns this process's environment, with the settings changed."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        allocator = KEPT if self.kept else {"PML_FEWSHOT_KEEP_MEMORY": "0"}
        return own | dict.fromkeys(THREADS, str(self.threads)) | allocator


def all_conditions() -> list[Condition]:
    """Returns one thread and all of them, with the allocator both ways if it is glibc's."""
    kept = (False, True) if platform.libc_ver()[0] == "glibc" else (False,)
    return [Condition(*each) for each in product(sorted({1, torch.get_num_threads()}), kept)]


def work(condition: Condition, job: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yields the measurements of a process with these settings as they arrive."""
    command = [sys.executable, "-m", "experiments.speed.benchmark_worker", json.dumps(job)]
    pipe: Any = {"stdout": subprocess.PIPE, "text": True, "env": condition.environment()}
    with subprocess.Popen(command, start_new_session=True, **pipe) as process:  # a group, with everything it starts
        try:
            yield from map(json.loads, process.stdout or ())
            if code := process.wait():
                raise SystemExit(f"error: a benchmark ended with exit code {code}; its error stands above")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def cells(condition: Condition, measured: Mapping[str, Any]) -> dict[str, str]:
    """Returns a line of the table."""
    ours, theirs, memory = (measured[name] for name in ("ours", "theirs", "memory"))
    ratios = [their / own for own, their in zip(ours, theirs, strict=True)] if theirs else []
    texts = [f"{each(ratios):.2f}" if ratios else "" for each in (median, min, max)]
    figures = [figure(median(each), measured["unit"]) if each else "" for each in (ours, theirs)]
    about = (measured["what"], str(condition.threads), condition.allocator, figures[0], measured["peer"], figures[1])
    grown = "" if memory is None else f"{memory:,.0f} MiB"
    return dict(zip(COLUMNS, (*about, *texts, measured["wanted"], grown), strict=True))


def figure(seconds: float, unit: str) -> str:
    """Formats the seconds of one, or the number per second, with three digits."""
    value = seconds if unit == "s" else 1 / seconds
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def append(path: Path, row: Mapping[str, str]) -> None:
    """Appends a row to a CSV file, which is created if missing."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*COLUMNS, *BOOKKEEPING), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def check_csv(path: Path) -> None:
    """Raises a UsageError if rows could not be added to a file."""
    if not path.parent.is_dir():
        raise UsageError(f"expected --csv in a folder, got {path}; make {path.parent}")
    wanted = [*COLUMNS, *BOOKKEEPING]
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            if (found := next(csv.reader(stream), [])) != wanted:
                raise UsageError(f"expected --csv with the columns {wanted}, got {found}; name a new file")


def bookkeeping(options: Sequence[str]) -> dict[str, str]:
    """Returns how the rows were made: command, commit and machine."""
    command = " ".join(("python -m experiments.speed", *options))
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = ""
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return dict(zip(BOOKKEEPING, (command, commit, f"{processor()}, torch {torch.__version__}"), strict=True))


def compare(
    conditions: Sequence[Condition],
    names: Sequence[str],
    rounds: int,
    sizes: Sizes,
    data_root: Path | None = None,
) -> Generator[dict[str, str], None, None]:
    """Yields the lines of the table as they arrive; progress goes to stderr."""
    job = {"names": list(names), "rounds": rounds, "sizes": asdict(sizes), "data_root": data_root and str(data_root)}
    start, done, total = time.monotonic(), 0, len(conditions) * len(names)
    for condition in conditions:
        about = f"threads: {condition.threads}, allocator: {condition.allocator}"
        print(f"[{done}/{total}] {about}", file=sys.stderr, flush=True)
        with closing(work(condition, job)) as lines:
            for measured in lines:
                done += 1
                left = (time.monotonic() - start) / done * (total - done) / 60
                print(f"[{done}/{total}] {about}; about {left:.0f} minutes left", file=sys.stderr, flush=True)
                yield cells(condition, measured)


def main(
    quick: bool = False,
    rounds: int | None = None,
    only: tuple[str, ...] = (),
    csv: Path | None = None,
    data_root: Path | None = None,
) -> None:
    """Prints the table, line by line as results arrive.

    Args:
        quick: smaller sizes: 3 minutes on two cores.
        rounds: rounds in which this library and a peer take turns; when None, 5, or 2 if quick.
        only: benchmarks to run; all when none is named.
        csv: file to append the rows to, in the format of docs/results.
        data_root: folder of Omniglot; random images of its size when None.
    """
    with one_line_errors():
        count = rounds if rounds is not None else 2 if quick else 5
        check_at_least_one("--rounds", count)
        for name in only:
            check_choice("--only", name, list(BENCHMARKS))
        if csv is not None:
            check_csv(csv)
        if data_root is not None and not data_root.is_dir():
            raise UsageError(f"expected --data-root as a folder, got {data_root}; name the one that holds Omniglot")
        options = ["--quick"] * quick + [f"--rounds {rounds}"] * (rounds is not None)
        options += [f"--only {' '.join(only)}"] * bool(only) + ["--data-root DIR"] * (data_root is not None)
        about = bookkeeping(options)
        libc = " ".join(platform.libc_ver()) or "not glibc"
        print(f"- {versions(PACKAGES)}\n- {processor()}; C library: {libc}")
        print(f"- medians of {count} rounds; {about['command']}, commit {about['commit']}\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for row in compare(all_conditions(), only or tuple(BENCHMARKS), count, QUICK if quick else Sizes(), data_root):
            print(f"| {' | '.join(row.values())} |", flush=True)
            if csv is not None:
                append(csv, row | about)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.speed")
