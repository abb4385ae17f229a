"""with_gradient: a loss whose gradient is known already, so that the graph it came from can be forgotten."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _PrecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(scale * gradient for gradient in ctx.gradients)


def with_gradient(loss: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns the scalar `loss`, whose backward pass gives these gradients to these parameters."""
    return _PrecomputedGradient.apply(loss.detach(), gradients, *parameters)
