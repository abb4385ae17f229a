"""Workers that share a search or a sweep, one of which kills itself with SIGKILL in the middle of a training.

    python -m tests.sharing JOB...

A job is "sweep FOLDER", "search FOLDER" or "search FOLDER STORAGE" in one argument. Its workers are forked from this
program, so that torch is imported once. What they print is in worker<number>.txt beside the folder.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
import torch._dynamo  # by optimizers, at their first step: seconds that each worker would take
from torch.optim import Adam

from pml_fewshot import ExperimentConfig, PrototypicalLoss, swap
from pml_fewshot.experiment import search as search_module
from pml_fewshot.experiment import sweep as sweep_module
from pml_fewshot.experiment.search import search
from pml_fewshot.experiment.sweep import sweep
from tests.tiny_experiments import TINY_EXPERIMENTS

BASE = TINY_EXPERIMENTS["protonet"]
TRIALS, WORKERS, KILLED, STEP = 5, 3, 1, 16  # the trial in which a worker dies, and after which validation


class KillsOnce:
    """A recorder that kills the first process which comes to a step, between its validation and its checkpoint."""

    def __init__(self, folder: Path, step: int = STEP) -> None:
        self.folder, self.step, self.last = folder, step, ("", 0)

    def record(self, group: str, step: int, **values: float) -> None:
        self.last = (group, step)

    def save(self) -> None:
        mark = self.folder / ".killed"
        if self.last == ("validation", self.step) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def forget_after(self, step: int, groups: Sequence[str]) -> None: ...


def config_of_trial(trial: optuna.Trial, kills: bool = True) -> ExperimentConfig:
    rate = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    scale = trial.suggest_int("scale", 1, 4)
    config = swap(BASE, loss=partial(PrototypicalLoss, scale=float(scale)))
    recorder = KillsOnce if kills and trial.number == KILLED else None
    return replace(config, optimizer=partial(Adam, lr=rate), scheduler=None, recorder=recorder)


def never_pruned(folder: Path, storage: Any = None, kills: bool = True, trials: int = TRIALS) -> Any:
    """Of the first ten trials the proposals depend on their numbers alone, so that any workers find the same."""
    return search(partial(config_of_trial, kills=kills), trials, folder, storage, pruner=optuna.pruners.NopPruner())


def swept(kills: bool = True) -> list[ExperimentConfig]:
    bad = replace(BASE, name="bad", eval_specs=(replace(BASE.eval_specs[0], ways=99),))
    good = [replace(BASE, name=name, seed=seed) for seed, name in enumerate(("first", "second", "third"))]
    return [replace(good[0], recorder=KillsOnce if kills else None), *good[1:], bad]


def share(*jobs: str) -> None:
    """Runs this program, and sees that of each job one worker was killed and the others came to their end."""
    command = [sys.executable, "-W", "error", "-m", "tests.sharing", *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + "".join(printed(Path(job.split()[1])) for job in jobs)


def printed(folder: Path) -> str:
    """What the workers of a job have printed, one after the other."""
    return "".join(file.read_text() for file in sorted(folder.parent.glob("worker*.txt")))


def forked(work: Callable[[], Any], output: Path) -> int:
    child = os.fork()
    if child:
        return child
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    code = 1
    try:
        print(work(), flush=True)
        code = 0
    except BaseException:  # noqa: BLE001 (it is in the output)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    search_module.POLL_SECONDS = sweep_module.POLL_SECONDS = 0.05
    for kind, place, *storage in map(str.split, sys.argv[1:]):
        folder = Path(place)
        folder.parent.mkdir()
        shared = partial(never_pruned, folder, *storage) if kind == "search" else partial(sweep, swept(), folder)
        children = [forked(shared, folder.with_name(f"worker{number}.txt")) for number in range(WORKERS)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [-signal.SIGKILL, *[0] * (WORKERS - 1)], codes
