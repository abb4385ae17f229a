"""Thousands of damaged files for every reader: none crashes the interpreter, hangs, writes, or gives wrong data.

The readers run in a process of their own, which says what it is about to try (worker.py); here it is watched. To see
one case again: python tests/fuzz/worker.py 0 INDEX+1 AN_EMPTY_FOLDER READER:INDEX
"""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from readers import READERS

WORKER = Path(__file__).parent / "worker.py"
SEED = 0
QUICK, ALL = 150, 5000
LONGEST = 5.0  # seconds that a case may take
STARTING = 120.0  # seconds for a worker to import torch, on a machine that is busy
MAKING = 30.0  # seconds to make the files of a reader


def failures(names: Sequence[str], count: int, folder: Path) -> list[str]:
    """What went wrong in cases 0 to count - 1 of each reader; after a death or a hang a new worker goes on."""
    found: list[str] = []
    left = [(name, 0) for name in names]
    sitting = 0
    while left:
        sitting += 1
        left = _sitting(left, count, folder / str(sitting), found)
    return found


def _sitting(left: list[tuple[str, int]], count: int, box: Path, found: list[str]) -> list[tuple[str, int]]:
    """Runs one worker; gives what it has left, from the case after the one that it failed to end."""
    starts = [f"{name}:{start}" for name, start in left]
    command = [sys.executable, "-u", str(WORKER), str(SEED), str(count), str(box), *starts]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as worker:
        lines: queue.Queue[str | None] = queue.Queue()

        def listen() -> None:
            assert worker.stdout is not None
            for line in worker.stdout:
                lines.put(line.strip())
            lines.put(None)

        threading.Thread(target=listen, daemon=True).start()
        name, current, said = "", -1, ""
        patience = STARTING
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                worker.kill()
                line, said = None, f"no progress for {patience} seconds; {said}"
            if line == "DONE":
                return []
            if line is None:
                found.append(f"{name} {current}: ended with {worker.wait()}: {said}")
                assert name, f"the worker did not start: {said}"
                after = [other for other, _ in left].index(name) + 1
                return [(name, current + 1), *left[after:]] if current + 1 < count else left[after:]
            if line.startswith("FAILED "):
                found.append(line)
            elif line.startswith("CASE "):
                name, current = line.split()[1], int(line.split()[2])
                patience = (
                    MAKING if current == count - 1 else LONGEST
                )  # after the last the next reader's files are made
            else:
                said = line  # the last words of a worker that dies


def test_damaged_files_are_refused_or_read_as_they_were(tmp_path: Path) -> None:
    assert failures([*READERS], QUICK, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_five_thousand_damaged_files(name: str, tmp_path: Path) -> None:
    assert failures([name], ALL, tmp_path) == []
