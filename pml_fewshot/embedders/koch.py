"""KochConv: the convolutional trunk of Siamese networks for 105 x 105 images (Koch et al. 2015)."""

import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError


class KochConv(nn.Module):
    """Four convolutions (10x10, 7x7, 4x4, 4x4) with ReLU, three 2x2 max-pools, and a linear layer.

    Args:
        in_channels: 1 for gray, 3 for color images.
        dim: width of the linear layer; 4,096 as in the paper.
        batch_norm: batch norm after each convolution, which the paper does not use. On by default, as in Conv4.
        sigmoid: end in a sigmoid, as in the paper. Off by default; SiameseTrainer explains why.

    Shapes: (B, in_channels, 105, 105) -> (B, dim). An image costs 0.9 billion multiply-adds.

    Source: Koch, Zemel and Salakhutdinov 2015, "Siamese Neural Networks for One-shot Image Recognition", figure 4.
    """

    def __init__(self, in_channels: int = 1, dim: int = 4096, batch_norm: bool = True, sigmoid: bool = False) -> None:
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        for inputs, outputs, size, pool in (
            (in_channels, 64, 10, True),  # 105 -> 96 -> 48
            (64, 128, 7, True),  # 42 -> 21
            (128, 128, 4, True),  # 18 -> 9
            (128, 256, 4, False),  # 6
        ):
            layers.append(nn.Conv2d(inputs, outputs, size, bias=not batch_norm))
            # pooling before the ReLU: the same result with a quarter of the work
            layers += [nn.BatchNorm2d(outputs)] * batch_norm + [nn.MaxPool2d(2)] * pool + [nn.ReLU(inplace=True)]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(256 * 6 * 6, dim)
        self.sigmoid = sigmoid
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (self.in_channels, 105, 105):
            got = " x ".join(map(str, images.shape[1:]))
            raise UsageError(f"expected images of {self.in_channels} x 105 x 105, got {got}; load with image_size=105")
        embeddings = self.linear(self.convolutions(images.contiguous(memory_format=torch.channels_last)).flatten(1))
        return embeddings.sigmoid() if self.sigmoid else embeddings
