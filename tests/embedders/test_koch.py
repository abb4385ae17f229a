"""KochConv against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.embedders.koch import KochConv

DIM = 3
NORMS = pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", "plain"])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lived_in(batch_norm: bool, in_channels: int = 1, sigmoid: bool = False) -> KochConv:
    """A network in float64, of which no weight, bias or running statistic is 0 or 1."""
    with torch.device("meta"):  # nothing is drawn that is overwritten below
        network = KochConv(in_channels, DIM, batch_norm, sigmoid).double()
    network.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, value) in enumerate(network.state_dict().items()):
            if name.endswith("num_batches_tracked"):
                value.zero_()
            elif name.endswith("running_var"):
                value.copy_(noise(*value.shape, seed=number) + 0.5)
            elif value.ndim > 1:  # as large as keeps the signal's size from layer to layer
                value.copy_((noise(*value.shape, seed=number) - 0.5) * (12 / value[0].numel()) ** 0.5)
            else:
                value.copy_(noise(*value.shape, seed=number) - 0.3)  # negative ones too
    return network.to(memory_format=torch.channels_last)


def of_kind(network: KochConv, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


def written_out(network: KochConv, images: Tensor, parameters: dict[nn.Parameter, Tensor] | None = None) -> Tensor:
    """Figure 4 of the paper: each convolution, then (batch norm and) ReLU, then pooling after the first three."""

    def own(parameter: nn.Parameter | None) -> Tensor | None:
        return parameter if parameter is None or parameters is None else parameters[parameter]

    out, norms = images, of_kind(network, nn.BatchNorm2d)
    for number, conv in enumerate(of_kind(network, nn.Conv2d)):
        out = F.conv2d(out, own(conv.weight), own(conv.bias))
        if norms:
            norm = norms[number]
            mean, var = norm.running_mean, norm.running_var
            if network.training:
                mean, var = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3), unbiased=False)
            out = (out - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
            out = out * own(norm.weight).view(1, -1, 1, 1) + own(norm.bias).view(1, -1, 1, 1)
        out = F.relu(out)
        if number < 3:
            out = F.max_pool2d(out, 2)
    (linear,) = of_kind(network, nn.Linear)
    out = out.reshape(len(out), -1) @ own(linear.weight).T + own(linear.bias)
    return 1 / (1 + (-out).exp()) if network.sigmoid else out


@pytest.mark.parametrize(
    ("batch_norm", "training"), [(True, True), (True, False), (False, True)], ids=["norm", "norm in eval mode", "plain"]
)
def test_outputs_and_gradients_equal_the_layers_written_out(batch_norm: bool, training: bool) -> None:
    network = lived_in(batch_norm).train(training)
    images = noise(2, 1, 105, 105, seed=9).requires_grad_()
    own = {parameter: parameter.detach().clone().requires_grad_() for parameter in network.parameters()}
    expected = written_out(network, images, own)
    out = network(images)
    assert out.shape == (2, DIM)
    assert (out[0] - out[1]).abs().max() > 1e-4
    torch.testing.assert_close(out, expected)
    pull = noise(*out.shape, seed=3)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    names = ["images", *(name for name, _ in network.named_parameters())]
    assert len(names) == 1 + 4 * (3 if batch_norm else 2) + 2
    for name, gradient, wanted in zip(names, gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


@NORMS
def test_a_sigmoid_stands_at_the_end_where_asked_for(batch_norm: bool) -> None:
    images = noise(1, 1, 105, 105, seed=9)
    with torch.no_grad():
        plain = lived_in(batch_norm).eval()(images)
        network = lived_in(batch_norm, sigmoid=True).eval()
        squashed = network(images)
        torch.testing.assert_close(squashed, written_out(network, images))
    assert (plain < 0).any()
    assert ((squashed > 0) & (squashed < 1)).all()
    torch.testing.assert_close(squashed, torch.sigmoid(plain))


def test_colour_images_in_float32() -> None:
    network = lived_in(True, in_channels=3).eval()
    images = noise(2, 3, 105, 105, seed=4)
    with torch.no_grad():
        expected = written_out(network, images)
        got = network.float()(images.float())
        other = network(images.float().flip(1))
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert (other - got).abs().max() > 1e-3  # each channel has weights of its own


def test_the_memory_layout_of_the_images_changes_nothing_and_they_stay_as_they_are() -> None:
    network, images = lived_in(True).eval(), noise(1, 1, 105, 105)
    before = images.clone()
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), expected)
        torch.testing.assert_close(network(images.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert torch.equal(images, before)


def test_running_statistics_move_by_a_tenth_of_the_batchs() -> None:
    network, images = lived_in(True).train(), noise(2, 1, 105, 105)
    (norm, *_), (conv, *_) = of_kind(network, nn.BatchNorm2d), of_kind(network, nn.Conv2d)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        first = F.conv2d(images, conv.weight)
        network(images)
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * first.var(dim=(0, 2, 3)))


def test_each_layer_has_a_batch_norm_of_its_own_or_none() -> None:
    with torch.device("meta"):
        norms = of_kind(KochConv(dim=2), nn.BatchNorm2d)
        plain = KochConv(dim=2, batch_norm=False)
    assert [norm.num_features for norm in norms] == [64, 128, 128, 256]
    assert of_kind(plain, nn.BatchNorm2d) == []
    assert all(conv.bias is not None for conv in of_kind(plain, nn.Conv2d))


def test_the_widths_and_parameters_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        paper, default, colour = KochConv(batch_norm=False, sigmoid=True), KochConv(), KochConv(3, 10)
        assert paper(torch.zeros(2, 1, 105, 105)).shape == (2, 4096)
        assert default(torch.zeros(2, 1, 105, 105)).shape == (2, 4096)
        assert colour(torch.zeros(2, 3, 105, 105)).shape == (2, 10)
    # with the 4,097 of the learned similarity's weights and bias the 38,951,745 of figure 4
    count = sum(p.numel() for p in paper.parameters())
    assert count == 38_951_745 - 4097
    # batch norm takes the convolutions' 576 biases off again, and has a weight and a bias for each channel
    assert sum(p.numel() for p in default.parameters()) == count + 576
    assert (default.sigmoid, colour.sigmoid) == (False, False)


def test_an_image_costs_as_many_multiplications_as_the_docstring_says() -> None:
    with torch.device("meta"):
        network, costs = KochConv(), []
        for layer in of_kind(network, nn.Conv2d):
            layer.register_forward_hook(
                lambda conv, inputs, out: costs.append(conv.weight.numel() * out.shape[2] * out.shape[3])
            )
        network(torch.zeros(1, 1, 105, 105))
    assert len(costs) == 4
    assert (sum(costs) + 9216 * 4096) / 1e9 == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((1, 105, 104), "1 x 105 x 104"),
        ((1, 28, 28), "1 x 28 x 28"),
        ((1, 106, 106), "1 x 106 x 106"),  # the layers would take it
        ((3, 105, 105), "3 x 105 x 105"),
    ],
)
def test_images_of_another_size_or_number_of_channels_are_refused(shape: tuple[int, ...], got: str) -> None:
    with torch.device("meta"):
        network = KochConv(dim=2)
        with pytest.raises(ValueError, match=rf"expected images of 1 x 105 x 105, got {got}; load .* image_size=105"):
            network(torch.zeros(2, *shape))
        with pytest.raises(ValueError, match=r"expected images of 3 x 105 x 105, got 1 x 105 x 105"):
            KochConv(3, dim=2)(torch.zeros(2, 1, 105, 105))
