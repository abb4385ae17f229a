"""Autograd tools for MAML: recomputed steps, second derivatives of distances, a loss with a known gradient."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# step(inputs, create_graph) takes a derivative itself; create_graph says whether the step will be differentiated
Step = Callable[[Sequence[Tensor], bool], Sequence[Tensor]]


class Recompute(torch.autograd.Function):
    """`Recompute.apply(step, len(inputs), *inputs, *parameters)` is `step(inputs, create_graph)` without its graph.

    The backward pass builds, uses and frees it. `parameters` are leaves that the step uses without receiving them as
    inputs, such as those of a loss. `torch.utils.checkpoint` does the same for most functions. For one that takes a
    derivative itself, it runs the forward pass three times instead of twice, and keeps the second's activations (2.13).
    """

    @staticmethod
    def forward(ctx: Any, step: Step, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.num_inputs = step, num_inputs
        ctx.save_for_backward(*tensors)
        ctx.gpus = [tensors[0].device] if tensors[0].is_cuda else []
        ctx.generators = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in ctx.gpus]
        with torch.enable_grad():
            return tuple(output.detach() for output in step(_leaves(tensors[:num_inputs]), False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        inputs, parameters = _leaves(ctx.saved_tensors[: ctx.num_inputs]), ctx.saved_tensors[ctx.num_inputs :]
        of_cpu, of_gpus = ctx.generators
        with torch.random.fork_rng(ctx.gpus), torch.enable_grad():  # dropout must repeat the draws of the forward pass
            torch.set_rng_state(of_cpu)
            for gpu, state in zip(ctx.gpus, of_gpus, strict=True):
                torch.cuda.set_rng_state(state, gpu)
            outputs = ctx.step(inputs, True)
        tensors = [*inputs, *parameters]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(outputs, wanted, slopes, allow_unused=True))
        return None, None, *(next(gradients) if tensor.requires_grad else None for tensor in tensors)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


class DoubleBackward(TorchFunctionMode):
    """Context in which distances can be differentiated twice, in this thread.

    `torch.cdist` has no second derivative (torch 2.13), and PML's LpDistance uses it, so without this most of PML's
    losses could not be second-order inner losses. Here it is a norm of differences, (B, R, D) numbers, which a
    small support set allows.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_cdist if func is torch.cdist else func)(*args, **(kwargs or {}))


def differentiable_attention() -> AbstractContextManager[None]:
    """Context in which attention uses matrix products, because its fused kernels have no second derivative.

    The switch is process-wide: threads that set and reset it would do so for each other.
    """
    return sdpa_kernel(SDPBackend.MATH)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Replaces `torch.cdist`: (..., B, D) and (..., R, D) to (..., B, R), with derivative 0 where two are equal."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    equal = (difference == 0).all(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(difference.masked_fill(equal, 1), p, dim=-1).masked_fill(equal.squeeze(-1), 0)


class WithGradient(torch.autograd.Function):
    """`WithGradient.apply(loss, gradients, *parameters)` is the loss, whose `backward()` produces those gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(scale * gradient for gradient in ctx.gradients)
