"""conv_norm_pool: fused 3x3 convolution, batch norm and max-pool, without a pass over the convolution's output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from pml_fewshot.embedders.modes import plainly

# Largest patch, C * 9 numbers, whose covariance is cheap: that of the first layer for gray and color images
FEW = 27
PATCH_NUMBERS = 2**17  # at a time: 1 MiB in float64 stays in a core's cache
OUTPUT_NUMBERS = 2**20  # per thread at a time: 20 images of 28 x 28


def conv_norm_pool(
    images: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Images (B, C, H, W) and weights (O, C, 3, 3) to (B, O, H // 2, W // 2); the rest as in `F.batch_norm`.

    A convolution is linear in its input patches. So in training the mean and variance of its output follow from the
    patches' mean m (K,) and covariance S (K, K), K = C * 9: for weights w (O, K) they are w m and the diagonal of
    w S w', in float64. Batch norm then scales the weights and shifts the pooled output, and the convolution's output,
    in the first layer by far the largest tensor of a network, is neither read nor written for it, forward or backward.

    So the output is needed for only a few images at a time, which stay in the cache until they are pooled. All this is
    done where it pays off, in the first layer on a CPU, and if the images need no gradient; otherwise the three
    operations run in turn. It can be differentiated twice. A `TorchFunctionMode` sees all three as this one function.
    """
    if has_torch_function((images, weight)):
        arguments = images, weight, running_mean, running_var, scale, shift, training, momentum, eps
        return handle_torch_function(conv_norm_pool, (images, weight), *arguments)
    if not (training and by_moments(images, weight)):
        maps = F.batch_norm(
            torch.conv2d(images, weight, padding=1), running_mean, running_var, scale, shift, training, momentum, eps
        )
        return F.max_pool2d(maps, 2)
    patch_mean, covariance = patch_moments(images)
    rows = weight.flatten(1).double()  # the variance of an edge filter on smooth images cancels in float32
    mean, variance = (rows @ patch_mean).to(weight), ((rows @ covariance) * rows).sum(dim=1).clamp_min(0).to(weight)
    if running_mean is not None and running_var is not None:
        count = images.numel() // images.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var), momentum)  # unbiased, as in torch
    factor = (variance + eps).rsqrt()
    factor = factor if scale is None else factor * scale
    offset = -mean * factor if shift is None else shift - mean * factor
    return _ConvPool.apply(weight * factor[:, None, None, None], images) + offset[:, None, None]


def by_moments(images: Tensor, weight: Tensor) -> bool:
    """Whether training statistics are computed from the patches."""
    on_cpu = images.device.type == "cpu" and len(images) > 0 and not images.requires_grad
    precise = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return on_cpu and precise and weight[0].numel() <= FEW and plainly()


@torch.no_grad()
def patch_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (K,) and covariance (K, K) of the padded 3x3 patches around each pixel of (B, C, H, W), in float64."""
    size = images.shape[1] * 9
    # close to the mean: subtracting it keeps the squares from canceling
    center = images.mean(dim=(0, 2, 3)).repeat_interleave(9).unsqueeze(1)
    sums = images.new_zeros(size, dtype=torch.float64)
    squares = images.new_zeros(size, size, dtype=torch.float64)
    padded = F.pad(images, (1, 1, 1, 1))
    for part in padded.split(max(1, PATCH_NUMBERS // max(1, 9 * images[0].numel()))):
        patches = part.unfold(2, 3, 1).unfold(3, 3, 1).permute(1, 4, 5, 0, 2, 3).reshape(size, -1) - center
        patches = patches.double()
        sums += patches.sum(dim=1)
        squares += patches @ patches.T
    count = images.numel() // images.shape[1]
    mean = sums / count
    return mean + center.squeeze(1), squares / count - mean.outer(mean)


# The functions below take 2 x 2 windows: kernel, stride, padding, dilation, ceil_mode
WINDOWS = ([2, 2], [2, 2], [0, 0], [1, 1], False)


class _ConvPool(torch.autograd.Function):
    """Weights (O, C, 3, 3) and images (B, C, H, W) to the pooled convolution (B, O, H // 2, W // 2), linear in weights.

    Both passes process a few images at a time, so that nothing the size of the convolution's output leaves the cache.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        pooled = _empty(images, batch, len(weight), height // 2, width // 2)
        places = torch.empty_like(pooled, dtype=torch.int64)
        for part in _parts(images, weight):
            maps = torch.conv2d(images[part], weight, padding=1)
            torch.ops.aten.max_pool2d_with_indices.out(maps, *WINDOWS, out=pooled[part], indices=places[part])
        ctx.save_for_backward(weight, images, places)
        return pooled

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return _ConvPoolBackward.apply(slope, *ctx.saved_tensors), None


class _ConvPoolBackward(torch.autograd.Function):
    """Maps the gradient of the pooled output to that of the weights, linearly."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, weight: Tensor, images: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(weight, images, places)
        of_weight = torch.zeros_like(weight)
        slope = slope.contiguous(memory_format=torch.channels_last)
        parts = _parts(images, weight)
        room = _empty(images, parts[0].stop, len(weight), *images.shape[2:])
        for part in parts:
            maps = room[: len(images[part])]
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                slope[part], maps, *WINDOWS, places[part], grad_input=maps
            )
            of_weight += torch.ops.aten.convolution_backward(
                maps, images[part], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )[1]
        return of_weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weighed: Tensor) -> tuple[Tensor | None, ...]:
        weight, images, places = ctx.saved_tensors
        of_slope = torch.empty_like(places, dtype=images.dtype)
        for part in _parts(images, weight):
            maps = torch.conv2d(images[part], weighed, padding=1)
            of_slope[part] = maps.flatten(2).gather(2, places[part].flatten(2)).view_as(of_slope[part])
        return of_slope, None, None, None


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _parts(images: Tensor, weight: Tensor) -> list[slice]:
    """Slices of a few images each."""
    size = max(1, OUTPUT_NUMBERS * torch.get_num_threads() // (len(weight) * images[0, 0].numel()))
    return [slice(start, min(start + size, len(images))) for start in range(0, len(images), size)]
