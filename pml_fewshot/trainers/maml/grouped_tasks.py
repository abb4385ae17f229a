"""GroupedTasks: many tasks, each with its own weights, in one pass of a network by grouped convolutions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.trainers.maml.batch_statistics import BatchStatistics


class NotGroupable(RuntimeError):
    """A network does something that is not known to work on tasks side by side in the channels."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not known to work on tasks side by side; use parallel='loop'")


class GroupedTasks(BatchStatistics):
    """Within this context a network that is called with stacked weights runs T tasks at once.

    The tasks lie side by side in the channels: an activation is (B, T * C, H, W), or (B, T * D) behind a flatten, with
    the channels of one task next to each other. A convolution becomes one of T times as many groups; batch norm,
    pooling and whatever else works channel by channel stay what they are, and nothing is moved between layers.

    A function that is not listed here raises NotGroupable: one that mixes channels (softmax, layer norm) would silently
    mix tasks.

    Args:
        images: (T, B, *item), those of the tasks.
        weights, buffers: those that the network is called with, weights (T, *shape), buffers the same for all tasks.
        num_stat_items: as for BatchStatistics.
    """

    def __init__(
        self, images: Tensor, weights: Iterable[Tensor], buffers: Iterable[Tensor], num_stat_items: int | None
    ) -> None:
        self.tasks, num_items = images.shape[:2]
        super().__init__(num_items, num_stat_items)
        self.weights, self.buffers = set(map(id, weights)), set(map(id, buffers))
        self.replacements: dict[Any, Callable[..., Any]] = {
            F.batch_norm: self.batch_norm,
            torch.conv2d: self.conv2d,
            F.linear: self.linear,
            Tensor.shape.__get__: self.shape,  # type: ignore[attr-defined]
            Tensor.size: lambda tensor, *dim: self.shape(tensor)[dim[0]] if dim else self.shape(tensor),
            **dict.fromkeys((torch.flatten, Tensor.flatten), self.flatten),
            **dict.fromkeys((Tensor.view, Tensor.reshape), self.view),
            **dict.fromkeys((torch.mean, Tensor.mean), self.mean),
            Tensor.contiguous: lambda tensor, memory_format=None: tensor,  # the caller of the network chose the layout
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in self.replacements:
            try:
                return self.replacements[func](*args, **kwargs)
            except (TypeError, IndexError) as error:  # called in a way that is not foreseen here
                raise NotGroupable(f"this call of {name}") from error
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        counts_batches = func in (Tensor.add_, Tensor.__float__) and args[0].ndim == 0  # a batch norm's counter
        known = (
            func in CHANNEL_BY_CHANNEL
            or (func in OF_IMAGES and all(tensor.ndim == 4 for tensor in tensors))
            or (func in SUMS and len({tensor.shape for tensor in tensors}) == 1)
        )
        shared = any(id(tensor) in self.weights | self.buffers for tensor in tensors)
        if not counts_batches and (not known or shared):
            raise NotGroupable(name)
        return super().__torch_function__(func, types, args, kwargs)

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape that the network would see if it ran for one task."""
        if id(tensor) in self.weights:
            return tensor.shape[1:]
        if id(tensor) in self.buffers:
            return tensor.shape
        return torch.Size([tensor.shape[0], tensor.shape[1] // self.tasks, *tensor.shape[2:]])

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """(B, T * C, H, W) by weights (T, O, C / groups, h, w): (B, T * O, H', W')."""
        if input.ndim != 4:
            raise NotGroupable("conv2d of anything but (B, C, H, W)")
        weight, bias = self.per_channel(weight), None if bias is None else self.per_channel(bias)
        return torch.conv2d(input, weight, bias, stride, padding, dilation, self.tasks * groups)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T * D) by weights (T, O, D): (B, T * O)."""
        if input.ndim != 2 or not {id(weight), id(weight if bias is None else bias)} <= self.weights:
            raise NotGroupable("linear of anything but (B, D) and a module's weights")
        output = input.unflatten(1, (self.tasks, -1)).transpose(0, 1) @ weight.transpose(1, 2)  # (T, B, O)
        if bias is not None:
            output = output + bias.unsqueeze(1)
        return output.transpose(0, 1).flatten(1)

    def per_channel(self, weight: Tensor) -> Tensor:
        """Weights (T, O, ...) as (T * O, ...)."""
        if id(weight) not in self.weights:
            raise NotGroupable("a weight computed from other weights")
        return weight.flatten(0, 1)

    def flatten(self, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        if start_dim != 1 or end_dim not in (-1, input.ndim - 1):
            raise NotGroupable("flatten other than flatten(1)")
        return input.flatten(1)

    def view(self, input: Tensor, *shape: Any) -> Tensor:
        if shape not in ((len(input), -1), ((len(input), -1),)):
            raise NotGroupable("view other than view(B, -1)")
        return input.flatten(1)

    def mean(self, input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        if input.ndim != 4 or not isinstance(dim, list | tuple) or {d % 4 for d in dim} != {2, 3}:
            raise NotGroupable("any mean but that over height and width")
        return input.mean(dim, keepdim)


# Each gives for (B, T * C, ...) what it would give for the T tasks one by one.
CHANNEL_BY_CHANNEL = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    *(F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid),
    *(F.dropout, Tensor.dim, Tensor.ndim.__get__),  # type: ignore[attr-defined]
}
OF_IMAGES = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout2d}  # likewise for (B, T * C, H, W)
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}  # of two activations
