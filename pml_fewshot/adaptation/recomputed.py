"""recomputed: a gradient step that keeps nothing of its way in memory, and goes it again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# step(inputs, create_graph) takes a derivative within; create_graph says whether it will itself be differentiated
Step = Callable[[Sequence[Tensor], bool], Sequence[Tensor]]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.num_inputs = step, num_inputs
        ctx.save_for_backward(*tensors)
        ctx.generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if tensors[0].is_cuda else []
        with torch.enable_grad():
            outputs = step([tensor.detach().requires_grad_() for tensor in tensors[:num_inputs]], False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors[: ctx.num_inputs]]
        of_cpu, of_gpus = ctx.generators
        with torch.random.fork_rng(range(len(of_gpus))), torch.enable_grad():  # dropout must draw what it drew
            torch.set_rng_state(of_cpu)
            if of_gpus:
                torch.cuda.set_rng_state_all(of_gpus)
            outputs = ctx.step(inputs, True)
        others = [tensor for tensor in ctx.saved_tensors[ctx.num_inputs :] if tensor.requires_grad]
        gradients = list(torch.autograd.grad(outputs, [*inputs, *others], slopes, allow_unused=True))
        of_inputs, of_others = gradients[: ctx.num_inputs], iter(gradients[ctx.num_inputs :])
        rest = [next(of_others) if t.requires_grad else None for t in ctx.saved_tensors[ctx.num_inputs :]]
        return None, None, *of_inputs, *rest


def recomputed(step: Step, inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Returns what `step(inputs, create_graph)` gives; its graph is made in the backward pass, and freed there.

    `torch.utils.checkpoint` does the same for most functions; of one that takes a derivative within it runs the way
    three times in place of two, and keeps the activations of the second (torch 2.13).

    Args:
        step: what to do.
        inputs: tensors it depends on.
        parameters: leaves that it uses without being handed them, such as those of a loss.
    """
    return _Recomputed.apply(step, len(inputs), *inputs, *parameters)
