"""BatchStatistics: while it is on, every batch norm uses the statistics of its own input, as MAML wants."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BatchStatistics(TorchFunctionMode):
    """Within this context batch norm uses mean and variance of its own input, and neither reads nor keeps running ones.

    A network that was adapted to a handful of images has no running statistics of its own.

    Args:
        of_first: take mean and variance from the first so many items of the batch (the support set) and normalise all
            by them; from all items when None.
        by_hand: compute from mean and variance, operation by operation. Where one derivative is taken within
            `torch.func.vmap` and another outside of it, `F.batch_norm` gives wrong second ones without a word (torch
            2.13: 0.4 to 13 % off); these operations give right ones in every order. Outside of vmap `F.batch_norm` is
            right too, and faster.
    """

    def __init__(self, of_first: int | None = None, by_hand: bool = False) -> None:
        super().__init__()
        self.of_first = of_first
        self.by_hand = by_hand

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        if (
            func is Tensor.contiguous
        ):  # whoever calls the network chose the layout, and vmap knows no other than its own
            return args[0]
        return func(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Stands for `F.batch_norm` of (B, C, ...)."""
        if self.of_first is None and not self.by_hand:
            return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
        over = [0, *range(2, input.ndim)]
        variance, mean = torch.var_mean(input[: self.of_first], dim=over, correction=0, keepdim=True)
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.reshape(scale.shape)
        normalised = (input - mean) * scale
        return normalised if bias is None else normalised + bias.reshape(scale.shape)
