"""Runs benchmarks of `python -m experiments.speed` with one setting of threads and allocator, fixed for a process.

Accepts a job as JSON and prints a line of JSON per benchmark: what was measured, and the seconds of every run.
"""

import ctypes
import json
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from experiments.speed.benchmarks import BENCHMARKS, Contest, Sizes
from pml_fewshot.experiment.command_line import one_line_errors


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def with_memory(action: Callable[[], Any]) -> tuple[Any, float | None]:
    """Returns an action's result and the MiB by which the process grows meanwhile, None if the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    except (OSError, AttributeError):
        return action(), None
    before = resident("VmRSS")
    result = action()
    return result, max(0.0, resident("VmHWM") - before)


def resident(name: str) -> float:
    """Returns a memory figure of this process in MiB, as Linux counts it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(contest: Contest, rounds: int) -> dict[str, Any]:
    """Warms both up, checks that they do the same, and has them take turns."""
    ours, grown = with_memory(contest.ours)
    if contest.theirs:
        contest.check(ours, contest.theirs())
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        taken["ours"].append(seconds(contest.ours) / contest.work)
        if contest.theirs:
            taken["theirs"].append(seconds(contest.theirs) / contest.their_work)
    about = {name: getattr(contest, name) for name in ("what", "peer", "wanted", "unit")}
    return {**about, **taken, "memory": grown}


def main(job: dict[str, Any]) -> None:
    """Runs the benchmarks named in a job."""
    sizes, data_root = Sizes(**job["sizes"]), Path(job["data_root"]) if job["data_root"] else None
    for name in job["names"]:
        random.seed(0)  # easyfsl draws from it
        with ExitStack() as stack, redirect_stdout(sys.stderr):
            measured = measure(BENCHMARKS[name](sizes, data_root, stack), job["rounds"])
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(json.loads(sys.argv[1]))
