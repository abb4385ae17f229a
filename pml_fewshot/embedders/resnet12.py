"""ResNet12: the residual network of most few-shot papers since 2018."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm plus a 1x1 shortcut, LeakyReLU, then 2x2 max-pool."""

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
    """Four residual blocks of 64, 160, 320 and 640 channels, averaged over the image to 640 dimensions (`pool`).

    There is no DropBlock, so the forward pass has no hidden randomness.

    Args:
        in_channels: 1 for gray, 3 for color images.
        widths: channels of the four blocks; (64, 128, 256, 512) is the other variant in use.
        pool: average each channel over the map, as in the papers. If False, embeddings are the flattened feature map,
            channels first, which distances of local features split into its nodes.

    Shapes: (B, in_channels, H, W) -> (B, widths[-1]); H and W at least 16. Without pool -> (B, widths[-1] * nodes) with
    (H // 16) * (W // 16) nodes: at 84 x 84 there are 25, so 16,000-d, and a bank of 3,000 images takes 192 MB.

    Source: Lee et al. 2019 (MetaOptNet), section 4.1; Oreshkin et al. 2018 (TADAM).
    """

    def __init__(
        self, in_channels: int = 3, widths: tuple[int, int, int, int] = (64, 160, 320, 640), pool: bool = True
    ) -> None:
        super().__init__()
        self.pool = pool
        ins = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(ins, widths, strict=True)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(images.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3)) if self.pool else maps.flatten(1)
