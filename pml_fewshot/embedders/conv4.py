"""Conv4: the four-block convolutional network of most few-shot papers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.conv_norm_pool import conv_norm_pool


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, 2x2 max-pool, ReLU.

    Pooling comes before the ReLU: the same result with a quarter of the work. At inference (eval mode, no gradient),
    and in training where `conv_norm_pool` can do it, batch norm is folded into the convolution's weights, which saves a
    pass over the largest tensors; the result is equal up to rounding.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.relu = True
        # no bias: batch norm would subtract it again
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        # neither replaced by other modules nor hooked
        stock = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and not (_hooks(conv) or _hooks(norm))
        if not stock or (norm.training and norm.momentum is None):
            pooled = F.max_pool2d(norm(conv(images)), 2)
        elif norm.training or norm.running_mean is None or norm.running_var is None or torch.is_grad_enabled():
            tracked = norm.training and norm.track_running_stats
            if tracked and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            running = (norm.running_mean, norm.running_var) if tracked or not norm.training else (None, None)
            training = norm.training or norm.running_mean is None
            of_norm = *running, norm.weight, norm.bias, training, norm.momentum or 0.0, norm.eps
            pooled = conv_norm_pool(images, conv.weight, *of_norm)
        else:
            statistics = norm.running_mean, norm.running_var, norm.eps
            weight, bias = fuse_conv_bn_weights(conv.weight, None, *statistics, norm.weight, norm.bias)
            pooled = F.max_pool2d(F.conv2d(images, weight, bias, padding=1), 2)
        return pooled.relu_() if self.relu else pooled


def _hooks(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


class Conv4(nn.Module):
    """Four blocks of [3x3 convolution with `channels` filters, batch norm, ReLU, 2x2 max-pool], flattened.

    Args:
        in_channels: 1 for gray, 3 for color images.
        channels: filters of each block, 64 as in the papers; or four numbers, one per block: (32, 64, 128, 256) gives
            256 dimensions with 10.1 million multiply-adds at 28 x 28 pixels, compared with 9.8 million for 64.
        last_relu: end with a ReLU, as in the papers. Without it embeddings may be negative, which a learned similarity
            of |q - r| needs (SiameseTrainer).
        pool: average each channel over the map. Off, as in the papers: embeddings are the flattened feature map,
            channels first, which distances of local features split into its nodes.

    Shapes: (B, in_channels, H, W) -> (B, D * nodes) for D filters of the last block, with (H // 16) * (W // 16) nodes:
    1 at 28 x 28 (64-d), 9 at 56 x 56, 25 at 84 x 84 (1,600-d); with pool -> (B, D).

    Weights are in channels-last memory, the faster layout for pooling and batch norm on a CPU.

    Raises:
        UsageError: `channels` is neither one number nor four.

    Source: Vinyals et al. 2016, section 4.1; Snell et al. 2017, section 3.1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int | Sequence[int] = 64,
        last_relu: bool = True,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.pool = in_channels, pool
        widths = 4 * [channels] if isinstance(channels, int) else list(channels)
        if len(widths) != 4:
            raise UsageError(f"expected filters of four blocks, got {channels}; give one number, or four")
        blocks = [ConvBlock(i, o) for i, o in pairwise([in_channels, *widths])]
        blocks[-1].relu = last_relu
        self.blocks = nn.Sequential(*blocks)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        if channels != self.in_channels or min(height, width) < 16:
            wanted = f"images of {self.in_channels} channels and at least 16 x 16 pixels"
            got = f"{channels} channels of {height} x {width}"
            raise UsageError(f"expected {wanted}, got {got}; set in_channels, or load larger images")
        # (`.contiguous` would leave images of one channel in a layout that convolutions mistake for the other)
        maps = self.blocks(images.to(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3)) if self.pool else maps.flatten(1)
