"""Runs an experiment, kills it with SIGKILL at random moments, resumes it each time, and compares what it ends with.

    python -m tests.killing FOLDER KILLS SEED NAME...

A process is forked for each session, so that torch is imported once. It is a program of its own because a process with
threads must not be forked.
"""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by optimizers, at their first step: seconds that each session would take
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (a second more)

from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.experiment.run import run
from pml_fewshot.io.checkpoint import load_checkpoint
from tests.tiny_experiments import TINY_EXPERIMENTS

FAIR_SHARE = 0.3  # of the kills: at least so many must fall between the first step and the last
FUTILE = 10  # times as many kills as asked for: then the share is not to be reached


def session(config: ExperimentConfig, seconds: float | None, training: bool = False) -> bool:
    """Runs in a process of its own. Returns whether the run came to its end.

    It is killed after some seconds, with `training` from its first checkpoint on: on a busy machine a process may need
    any time until it trains.
    """
    assert config.run_dir is not None
    last, errors = config.run_dir / "last.pt", config.run_dir.with_suffix(".stderr")
    before = _written(last)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 1
        try:
            run(config, resume=True)
            code = 0
        except BaseException:  # noqa: BLE001 (the parent shows it)
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = partial(os.waitid, os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if seconds is not None:
        while training and _written(last) == before and ended() is None:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # a child that has ended waits to be collected: no other process can be hit
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and seconds is not None:
        return False
    assert os.waitstatus_to_exitcode(status) == 0, f"the run failed ({status}):\n{errors.read_text()[-3000:]}"
    return True


def _written(path: Path) -> tuple[int, int] | None:
    """Which file lies there: every checkpoint is a new one."""
    found = path.stat() if path.exists() else None
    return (found.st_ino, found.st_mtime_ns) if found else None


def steps_in(folder: Path) -> int:
    """Steps in the checkpoint of a run folder, which is whole at any moment; 0 before the first."""
    last = folder / "last.pt"
    return load_checkpoint(last)["history"]["steps"] if last.exists() else 0


def digest(state: Any) -> str:
    """Of all that a checkpoint holds, bit for bit, but the seconds that it took."""
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key != "seconds"}
        return _hash(*(part for key in sorted(state, key=str) for part in (str(key), digest(state[key]))))
    if isinstance(state, list | tuple):
        return _hash(*map(digest, state))
    if isinstance(state, Tensor):
        return _hash(str(state.dtype), str(tuple(state.shape)), hashlib.sha256(state.contiguous().numpy()).hexdigest())
    return _hash(repr(state))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves: state, weights, records, figures."""
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    files = sorted([*folder.glob("*.csv"), *folder.glob("*.safetensors"), *folder.glob("results.*")])
    contents = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"state": digest(load_checkpoint(folder / "last.pt")), **rows, **contents}


def kill_and_compare(name: str, folder: Path, kills: int, seed: int) -> None:
    """Half of the kills fall anywhere in a run, half while it trains, until a fair share fell between steps.

    A kill counts as between steps when its session has saved new steps, and not the last: the next resumes there.
    """
    folder.mkdir(parents=True)
    config = TINY_EXPERIMENTS[name]
    whole = folder / "whole"
    started = time.perf_counter()
    session(replace(config, run_dir=whole), None)
    seconds = time.perf_counter() - started
    # (logs.db is made just before the first step, embedder or network just after the last)
    seconds_training = load_checkpoint(whole / "last.pt")["history"]["seconds"]
    expected = outcome(whole)
    moments = random.Random(seed)
    killed = between = ends = 0
    while killed < kills or between < FAIR_SHARE * kills or ends == 0:
        assert killed < FUTILE * kills, f"{name}: only {between} of {killed} kills fell between steps"
        victim = folder / f"killed{ends}"
        training = moments.random() < 0.5
        moment: float | None = moments.uniform(0, 0.5 * seconds_training if training else 0.9 * seconds)
        if killed >= kills and between >= FAIR_SHARE * kills:
            moment = None  # the last sessions of a run that is to be compared are left to end
        steps = steps_in(victim)
        if not session(replace(config, run_dir=victim), moment, training):
            killed += 1
            between += steps < steps_in(victim) < config.steps
            continue
        got = outcome(victim)
        different = [key for key in sorted(expected.keys() | got.keys()) if expected.get(key) != got.get(key)]
        assert not different, f"{name} after {killed} kills: {different} differ from the run that was not killed"
        shutil.rmtree(victim)
        ends += 1
    print(f"{name}: {killed} kills, {between} of them between steps, {ends} runs came to the same end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[4:]):
        kill_and_compare(name, Path(sys.argv[1]) / name, int(sys.argv[2]), int(sys.argv[3]) + number)
