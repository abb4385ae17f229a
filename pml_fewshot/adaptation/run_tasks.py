"""Three ways to run a network for many tasks, each with weights of its own: loop, vmap, grouped. One result."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pml_fewshot.adaptation.batch_statistics import BatchStatistics
from pml_fewshot.adaptation.grouped_tasks import GroupedTasks

Weights = Mapping[str, Tensor]  # a network's parameters by name, for T tasks: (T, *shape) each

# Each is called with a network (its own parameters and buffers are neither used nor changed), the weights of T tasks,
# images (T, B, *item) and `of_first`, the items at the front of a task's batch that batch norm takes its statistics
# from (all when None), and returns (T, B, *output).


def loop(network: nn.Module, weights: Weights, images: Tensor, of_first: int | None = None) -> Tensor:
    """One task after another, which works for every module."""
    of_task = {name: weight.unbind() for name, weight in weights.items()}
    outputs = []
    for task, own_images in enumerate(images.unbind()):
        state = {**_buffers(network), **{name: weight[task] for name, weight in of_task.items()}}
        with BatchStatistics(of_first):
            outputs.append(functional_call(network, state, (own_images,)))
    return torch.stack(outputs)


def vmap(network: nn.Module, weights: Weights, images: Tensor, of_first: int | None = None) -> Tensor:
    """All tasks at once by `torch.func.vmap`, for a GPU; on a CPU it is slower than the loop."""

    def run_one(own: dict[str, Tensor], own_images: Tensor) -> Tensor:
        state = {**_buffers(network), **own}
        with BatchStatistics(of_first, by_hand=True):
            return functional_call(network, state, (own_images,))

    return torch.func.vmap(run_one, randomness="different")(dict(weights), images)


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
    state = {**_buffers(network), **weights}
    with GroupedTasks(len(images), weights.values(), of_first):
        output = functional_call(network, state, (side_by_side,))
    return output.unflatten(1, (len(images), -1)).transpose(0, 1)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies for a module to change: of the true ones nothing would be left after the next task."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}
