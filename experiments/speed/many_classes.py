"""Costs that grow with the number of classes and items: drawing episodes, and losses with weights for every class.

    python -m experiments.speed.many_classes                          # a minute on two cores, 3 GB
    python -m experiments.speed.many_classes --items 100_000_000      # 10 GB

Each line runs in a separate process, so that its peak memory is its own; other programs on the machine change seconds.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import tyro
from pytorch_metric_learning.losses import ArcFaceLoss, ProxyAnchorLoss

from experiments.speed.side_by_side import conditions
from pml_fewshot import BatchSpec, EpisodeSampler, EpisodeSpec
from pml_fewshot.sampling.class_sampler import ClassSampler

LOSSES = {"ArcFaceLoss": ArcFaceLoss, "ProxyAnchorLoss": ProxyAnchorLoss}


def draw(what: str, items: int, classes: int, times: int) -> tuple[float, float]:
    """Returns the seconds to make a sampler of shuffled labels, and to draw `times` episodes or batches."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(items) % classes)[torch.randperm(items, generator=generator)]
    start = time.perf_counter()
    if what == "batches of 64 classes":
        spec = BatchSpec(classes=64, per_class=4)
        sampler = ClassSampler(labels, spec.classes, spec.per_class, str(spec))
        action: Callable[[], Any] = lambda: sampler.draw(times, generator)  # noqa: E731
    else:
        episodes = EpisodeSampler(labels, EpisodeSpec(int(what.split("-")[0]), 1, 5), generator)
        action = lambda: episodes.sample(times)  # noqa: E731
    made = time.perf_counter() - start
    start = time.perf_counter()
    action()
    return made, time.perf_counter() - start


def step(loss: str, dims: int, classes: int, batch: int) -> tuple[float, float]:
    """Returns the seconds to make a loss and Adam, and those of the fastest of three steps on a batch."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    made = LOSSES[loss](num_classes=classes, embedding_size=dims)
    optimizer = torch.optim.Adam(made.parameters())
    seconds = time.perf_counter() - start
    rows = torch.randn(batch, dims, generator=generator, requires_grad=True)
    labels = torch.randint(classes, (batch,), generator=generator)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        optimizer.zero_grad()
        made(rows, labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return seconds, min(times)


def apart(action: Callable[..., tuple[float, float]], given: tuple[Any, ...], out: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.put((*action(*given), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6))


def line(what: str, action: Callable[..., tuple[float, float]], *given: Any) -> None:
    """Runs an action in a separate process and prints its line of the table."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=apart, args=(action, given, out))
    process.start()
    made, used, megabytes = out.get()
    process.join()
    print(f"| {what} | {made:.2f} | {used:.3f} | {megabytes:,.0f} |", flush=True)


def main(
    items: int = 10_000_000,
    classes: int = 1_000_000,
    times: int = 1000,
    dims: int = 64,
    batch: int = 64,
    loss_classes: tuple[int, ...] = (100_000, 1_000_000),
) -> None:
    """Prints the table.

    Args:
        items: labels to draw from, shuffled.
        classes: classes of the items.
        times: episodes and batches drawn in one call.
        dims: dimensions of embeddings and class weights.
        batch: batch size for the losses.
        loss_classes: numbers of classes that they have weights for.
    """
    print("\n".join(f"- {each}" for each in conditions(("torch", "pytorch-metric-learning"))))
    print("\n| what | to make, s | to use, s | memory, MB |\n|---|---|---|---|", flush=True)
    for what in ("5-way 1-shot", "20-way 1-shot", "60-way 1-shot", "batches of 64 classes"):
        line(f"{times:,} x {what}: {items:,} items, {classes:,} classes", draw, what, items, classes, times)
    for loss in LOSSES:
        for count in loss_classes:
            line(f"{loss}, {count:,} classes x {dims}, batch {batch}, Adam", step, loss, dims, count, batch)


if __name__ == "__main__":
    tyro.cli(main)
