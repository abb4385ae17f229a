"""KochConv against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.koch import KochConv
from tests.embedders.formulas import Weights, batch_norm, check, noise, used


@pytest.mark.parametrize(
    ("with_norms", "training", "channels", "sigmoid"),
    [(True, True, 1, False), (True, False, 3, False), (False, False, 1, True)],
)
def test_outputs_and_gradients_equal_the_layers_written_out(
    with_norms: bool, training: bool, channels: int, sigmoid: bool
) -> None:
    network = used(KochConv(channels, 3, with_norms, sigmoid)).train(training)
    modules = list(network.named_modules())
    convs, norms = ([name for name, part in modules if isinstance(part, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))

    def written_out(weights: Weights, images: Tensor) -> Tensor:
        """Figure 4 of the paper: each convolution, then (batch norm and) ReLU, then pooling after the first three."""
        out = images
        for number, conv in enumerate(convs):
            out = F.conv2d(out, weights[f"{conv}.weight"], weights.get(f"{conv}.bias"))
            out = F.relu(batch_norm(weights, norms[number], out, training) if with_norms else out)
            out = F.max_pool2d(out, 2) if number < 3 else out
        out = out.reshape(len(out), -1) @ weights["linear.weight"].T + weights["linear.bias"]
        return 1 / (1 + (-out).exp()) if sigmoid else out

    check(network, noise(2, channels, 105, 105, seed=9), written_out)


def test_the_widths_and_parameters_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        paper, default, color = KochConv(batch_norm=False, sigmoid=True), KochConv(), KochConv(3, 10)
        assert paper(torch.zeros(2, 1, 105, 105)).shape == default(torch.zeros(2, 1, 105, 105)).shape == (2, 4096)
        assert color(torch.zeros(2, 3, 105, 105)).shape == (2, 10)
    # with the 4,097 of the learned similarity's weights and bias the 38,951,745 of figure 4
    count = sum(p.numel() for p in paper.parameters())
    assert count == 38_951_745 - 4097
    # batch norm makes the convolutions' 576 biases superfluous, and has a weight and a bias for each channel
    assert sum(p.numel() for p in default.parameters()) == count + 576
    assert not default.sigmoid


@pytest.mark.parametrize("shape", [(1, 105, 104), (1, 106, 106), (3, 105, 105)])  # the layers would take 106
def test_images_of_another_size_or_number_of_channels_are_refused(shape: tuple[int, ...]) -> None:
    message = rf"expected images of 1 x 105 x 105, got {shape[0]} x {shape[1]} x {shape[2]}; load .* image_size=105"
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        KochConv(dim=2)(torch.zeros(2, *shape))
