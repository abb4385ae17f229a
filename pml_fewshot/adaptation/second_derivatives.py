"""SecondDerivatives: while it is on, distances and attention are computed so that they can be differentiated twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class SecondDerivatives(TorchFunctionMode):
    """Within this context `torch.cdist`, which has no second derivative (torch 2.13), is a norm of differences.

    PML's LpDistance uses it, so without this most of PML's losses could not be inner losses of second order. The
    differences are (B, R, D) numbers: a support set is small. Attention goes by matrix products, for the fused kernels
    have no second derivative either.
    """

    def __enter__(self) -> "SecondDerivatives":
        self.attention = sdpa_kernel(SDPBackend.MATH)
        self.attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.attention.__exit__(*raised)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.cdist:
            return distances(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Stands for `torch.cdist`: (..., B, D) and (..., R, D) to (..., B, R), with derivative 0 where two are equal."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    equal = (difference == 0).all(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(difference.masked_fill(equal, 1), p, dim=-1).masked_fill(equal.squeeze(-1), 0)
