"""Tools for comparisons with other libraries: a fair clock, checks that all do the same, and lines of a table."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from threadpoolctl import threadpool_info

from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.evaluation.episodic import EpisodicResult

SLACK = 1.5  # times the sum of the two 95 % intervals: how far accuracies on different episodes may differ
SAME_FIGURE = 1e-3  # how far retrieval figures of the same images may differ, from rounding alone


@dataclass(frozen=True)
class Row:
    """One line of the table, in episodes per second (more is better) or seconds (less is better)."""

    what: str
    ours: float
    peer: str
    theirs: float
    wanted: str = ""
    unit: str = "episodes/s"

    def __str__(self) -> str:
        ratio = self.ours / self.theirs if self.unit == "episodes/s" else self.theirs / self.ours
        digits = 0 if self.ours >= 1000 else 2
        ours = f"{self.ours:,.{digits}f} {self.unit}"
        theirs = f"{self.theirs:,.{0 if self.theirs >= 1000 else 2}f} {self.unit}"
        return f"| {self.what} | {ours} | {self.peer} | {theirs} | {ratio:,.1f} | {self.wanted} |"


def check_accuracy(peer: str, accuracy: float, episodes: int, ours: EpisodicResult) -> None:
    """Raises if a peer's mean over `episodes` episodes and ours disagree by more than chance explains.

    A peer's interval uses the spread of our episodes: its own are of the same kind, and easyfsl returns no spread.
    """
    interval = 1.96 * ours.per_episode.std().item() / episodes**0.5
    allowed = SLACK * (interval + ours.ci95) + 1e-6
    if abs(accuracy - ours.mean) > allowed:
        raise AssertionError(
            f"{peer}: accuracy {accuracy:.4f} over {episodes} episodes, ours {ours.mean:.4f} over "
            f"{len(ours.per_episode)}: more than {allowed:.4f} apart, so the two do not do the same"
        )


def check_equal(peer: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Raises if figures of the same images differ by more than rounding."""
    for name, value in ours.items():
        if abs(theirs[name] - value) > SAME_FIGURE:
            raise AssertionError(f"{peer}: {name} {theirs[name]:.5f}, ours {value:.5f}: the two do not do the same")


def random_images(classes: int, per_class: int, size: int, channels: int, seed: int = 0) -> FewShotDataset:
    """Random images; those of a class share a faint random pattern, so that an accuracy can be better than chance."""
    generator = torch.Generator().manual_seed(seed)
    shape = (channels, size, size)
    pattern = torch.randint(112, (classes, 1, *shape), generator=generator, dtype=torch.uint8)
    noise = torch.randint(144, (classes, per_class, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(classes).repeat_interleave(per_class)
    return FewShotDataset((pattern + noise).flatten(0, 1), labels, [f"class {c}" for c in range(classes)])


def median_seconds(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of each contender over `repeats` rounds in which they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, action in contenders.items():
            start = time.perf_counter()
            action()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def conditions(packages: Sequence[str]) -> list[str]:
    """Returns versions, machine and threads, for the head of a table."""
    pools = {f"{pool['prefix']} {pool['num_threads']}" for pool in threadpool_info()}
    threads = f"threads: torch {torch.get_num_threads()}, {', '.join(sorted(pools))}"
    return [versions(packages), f"{processor()}; {threads}"]


def versions(packages: Sequence[str]) -> str:
    """Returns the versions of Python and of packages, which need not be installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"python {platform.python_version()}, {', '.join(found)}"


def processor() -> str:
    """Returns the processor's model, its number of cores, and the instructions that torch uses."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {capability}"
