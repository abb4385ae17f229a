"""Measures a checkpoint's cost in the Omniglot setting, and memory growth over ten thousand steps on glyphs.

    python -m experiments.speed.reliability --data-root ../shared/data

Memory is watched in the training of `quickstart`, with episodes of 20 ways instead of 60 to save time; validation,
records and checkpoints are its own. Nothing else should run on the machine.
"""

import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments import omniglot_protonet, quickstart
from pml_fewshot import Episode, EpisodeSpec, EpisodeStream, EpisodicEvaluator, fit, load_omniglot
from pml_fewshot.environment import keep_freed_memory
from pml_fewshot.experiment.recorder import Recorder
from pml_fewshot.io.checkpoint import save_checkpoint
from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.training.early_stopping import EarlyStopping
from pml_fewshot.training.fit import LOG_EVERY
from pml_fewshot.training.state import TrainingState

EVERY, LAST = 1_000, 10_000  # memory is read every 1,000 steps, and must not grow between the first and the last


def resident_mib() -> float:
    """Returns the process's memory in RAM, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("expected VmRSS in /proc/self/status, got none; run this on Linux")


def checkpoint_cost(data_root: Path, steps: int = 40, repeats: int = 21) -> None:
    """Prints the seconds of a step and of everything written every `checkpoint_every` steps."""
    config = omniglot_protonet.CONFIG
    assert isinstance(config.train_spec, EpisodeSpec)
    torch.manual_seed(0)
    trainer = instantiate(config.trainer)
    train = load_omniglot(data_root, split="vinyals", rotations=True).train
    stream = EpisodeStream(train, config.train_spec, 0, config.augment)
    optimizer = Adam(trainer.parameters(), lr=1e-3)
    stopper = EarlyStopping(True, None, None, None)
    state = TrainingState(trainer, optimizer, CosineAnnealingLR(optimizer, config.steps), stream, stopper)
    step_seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        trainer(next(stream)).backward()
        optimizer.step()
        step_seconds.append(time.perf_counter() - start)
    step = statistics.median(step_seconds[steps // 4 :])
    state.keep_weights()  # the best weights are written along with the last
    saving_seconds = []
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder)
        for repeat in range(repeats):
            for log_step in range(LOG_EVERY, config.checkpoint_every + 1, LOG_EVERY):
                now = log_step + config.checkpoint_every * repeat
                recorder.record("train", now, loss=0.5, learning_rate=1e-3, skipped=0, accuracy=0.5)
            start = time.perf_counter()
            recorder.save()
            save_checkpoint(Path(folder) / "last.pt", state.state_dict())
            saving_seconds.append(time.perf_counter() - start)
        recorder.close()
        size = (Path(folder) / "last.pt").stat().st_size
    saving = statistics.median(saving_seconds)
    print(f"| a training step | {step:.3f} s |")
    records = config.checkpoint_every // LOG_EVERY
    print(f"| a checkpoint of {size / 2**20:.1f} MiB and {records} records | {saving:.3f} s |")
    print(f"| share of training time | {saving / (saving + config.checkpoint_every * step):.3%} |")


class WatchedStream(EpisodeStream):
    """Records the resident set after every thousand steps."""

    drawn = 0
    resident: dict[int, float]

    def __next__(self) -> Episode:
        if self.drawn and self.drawn % EVERY == 0:
            self.resident[self.drawn] = resident_mib()
        self.drawn += 1
        return super().__next__()


def memory_over_steps(steps: int = LAST) -> None:
    """Prints the resident set after every thousand steps."""
    config = replace(quickstart.CONFIG, train_spec=EpisodeSpec(ways=20, shots=1, queries=5))
    splits = config.data()
    assert splits.val is not None
    assert isinstance(config.train_spec, EpisodeSpec)
    torch.manual_seed(0)
    trainer = instantiate(config.trainer)
    optimizer = Adam(trainer.parameters(), lr=1e-3)
    stream = WatchedStream(splits.train, config.train_spec, 0, config.augment)
    stream.resident = {}
    validator = EpisodicEvaluator(config.eval_specs[0], 1000, 0)
    with tempfile.TemporaryDirectory() as folder, closing(Recorder(folder)) as recorder:
        fit(
            trainer,
            stream,
            optimizer,
            steps + 1,
            scheduler=CosineAnnealingLR(optimizer, steps + 1),
            validate=lambda: validator.evaluate(trainer, splits.val),
            validate_every=config.validate_every,
            recorder=recorder,
            checkpoint=Path(folder) / "last.pt",
        )
    for step, resident in stream.resident.items():
        print(f"| resident set after {step:,} steps | {resident:.1f} MiB |")
    first, last = (stream.resident[step] for step in (min(stream.resident), max(stream.resident)))
    print(f"| growth | {last / first - 1:+.2%} |")


def main(data_root: Path = Path("data")) -> None:
    """Prints both tables.

    Args:
        data_root: folder with Omniglot
    """
    keep_freed_memory()
    print("| | |\n|---|---|")
    checkpoint_cost(data_root)
    memory_over_steps()


if __name__ == "__main__":
    tyro.cli(main)
