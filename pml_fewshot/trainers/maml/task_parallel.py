"""Three ways to run a network for many tasks, each with its own weights: loop, vmap, grouped. One result.

Each is called with a network (whose own parameters and buffers are neither used nor changed), the weights of T tasks,
images (T, B, *item) and `num_stat_items`, the items at the front of a task's batch that batch norm takes its statistics
from (all when None), and returns (T, B, *output).
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pml_fewshot.embedders.modes import eval_mode
from pml_fewshot.trainers.maml.batch_statistics import BatchStatistics
from pml_fewshot.trainers.maml.grouped_tasks import GroupedTasks

Weights = Mapping[str, Tensor]  # a network's parameters by name, for T tasks: (T, *shape) each
Mode = Literal["loop", "vmap", "grouped"]

# Pixels run at a time, and the most tasks. On a CPU with 32 MiB of cache 2 to 4 tasks of 80 images of 28 x 28 were
# fastest, and 1 of 30 images of 84 x 84 (1.5 times as fast as 4). On a GPU the first layer of 64 tasks of the former
# takes 1 GiB by itself.
CPU_PIXELS, CPU_TASKS = 4 * 80 * 28**2, 8
CUDA_PIXELS, CUDA_TASKS = 64 * 80 * 28**2, 64


def loop(network: nn.Module, weights: Weights, images: Tensor, num_stat_items: int | None = None) -> Tensor:
    """One task after another, which works for every module."""
    tasks = zip(images.unbind(), *(weight.unbind() for weight in weights.values()), strict=True)
    one = partial(_one_task, network, num_stat_items, False)
    return torch.stack([one(dict(zip(weights, own, strict=True)), own_images) for own_images, *own in tasks])


def vmap(network: nn.Module, weights: Weights, images: Tensor, num_stat_items: int | None = None) -> Tensor:
    """All tasks at once by `torch.func.vmap`, for a GPU; on a CPU it is slower than the loop. Not for every module."""
    one = partial(_one_task, network, num_stat_items, True)
    return torch.func.vmap(one, randomness="different")(dict(weights), images)


def _one_task(network: nn.Module, num_stat_items: int | None, decomposed: bool, own: Weights, images: Tensor) -> Tensor:
    with BatchStatistics(len(images), num_stat_items, decomposed), swapped(network, {**_buffers(network), **own}):
        return network(images)


def grouped(
    network: nn.Module, weights: Weights, images: Tensor, num_stat_items: int | None = None, channels_last: bool = False
) -> Tensor:
    """All tasks at once by grouped convolutions, the fastest on a CPU, for networks of common layers.

    Raises NotGroupable where GroupedTasks does. `channels_last` is the memory layout of activations: it makes pooling
    and batch norm faster, but double backward slower.
    """
    side_by_side = images.transpose(0, 1).flatten(1, 2)  # (B, T * C, H, W)
    if channels_last and side_by_side.ndim == 4:
        side_by_side = side_by_side.contiguous(memory_format=torch.channels_last)
    buffers = _buffers(network)
    mode = GroupedTasks(images, weights.values(), buffers.values(), num_stat_items)
    with swapped(network, {**buffers, **weights}), mode:
        output = network(side_by_side)
    return output.unflatten(1, (len(images), -1)).transpose(0, 1)


def fastest(network: nn.Module, images: Tensor) -> Mode:
    """The fastest way to run tasks of images (B, *item) as measured: grouped on a CPU, vmap on a GPU, else the loop.

    It is tried on two tasks, and not taken where it fails or has other outputs than the loop. Waits for a GPU.
    """
    if any("_orig_mod" in module._modules for module in network.modules()):  # compiled for one shape of weights
        return "loop"
    mode: Mode = "vmap" if images.is_cuda else "grouped"
    run = vmap if mode == "vmap" else grouped
    weights = {name: torch.stack([p, 1.1 * p + 0.01]).detach() for name, p in network.named_parameters()}
    both = torch.stack([images, images.flip(0)])
    same_draws = torch.random.fork_rng([images.device] if images.is_cuda else [])  # dropout draws leave no trace
    try:
        # in its own mode first, for dropout and the like
        with same_draws, torch.autocast(images.device.type, enabled=False), torch.enable_grad():
            run(network, weights, both)
            with eval_mode(network):
                outputs, expected = run(network, weights, both), loop(network, weights, both)
    except RuntimeError:  # of vmap, or NotGroupable; an error of the network itself comes again from the loop
        return "loop"
    # Tasks that were mixed up are further apart than this; bfloat16 came within 0.7 %, TF32 within 0.15.
    same = torch.allclose(outputs, expected, rtol=0, atol=0.02 * expected.abs().max().item(), equal_nan=True)
    return mode if same else "loop"


def max_tasks_per_chunk(support: Tensor, query: Tensor) -> int:
    """How many of the tasks with support (T, W, K, *item) and queries, likewise or (T, N, *item), to run at a time."""
    channels = support.shape[3] if support.ndim > 4 else 1
    pixels = (support[0].numel() + query[0].numel()) // channels
    budget, most = (CUDA_PIXELS, CUDA_TASKS) if support.is_cuda else (CPU_PIXELS, CPU_TASKS)
    return min(most, max(1, budget // pixels))


def normalizes(network: nn.Module, images: Tensor) -> bool:
    """Whether the network calls `F.batch_norm` for images (B, *item), as all of torch's batch norms do."""
    state = {**_buffers(network), **{name: p.detach() for name, p in network.named_parameters()}}
    statistics = BatchStatistics(len(images))
    with eval_mode(network), torch.enable_grad(), statistics, swapped(network, state):
        network(images)
    return statistics.was_used


one_at_a_time = threading.RLock()  # held by whoever changes a network or reads its weights while others may use it


@contextmanager
def swapped(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context a network has other parameters and buffers, given by their first names; then its own again.

    Each place is changed once and given its own object back, however many names lead to it and whatever the network
    did there. (`torch.func.functional_call` leaves the wrong tensor in a module that has two names, torch 2.13.)
    """
    with one_at_a_time:
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
    """Copies for a module to change, so that a task leaves nothing to the next."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def labels_of(items: Tensor) -> Tensor:
    """The class (B,) of each of a task's items (T, W, K, *item), flattened to (T, B, *item)."""
    return torch.arange(items.shape[1], device=items.device).repeat_interleave(items.shape[2])
