"""Times the main path on Omniglot: reading, a training step, embedding, episodes, retrieval. One command, one table.

    python -m experiments.speed.main_path --data-root ../shared/data
    python -m experiments.speed.main_path --data-root ../shared/data --system-allocator
    python -m experiments.speed.main_path --data-root ../shared/data --busy 2

Lines are medians after a warm-up, in seconds, of `repeats` runs, or of 3 for retrieval and next to busy processes; the
first reading is a single run. Nothing else should run on the machine.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from pml_fewshot.environment import keep_freed_memory

SPEC = EpisodeSpec(ways=5, shots=1, queries=15)
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
    """A complete step: drawing the episode, forward, backward, Adam."""
    optimizer = Adam(trainer.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        trainer(next(stream)).backward()
        optimizer.step()

    return step


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs `count` other processes, each of which wants a core."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(data_root: Path, repeats: int = 11, system_allocator: bool = False, busy: int = 0) -> None:
    """Prints the table.

    Args:
        data_root: folder of Omniglot.
        repeats: timed runs of each line.
        system_allocator: leave glibc's allocator as it is, to see what it costs.
        busy: processes that want the cores too, for extra lines: episodes with one thread and with all threads.
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
    for support_rotations in (1, 6):
        for spec in (EpisodeSpec(60, 1, 5), EpisodeSpec(60, 5, 5)):
            trainer.support_rotations = min(support_rotations, (spec.shots + spec.queries) // spec.shots)
            step = training_step(trainer, EpisodeStream(splits.train, spec, seed=0))
            label = f"training step, {spec}, {trainer.support_rotations} support rotations"
            figures.append((label, seconds(step, repeats, WARM_UP)))
    trainer.support_rotations = 1
    trainer.eval()
    figures.append((f"embed {len(plain):,} images", seconds(lambda: trainer.bank(plain), repeats)))
    bank = trainer.bank(splits.test)
    for spec in (SPEC, EpisodeSpec(5, 5, 15), EpisodeSpec(20, 1, 15)):
        evaluator = EpisodicEvaluator(spec)
        label = f"10,000 episodes from the bank, {spec}"
        figures.append((label, seconds(lambda e=evaluator: e.evaluate(trainer, splits.test, bank), repeats)))  # type: ignore[misc]
    all_threads = torch.get_num_threads()
    for threads in sorted({1, all_threads}) if busy else ():
        torch.set_num_threads(threads)
        label = f"10,000 episodes from the bank, {SPEC}, beside {busy} busy processes, threads: {threads}"
        with busy_processes(busy):
            figures.append((label, seconds(lambda: EpisodicEvaluator(SPEC).evaluate(trainer, splits.test, bank), 3)))
    torch.set_num_threads(all_threads)
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
