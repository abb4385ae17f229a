"""ResNet12: the residual network of most few-shot papers since 2018."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm beside a 1x1 shortcut, LeakyReLU, then 2x2 max-pool."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = [in_channels, out_channels, out_channels, out_channels]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, kernel_size=3, padding=1, bias=False) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in self.convs)
        shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, images: Tensor) -> Tensor:
        out = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out if i == 0 else F.leaky_relu(out, 0.1)))
        # pooling before the activation: the same result (LeakyReLU is monotone) with a quarter of the work
        return F.leaky_relu(F.max_pool2d(out + self.shortcut(images), 2), 0.1)


class ResNet12(nn.Module):
    """Four residual blocks of 64, 160, 320 and 640 channels, averaged over the image to 640 dimensions.

    Without DropBlock: no randomness hides in the forward pass.

    Args:
        in_channels: 1 for gray, 3 for color images.
        widths: channels of the four blocks; (64, 128, 256, 512) is the other form in use.

    Shapes: (B, in_channels, H, W) -> (B, widths[-1]); H and W at least 16.

    Source: Lee et al. 2019 (MetaOptNet), section 4.1; Oreshkin et al. 2018 (TADAM).
    """

    def __init__(self, in_channels: int = 3, widths: tuple[int, int, int, int] = (64, 160, 320, 640)) -> None:
        super().__init__()
        ins = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(ins, widths, strict=True)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
