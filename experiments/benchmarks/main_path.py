"""Times the main path on Omniglot: reading, a training step, embedding, episodes, retrieval. One command, one table.

    python -m experiments.benchmarks.main_path --data-root ../shared/data
    python -m experiments.benchmarks.main_path --data-root ../shared/data --system-allocator

Each line is the median of `repeats` runs after a warm-up, in seconds; nothing else should run on the machine.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch.optim import Adam

from pml_fewshot import (
    Conv4,
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodeStream,
    EpisodicEvaluator,
    ProtoNetTrainer,
    RetrievalTester,
    load_omniglot,
)
from pml_fewshot.allocator import keep_freed_memory

WARM_UP = 20  # steps until the allocator holds all that a step needs


def seconds(action: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of `action`."""
    for _ in range(warm_up):
        action()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def training_step(trainer: ProtoNetTrainer, stream: EpisodeStream) -> Callable[[], None]:
    """One whole step: drawing the episode, forward, backward, Adam."""
    optimizer = Adam(trainer.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        trainer(next(stream)).backward()
        optimizer.step()

    return step


def main(data_root: Path, repeats: int = 11, system_allocator: bool = False) -> None:
    """Prints the table.

    Args:
        data_root: folder of Omniglot.
        repeats: timed runs of each line.
        system_allocator: leave glibc's allocator as it is, to see what it costs.
    """
    if not system_allocator:
        keep_freed_memory()
    figures: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        cold = seconds(lambda: load_omniglot(data_root, cache_dir=folder), 1, warm_up=0)
        figures.append(("read all of Omniglot from the zips into the cache", cold))
        warm = seconds(lambda: load_omniglot(data_root, cache_dir=folder), repeats)
        figures.append(("the same from the cache, rotations made", warm))
    splits = load_omniglot(data_root)
    plain = load_omniglot(data_root, rotations=False).test
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(Conv4(in_channels=1)))
    for turns in (1, 6):
        for spec in (EpisodeSpec(60, 1, 5), EpisodeSpec(60, 5, 5)):
            trainer.turns = min(turns, (spec.shots + spec.queries) // spec.shots)
            step = training_step(trainer, EpisodeStream(splits.train, spec, seed=0))
            label = f"training step, {spec}, {trainer.turns} turn{'s' if trainer.turns > 1 else ''}"
            figures.append((label, seconds(step, repeats, WARM_UP)))
    trainer.turns = 1
    trainer.eval()
    figures.append((f"embed {len(plain):,} images", seconds(lambda: trainer.bank(plain), repeats)))
    bank = trainer.bank(splits.test)
    for spec in (EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15), EpisodeSpec(20, 1, 15)):
        evaluator = EpisodicEvaluator(spec)
        label = f"10,000 episodes from the bank, {spec}"
        figures.append((label, seconds(lambda e=evaluator: e.evaluate(trainer, splits.test, bank), repeats)))  # type: ignore[misc]
    tester = RetrievalTester()
    everything = EmbeddingBank(bank, splits.test.labels)
    label = f"P@1, R-precision, MAP@R of {len(everything):,} items among themselves"
    figures.append((label, seconds(lambda: tester.test(everything), 3)))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.processor()}"
    )
    print("| | seconds |\n|---|---|")
    for label, taken in figures:
        print(f"| {label} | {taken:.3f} |")


if __name__ == "__main__":
    tyro.cli(main)
