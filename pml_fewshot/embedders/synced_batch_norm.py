"""SyncedBatchNorm: a context in which batch norm computes its statistics over the items of all processes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pml_fewshot.distributed import Summed, world
from pml_fewshot.embedders.conv_norm_pool import conv_norm_pool


def synced() -> AbstractContextManager[object]:
    """SyncedBatchNorm if several processes are set to use it; around a backward pass too, which may rerun layers."""
    return SyncedBatchNorm() if world().sync_batch_norm and world().size > 1 else nullcontext()


class SyncedBatchNorm(TorchFunctionMode):
    """A context in which batch norm in training uses the mean and variance over all processes, as one process would.

    The mean comes first, then the squares of the centered values, as a difference of squares would round; at least
    float32. torch's own SyncBatchNorm does the same on GPUs in one kernel, but refuses a CPU (2.13), and replaces a
    network's layers with its own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is conv_norm_pool:
            images, weight, *of_norm = args
            return F.max_pool2d(_batch_norm(torch.conv2d(images, weight, padding=1), *of_norm), 2)
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Replaces `F.batch_norm` of (B, C, ...), where each process has its own B."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    rows = input.to(torch.promote_types(input.dtype, torch.float32))
    dims, shape = [0, *range(2, input.ndim)], (1, -1, *(1,) * (input.ndim - 2))
    count = Summed.apply(rows.new_tensor([float(input.numel() // input.shape[1])]))
    mean = Summed.apply(rows.sum(dims)) / count
    centered = rows - mean.view(shape)
    variance = Summed.apply(centered.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)  # unbiased, as in torch
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    output = centered * scale.view(shape)
    return (output if bias is None else output + bias.view(shape)).to(input.dtype)
