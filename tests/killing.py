"""Runs an experiment, kills it with SIGKILL at random moments, resumes it each time, and compares what it ends with.

    python -m tests.killing FOLDER KILLS SEED PROCESSES NAME...

The processes of each session are forked, so that torch is imported once. It is a program of its own because a process
with threads must not be forked.
"""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
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
from tests.several import collected, started
from tests.tiny_experiments import TINY_EXPERIMENTS

FAIR_SHARE = 0.3  # of the kills: at least so many must fall between the first step and the last
FUTILE = 10  # times as many kills as asked for: then the share is not to be reached


def session(
    config: ExperimentConfig,
    seconds: float | None,
    training: bool = False,
    processes: int = 1,
    victims: Sequence[int] = (0,),
) -> bool:
    """Runs in processes of its own. Returns whether the run came to its end.

    The victims among them are killed after some seconds, with `training` from the first checkpoint on: on a busy
    machine a process may need any time until it trains. Those that are left must end by themselves.
    """
    assert config.run_dir is not None
    last, folder = config.run_dir / "last.pt", config.run_dir.with_suffix(".processes")
    folder.mkdir(exist_ok=True)
    before = _written(last)
    children = started(partial(_run, config), processes, folder)
    ended = partial(os.waitid, os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if seconds is not None:
        while training and _written(last) == before and ended() is None:
            time.sleep(0.001)
        time.sleep(seconds)
        for victim in victims:  # a child that has ended waits to be collected: no other process can be hit
            os.kill(children[victim], signal.SIGKILL)
    codes = collected(children)
    killed = [] if seconds is None else [victim for victim in victims if codes[victim] == -signal.SIGKILL]
    errors = "\n".join((folder / f"stderr{rank}").read_text()[-3000:] for rank in range(processes))
    left = [code for rank, code in enumerate(codes) if rank not in killed]
    assert -signal.SIGKILL not in left, f"a process hung ({codes}):\n{errors}"
    assert killed or not any(codes), f"the run failed ({codes}):\n{errors}"
    return not killed


def _run(config: ExperimentConfig) -> None:
    run(config, resume=True)


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


def kill_and_compare(name: str, folder: Path, kills: int, seed: int, processes: int) -> None:
    """Half of the kills fall anywhere in a run, half while it trains, until a fair share fell between steps. Of several
    processes one is killed, or all.

    A kill counts as between steps when its session has saved new steps, and not the last: the next resumes there.
    """
    folder.mkdir(parents=True)
    config = TINY_EXPERIMENTS[name]
    whole = folder / "whole"
    started = time.perf_counter()
    session(replace(config, run_dir=whole), None, processes=processes)
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
        ranks = [moments.randrange(processes)] if moments.random() < 0.5 else range(processes)
        if not session(replace(config, run_dir=victim), moment, training, processes, ranks):
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
    kills, seed, processes = map(int, sys.argv[2:5])
    for number, name in enumerate(sys.argv[5:]):
        kill_and_compare(name, Path(sys.argv[1]) / name, kills, seed + number, processes)
