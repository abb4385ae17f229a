"""BatchStatistics: context in which every batch norm uses the statistics of its own input, for MAML."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.conv_norm_pool import by_moments, conv_norm_pool


class BatchStatistics(TorchFunctionMode):
    """Context in which batch norm uses the mean and variance of its own input and leaves running statistics alone.

    A network adapted to a handful of images has no running statistics of its own.

    Args:
        num_items: B, number of items in the batch that the network is called with.
        num_stat_items: number of leading items (the support set) from which mean and variance are taken to normalize
            all items; all items when None.
        decomposed: compute batch norm operation by operation, for `torch.func.vmap`: under it, `F.batch_norm` silently
            returns wrong second-order gradients (torch 2.13: 0.4 to 13 % off) if one derivative is taken within vmap
            and one outside. MAML takes both outside, which was correct on a CPU; single operations always are. Without
            vmap, `F.batch_norm` is correct and faster.
    """

    def __init__(self, num_items: int, num_stat_items: int | None = None, decomposed: bool = False) -> None:
        super().__init__()
        self.num_items, self.num_stat_items, self.decomposed = num_items, num_stat_items, decomposed
        self.was_used = False  # whether the network has any batch norm

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(*args, **kwargs)
        if func is conv_norm_pool:
            return self.conv_norm_pool(*args, **kwargs)
        layout_alone = func in (Tensor.contiguous, Tensor.to) and [*args[1:], *kwargs.values()] == [torch.channels_last]
        if self.decomposed and layout_alone:
            return args[0]  # vmap does not support this memory layout
        return func(*args, **kwargs)

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
        """Replaces `F.batch_norm` for (B, C, ...), or for (B * P, C, ...) with P patches of each item."""
        self.was_used = True
        if self.num_stat_items is None and not self.decomposed:
            if input.numel() == input.shape[1]:
                do = 'give more queries at a time, or use trainer.with_batch_norm("inductive")'
                raise UsageError(f"expected at least 2 values per channel for batch norm, got 1; {do}")
            return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
        patches, rest = divmod(len(input), self.num_items)
        if self.num_stat_items is not None and rest:
            got = f"{len(input)} rows for {self.num_items} items"
            do = 'use batch_norm="transductive"'
            raise UsageError(f"expected as many rows of batch norm for each item, got {got}; {do}")
        rows = None if self.num_stat_items is None else self.num_stat_items * patches
        variance, mean = torch.var_mean(input[:rows], dim=[0, *range(2, input.ndim)], correction=0, keepdim=True)
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.reshape(scale.shape)
        normalized = (input - mean) * scale
        return normalized if bias is None else normalized + bias.reshape(scale.shape)

    def conv_norm_pool(self, images: Tensor, weight: Tensor, *of_norm: Any) -> Tensor:
        """Replaces the function of the same name."""
        self.was_used = True
        _, _, scale, shift, _, momentum, eps = of_norm
        if self.num_stat_items is None and not self.decomposed and by_moments(images, weight):
            return conv_norm_pool(images, weight, None, None, scale, shift, True, momentum, eps)
        maps = self.batch_norm(torch.conv2d(images, weight, padding=1), None, None, scale, shift, eps=eps)
        return F.max_pool2d(maps, 2)
