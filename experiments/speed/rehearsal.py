"""Cost of trying, before a training, everything that comes after it, as a share of 600 training steps.

    for name in quickstart glyphs_maml; do python -m experiments.speed.rehearsal $name; done
    python -m experiments.speed.rehearsal omniglot_protonet --data-root DIR

Run one experiment per process: the seconds of the rehearsal include the first use of networks, faiss and threads, which
training or evaluation would otherwise pay for.
"""

import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pml_fewshot.embedders.modes import train_mode
from pml_fewshot.experiment import prepare as preparing
from pml_fewshot.training.step import train_step

STEPS = 600


def main(name: Annotated[str, tyro.conf.Positional], data_root: Path | None = None, timed: int = 30) -> None:
    """Prints the seconds of a rehearsal and of a training step, and the share.

    Args:
        name: name of the experiment, like quickstart
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        timed: training steps to time, after 3 more
    """
    seconds: list[float] = []

    def timed_rehearsal(prepared: preparing.Prepared) -> None:
        start = time.perf_counter()
        rehearse(prepared)
        seconds.append(time.perf_counter() - start)

    rehearse, preparing.rehearse = preparing.rehearse, timed_rehearsal
    config = importlib.import_module(f"experiments.{name}").CONFIG
    prepared = preparing.prepare(replace(config, data_root=data_root, device="cpu"))
    trainer, stream, optimizer = prepared.trainer, prepared.stream, prepared.optimizer
    with train_mode(trainer):
        for number in range(3 + timed):
            if number == 3:
                start = time.perf_counter()
            train_step(trainer, next(stream), optimizer, config.clip_norm, torch.autocast("cpu", enabled=False))
    step = (time.perf_counter() - start) / timed
    share = 100 * seconds[0] / (STEPS * step)
    print(f"{name}: rehearsal {seconds[0]:.2f} s, training step {step:.3f} s, {share:.2f} % of {STEPS} steps")


if __name__ == "__main__":
    tyro.cli(main)
