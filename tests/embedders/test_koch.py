"""KochConv against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.koch import KochConv


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(batch_norm: bool, in_channels: int = 1, sigmoid: bool = False) -> KochConv:
    """A network in float64, of which no weight, bias or running statistic is 0 or 1."""
    network = KochConv(in_channels, 3, batch_norm, sigmoid).double()
    with torch.no_grad():
        for number, (name, value) in enumerate(network.state_dict().items()):
            if name.endswith("running_var"):
                value.copy_(noise(*value.shape, seed=number) + 0.5)
            elif value.ndim > 1:  # as large as keeps the signal's size from layer to layer
                value.copy_((noise(*value.shape, seed=number) - 0.5) * (12 / value[0].numel()) ** 0.5)
            elif value.ndim == 1:
                value.copy_(noise(*value.shape, seed=number) - 0.3)  # negative ones too
    return network


def of_kind(network: KochConv, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


def written_out(network: KochConv, images: Tensor, own: dict[nn.Parameter | None, Tensor | None]) -> Tensor:
    """Figure 4 of the paper: each convolution, then (batch norm and) ReLU, then pooling after the first three."""
    out, norms = images, of_kind(network, nn.BatchNorm2d)
    for number, conv in enumerate(of_kind(network, nn.Conv2d)):
        out = F.conv2d(out, own[conv.weight], own[conv.bias])
        if norms:
            norm = norms[number]
            mean, var = norm.running_mean, norm.running_var
            if network.training:
                mean, var = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3), unbiased=False)
            out = (out - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
            out = out * own[norm.weight].view(1, -1, 1, 1) + own[norm.bias].view(1, -1, 1, 1)
        out = F.max_pool2d(F.relu(out), 2) if number < 3 else F.relu(out)
    (linear,) = of_kind(network, nn.Linear)
    out = out.reshape(len(out), -1) @ own[linear.weight].T + own[linear.bias]
    return 1 / (1 + (-out).exp()) if network.sigmoid else out


@pytest.mark.parametrize(
    ("batch_norm", "training", "channels", "sigmoid"),
    [(True, True, 1, False), (True, False, 3, False), (False, False, 1, True)],
)
def test_outputs_and_gradients_equal_the_layers_written_out(
    batch_norm: bool, training: bool, channels: int, sigmoid: bool
) -> None:
    network = used(batch_norm, channels, sigmoid).train(training)
    images = noise(2, channels, 105, 105, seed=9).requires_grad_()
    own = {parameter: parameter.detach().clone().requires_grad_() for parameter in network.parameters()}
    expected, out = written_out(network, images, {None: None, **own}), network(images)
    assert (out[0] - out[1]).abs().max() > 1e-4
    torch.testing.assert_close(out, expected)
    pull = noise(*out.shape, seed=3)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    names = ["images", *(name for name, _ in network.named_parameters())]
    for name, gradient, wanted in zip(names, gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


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
