"""Runs a network for many tasks, each with its own weights: one after the other, in threads, or with vmap.

`loop` and `vmap` are called with a network (whose own tensors are neither used nor changed), the weights of T tasks,
images (T, B, *item) and `num_stat_items`, the number of leading items in a task's batch that batch norm takes its
statistics from (all when None), and return (T, B, *output). `in_threads` divides chunks of tasks among threads, each of
which loops over its own.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pml_fewshot.embedders.modes import eval_mode
from pml_fewshot.environment import one_thread_each
from pml_fewshot.trainers.maml.batch_statistics import BatchStatistics

Weights = Mapping[str, Tensor]  # a network's parameters by name, for T tasks: (T, *shape) each
Mode = Literal["loop", "vmap", "threads"]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# Most pixels and tasks that vmap runs at a time: the first layer of 64 tasks of 80 images of 28 x 28 takes 1 GiB.
PIXELS, TASKS = 64 * 80 * 28**2, 64


def loop(network: nn.Module, weights: Weights, images: Tensor, num_stat_items: int | None = None) -> Tensor:
    """Runs one task after another, which works for every module."""
    tasks = zip(images.unbind(), *(weight.unbind() for weight in weights.values()), strict=True)
    one = partial(_one_task, network, num_stat_items, False)
    return torch.stack([one(dict(zip(weights, own, strict=True)), own_images) for own_images, *own in tasks])


def vmap(network: nn.Module, weights: Weights, images: Tensor, num_stat_items: int | None = None) -> Tensor:
    """Runs all tasks at once with `torch.func.vmap`, for a GPU; on a CPU slower than the loop. Not for every module."""
    one = partial(_one_task, network, num_stat_items, True)
    return torch.func.vmap(one, randomness="different")(dict(weights), images)


def _one_task(network: nn.Module, num_stat_items: int | None, decomposed: bool, own: Weights, images: Tensor) -> Tensor:
    with BatchStatistics(len(images), num_stat_items, decomposed), swapped(network, {**_buffers(network), **own}):
        return network(images)


def copies_for(module: M, chunks: int) -> list[M]:
    """One copy per thread, for as many threads as torch has, or as there are chunks; none if it cannot be copied."""
    # autocast is per thread
    threads = 1 if torch.is_autocast_enabled("cpu") else max(1, min(torch.get_num_threads(), chunks))
    try:
        return [sharing_copy(module) for _ in range(threads)]
    except (RuntimeError, TypeError, AttributeError):  # it holds a lock, a file, a tensor of a graph
        return []


def in_threads(copies: Sequence[nn.Module], work: Callable[..., T], chunks: Sequence[Iterable[Any]]) -> Iterator[T]:
    """Yields `work(one of the copies, *chunk)` for each chunk, with one thread per copy.

    The operations of each use one thread, or more if there are fewer chunks than threads.

    Tasks share nothing, so threads wait for each other once, at the end, and not in each of hundreds of operations that
    are too small to be shared. The copies use the module's own tensors, but have their own places for others.
    """
    free: SimpleQueue[nn.Module] = SimpleQueue()
    for each in copies:
        free.put(each)

    def one(chunk: Iterable[Any]) -> T:
        own = free.get()
        try:
            return work(own, *chunk)
        finally:
            free.put(own)

    if len(copies) == 1:
        yield from map(one, chunks)
        return
    with one_thread_each(torch.get_num_threads() // len(copies)), ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(one, chunks)


def _loop_of_a_copy(network: nn.Module, weights: Weights, images: Tensor) -> Tensor:
    return loop(sharing_copy(network), weights, images)


def sharing_copy(module: M) -> M:
    """A copy of a module that shares its parameters and buffers."""
    return copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers())})


def fastest(network: nn.Module, images: Tensor) -> Mode:
    """The fastest way to run tasks of images (B, *item) as measured: threads on a CPU, vmap on a GPU, else the loop.

    It is tested on two tasks, and not used if it fails or its outputs differ from the loop's; nor are threads if the
    network draws random numbers, whose order would be left to chance. Waits for a GPU.
    """
    if any("_orig_mod" in module._modules for module in network.modules()):  # compiled for one shape of weights
        return "loop"
    mode: Mode = "vmap" if images.is_cuda else "threads"
    weights = {name: torch.stack([p, 1.1 * p + 0.01]).detach() for name, p in network.named_parameters()}
    both = torch.stack([images, images.flip(0)])
    same_draws = torch.random.fork_rng([images.device] if images.is_cuda else [])  # dropout draws leave no trace
    try:
        # in its own mode first, for dropout and the like
        with same_draws, torch.autocast(images.device.type, enabled=False), torch.enable_grad():
            run = vmap if mode == "vmap" else _loop_of_a_copy
            before = torch.get_rng_state()
            run(network, weights, both)
            if mode == "threads" and not torch.equal(before, torch.get_rng_state()):
                return "loop"
            with eval_mode(network):
                outputs, expected = run(network, weights, both), loop(network, weights, both)
    except (RuntimeError, TypeError, AttributeError):  # from vmap or a module that cannot be copied
        return "loop"  # where an error of the network itself is raised again
    # Mixed-up tasks are further apart than this; bfloat16 came within 0.7 %, TF32 within 0.15.
    same = torch.allclose(outputs, expected, rtol=0, atol=0.02 * expected.abs().max().item(), equal_nan=True)
    return mode if same else "loop"


def max_tasks_per_chunk(support: Tensor, query: Tensor, mode: Mode) -> int:
    """Number of tasks to run at a time, with support (T, W, K, *item) and queries, likewise or (T, N, *item)."""
    if mode != "vmap":
        return 1  # whose activations fit in a cache: 15 MiB for 80 images of 28 x 28
    channels = support.shape[3] if support.ndim > 4 else 1
    pixels = (support[0].numel() + query[0].numel()) // channels
    return min(TASKS, max(1, PIXELS // pixels))


def normalizes(network: nn.Module, images: Tensor) -> bool:
    """Whether the network calls `F.batch_norm` for images (B, *item), as all of torch's batch norms do."""
    state = {**_buffers(network), **{name: p.detach() for name, p in network.named_parameters()}}
    statistics = BatchStatistics(len(images))
    with eval_mode(network), torch.enable_grad(), statistics, swapped(network, state):
        network(images)
    return statistics.was_used


one_at_a_time = threading.RLock()  # held by whoever swaps a trainer's weights, or copies it, while others may use it


@contextmanager
def swapped(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which a network has other parameters and buffers, given by their first names; then its own again.

    Each place is changed once and gets its own object back, however many names lead to it and whatever the network
    did there. (`torch.func.functional_call` leaves the wrong tensor in a module that has two names, torch 2.13.)
    """
    named = {id(own): name for name, own in (*network.named_parameters(), *network.named_buffers())}
    places: list[dict[str, Any]] = [each for m in network.modules() for each in (m._parameters, m._buffers)]
    before = [dict(place) for place in places]
    try:
        for place in places:
            place.update({key: tensors[named[id(own)]] for key, own in place.items() if own is not None})
        yield
    finally:
        for place, own_tensors in zip(places, before, strict=True):
            place.clear()
            place.update(own_tensors)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers for a module to change, so that a task leaves nothing to the next."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def labels_of(items: Tensor) -> Tensor:
    """The class (B,) of each of a task's items (T, W, K, *item), flattened to (T, B, *item)."""
    return torch.arange(items.shape[1], device=items.device).repeat_interleave(items.shape[2])
