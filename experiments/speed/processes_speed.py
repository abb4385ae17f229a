"""Compares several processes with one: seconds of a step, embedding and evaluation, and whether figures are equal.

    python -m experiments.speed.processes_speed                    # eight minutes on two cores

All setups take turns three times, each in its own programs; figures are medians, for the built-in letters and networks
of 64 channels on a CPU. A step is one of `fit`: 4 tasks of second-order MAML (5-way 1-shot, 15 queries per class), and
a 20-way 1-shot ProtoNet with 5 queries per class, batch norm over each process's share. Conv4 embeds all 6,060 test
images; 10,000 episodes (5-way 1-shot, 15 queries per class) are evaluated from these embeddings, and 40 with MAML.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pml_fewshot import (
    Conv4,
    Embedder,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    MAMLTrainer,
    ProtoNetTrainer,
    RetrievalTester,
    load_glyphs,
    processes,
)
from pml_fewshot.distributed import told_by_all, world
from pml_fewshot.embedders.embedder import encode, keep_memory
from pml_fewshot.io.tensors import checksum_of
from pml_fewshot.training.step import train_step

NAME = "experiments.speed.processes_speed"
WAYS = {  # processes (0: without torchrun), and threads of each
    "one process of one thread": (0, 1),
    "the same under torchrun": (1, 1),
    "one process of two threads": (0, 2),
    "two processes of one thread": (2, 1),
    "three processes of one thread": (3, 1),
}
SPEC = EpisodeSpec(ways=5, shots=1, queries=15)


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Returns the median seconds of `times` runs, with all processes starting together, after one uncounted run."""
    work()
    measured = []
    for _ in range(times):
        told_by_all(None)
        start = time.perf_counter()
        work()  # at its end all have told each other their results
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def step_of(trainer: nn.Module, stream: EpisodeStream) -> Callable[[], object]:
    optimizer = torch.optim.Adam(trainer.parameters(), 1e-3)
    trainer.train()
    plain = torch.autocast("cpu", enabled=False)
    return lambda: train_step(trainer, next(stream), optimizer, None, plain)


def measured() -> dict[str, float | str]:
    """Returns seconds by what was done, and checksums of what must be equal."""
    keep_memory(torch.device("cpu"))
    glyphs = load_glyphs()
    torch.manual_seed(0)
    network = nn.Sequential(Conv4(in_channels=1), nn.Linear(64, 5))
    maml, embedder = MAMLTrainer(network, inner_lr=0.4), Embedder(Conv4(in_channels=1))
    tests, evaluator = glyphs.test, EpisodicEvaluator(SPEC, 10_000)
    bank = encode(embedder, tests)
    episodic, adapted = evaluator.evaluate(bank), EpisodicEvaluator(SPEC, 40).evaluate(maml, tests)
    retrieved = RetrievalTester().test(bank)
    figures = {"episodes": episodic.per_episode, "MAML's episodes": adapted.per_episode, "bank": bank.embeddings}
    equal = {name: checksum_of({name: values}) for name, values in (figures | retrieved.per_query).items()}
    protonet = ProtoNetTrainer(Embedder(Conv4(in_channels=1)))
    tasks = EpisodeStream(glyphs.train, SPEC, 0, episodes_per_batch=4)
    return equal | {
        "MAML step": seconds_of(step_of(maml, tasks), 9),
        "ProtoNet step": seconds_of(step_of(protonet, EpisodeStream(glyphs.train, EpisodeSpec(20, 1, 5), 0)), 21),
        "embedding": seconds_of(lambda: encode(embedder, tests), 3),
        "10,000 episodes": seconds_of(lambda: evaluator.evaluate(bank), 5),
    }


def run_way(number: int, threads: int) -> dict[str, float | str]:
    """Returns the measurements of one setup, run in its own programs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number else []
        command = [sys.executable, *torchrun, "-m", NAME, "--write", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found: dict[str, float | str] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.write is not None:
        with processes("cpu"):
            found = measured()
            if world().is_first:
                options.write.write_text(json.dumps(found))
        return
    every: dict[str, list[dict[str, float | str]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, (number, threads) in WAYS.items():
            every[name].append(run_way(number, threads))
            print(name, {k: round(v, 4) for k, v in every[name][-1].items() if isinstance(v, float)}, flush=True)
    first = every["one process of one thread"][0]
    timed = [name for name, value in first.items() if isinstance(value, float)]
    print("\n| " + " | ".join(["", *(f"{name}, s" for name in timed), "figures equal to the bit"]) + " |")
    print("|" + " --- |" * (len(timed) + 2))
    for name, rounds in every.items():
        middle = [f"{statistics.median(float(each[what]) for each in rounds):.4f}" for what in timed]
        differ = [what for what in first if what not in timed and any(each[what] != first[what] for each in rounds)]
        print("| " + " | ".join([name, *middle, f"not {', '.join(differ)}" if differ else "all"]) + " |")


if __name__ == "__main__":
    main()
