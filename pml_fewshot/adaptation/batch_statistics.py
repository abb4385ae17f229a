"""BatchStatistics: while it is on, every batch norm uses the statistics of its own input, as MAML wants."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pml_fewshot.checks import require


class BatchStatistics(TorchFunctionMode):
    """Within this context batch norm uses mean and variance of its own input, and neither reads nor keeps running ones.

    A network that was adapted to a handful of images has no running statistics of its own.

    Args:
        items: in the batch that the network is called with.
        of_first: take mean and variance from the first so many of them (the support set) and normalise all by them;
            from all when None.
        by_hand: compute from mean and variance, operation by operation. `F.batch_norm` under `torch.func.vmap` gives
            wrong second-order gradients without a word (torch 2.13: 0.4 to 13 % off) where one derivative is taken
            within vmap and one outside of it. Both are taken outside here, which came out right on a CPU; these
            operations are right in every order. Without vmap `F.batch_norm` is right and faster.
    """

    def __init__(self, items: int, of_first: int | None = None, by_hand: bool = False) -> None:
        super().__init__()
        self.items = items
        self.of_first = of_first
        self.by_hand = by_hand
        self.was_used = False  # whether there is any batch norm

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        if self.by_hand and func is Tensor.contiguous and torch.channels_last in (*args[1:], *(kwargs or {}).values()):
            return args[0]  # vmap knows no such layout of memory
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
        """Stands for `F.batch_norm` of (B, C, ...), or of (B * P, C, ...) for P patches of each item."""
        self.was_used = True
        if self.of_first is None and not self.by_hand:
            return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
        rows = None
        if self.of_first is not None:
            require(
                len(input) % self.items == 0,
                f"input of batch norm with as many rows for each of {self.items} items",
                f"{len(input)} rows",
                'use batch_norm="transductive", which needs not know whose they are',
            )
            rows = self.of_first * (len(input) // self.items)
        over = [0, *range(2, input.ndim)]
        variance, mean = torch.var_mean(input[:rows], dim=over, correction=0, keepdim=True)
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.reshape(scale.shape)
        normalised = (input - mean) * scale
        return normalised if bias is None else normalised + bias.reshape(scale.shape)
