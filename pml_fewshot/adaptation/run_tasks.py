"""Three ways to run a network for many tasks, each with weights of its own: loop, vmap, grouped. One result."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pml_fewshot.adaptation.batch_statistics import BatchStatistics
from pml_fewshot.adaptation.grouped_tasks import GroupedTasks
from pml_fewshot.modes import eval_mode

Weights = Mapping[str, Tensor]  # a network's parameters by name, for T tasks: (T, *shape) each

# Pixels that are run at a time, and the most tasks of them. 2 to 4 tasks of 80 images of 28 x 28 were fastest on a CPU
# with 32 MiB of cache, and 1 of 30 of 84 x 84 (1.5 times as fast as 4). 64 of the former are 1 GiB in the first layer
# of a GPU alone.
CPU_PIXELS, CPU_TASKS = 4 * 80 * 28**2, 8
CUDA_PIXELS, CUDA_TASKS = 64 * 80 * 28**2, 64

# Each is called with a network (its own parameters and buffers are neither used nor changed), the weights of T tasks,
# images (T, B, *item) and `of_first`, the items at the front of a task's batch that batch norm takes its statistics
# from (all when None), and returns (T, B, *output).


def loop(network: nn.Module, weights: Weights, images: Tensor, of_first: int | None = None) -> Tensor:
    """One task after another, which works for every module."""
    of_task = {name: weight.unbind() for name, weight in weights.items()}
    outputs = []
    for task, own_images in enumerate(images.unbind()):
        state = {**_buffers(network), **{name: weight[task] for name, weight in of_task.items()}}
        with BatchStatistics(len(own_images), of_first):
            outputs.append(functional_call(network, state, (own_images,)))
    return torch.stack(outputs)


def vmap(network: nn.Module, weights: Weights, images: Tensor, of_first: int | None = None) -> Tensor:
    """All tasks at once by `torch.func.vmap`, for a GPU; on a CPU it is slower than the loop."""

    def run_one(own: dict[str, Tensor], own_images: Tensor) -> Tensor:
        state = {**_buffers(network), **own}
        with BatchStatistics(len(own_images), of_first, by_hand=True):
            return functional_call(network, state, (own_images,))

    try:
        return torch.func.vmap(run_one, randomness="different")(dict(weights), images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise RuntimeError(
            f"expected a network that torch.func.vmap can run, got one of which it says {said!r}; use parallel='loop'"
        ) from error


def grouped(
    network: nn.Module, weights: Weights, images: Tensor, of_first: int | None = None, channels_last: bool = False
) -> Tensor:
    """All tasks at once by grouped convolutions, the fastest on a CPU, for networks of common layers.

    `channels_last` is the layout of activations in memory: pooling and batch norm are faster by it, but what is
    differentiated twice is slower.

    Raises:
        NotGroupable: see GroupedTasks.
    """
    side_by_side = images.transpose(0, 1).flatten(1, 2)  # (B, T * C, H, W)
    if channels_last and side_by_side.ndim == 4:
        side_by_side = side_by_side.contiguous(memory_format=torch.channels_last)
    buffers = _buffers(network)
    with GroupedTasks(len(images), weights.values(), buffers.values(), images.shape[1], of_first):
        output = functional_call(network, {**buffers, **weights}, (side_by_side,))
    return output.unflatten(1, (len(images), -1)).transpose(0, 1)


def fastest(network: nn.Module, images: Tensor) -> Literal["loop", "vmap", "grouped"]:
    """How to run tasks of images (B, *item) by what was measured: grouped on a CPU, vmap on a GPU, where they can.

    Each is tried on two tasks; what fails there, or has other outputs than the loop, is not taken.
    """
    run = vmap if images.is_cuda else grouped
    weights = {name: torch.stack([p, 1.1 * p + 0.01]).detach() for name, p in network.named_parameters()}
    both = torch.stack([images, images.flip(0)])
    no_trace = torch.random.fork_rng([images.device] if images.is_cuda else [])  # of what dropout draws
    full_precision = torch.autocast(images.device.type, enabled=False)
    try:
        # in its own mode first, for dropout and the like
        with no_trace, full_precision, torch.enable_grad():
            run(network, weights, both)
            with eval_mode(network):
                outputs, expected = run(network, weights, both), loop(network, weights, both)
    except RuntimeError:  # of vmap, or NotGroupable; what the loop cannot do either, it will say itself
        return "loop"
    # tasks that were mixed up are further apart than this; bfloat16 came within 0.7 %, TF32 within 0.15
    alike = torch.allclose(outputs, expected, rtol=0, atol=0.02 * expected.abs().max().item(), equal_nan=True)
    return ("vmap" if images.is_cuda else "grouped") if alike else "loop"


def fitting_tasks(support: Tensor, query: Tensor) -> int:
    """How many of the tasks with support (T, W, K, *item) and queries, likewise or (T, N, *item), to run at a time."""
    channels = support.shape[3] if support.ndim > 4 else 1
    pixels = (support[0].numel() + query[0].numel()) // channels
    budget, most = (CUDA_PIXELS, CUDA_TASKS) if support.is_cuda else (CPU_PIXELS, CPU_TASKS)
    return min(most, max(1, budget // pixels))


def uses_batch_norm(network: nn.Module, images: Tensor) -> bool:
    """Whether the network calls `F.batch_norm` for images (B, *item), as all of torch's batch norms do."""
    state = {**_buffers(network), **{name: p.detach() for name, p in network.named_parameters()}}
    with eval_mode(network), torch.enable_grad(), BatchStatistics(len(images)) as statistics:
        functional_call(network, state, (images,))
    return statistics.was_used


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies for a module to change: of the true ones nothing would be left after the next task."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}
