"""Conv4 against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.conv4 import Conv4


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def used(last_relu: bool = True) -> Conv4:
    """A network whose batch norms have been used: no weight, bias or running statistic is 0 or 1."""
    network = Conv4(2, 6) if last_relu else Conv4(2, 6, last_relu=False)  # a ReLU is the default
    network.double()
    with torch.no_grad():
        for i, block in enumerate(network.blocks):
            norm = block.norm
            block.conv.weight.copy_(noise(*block.conv.weight.shape, seed=i) - 0.5)
            norm.weight.copy_(noise(6, seed=10 + i) - 0.3)  # negative ones too
            norm.bias.copy_(noise(6, seed=20 + i) - 0.5)
            norm.running_mean.copy_(noise(6, seed=30 + i) - 0.5)
            norm.running_var.copy_(noise(6, seed=40 + i) + 0.5)
    return network


def written_out(weights: dict[str, Tensor], images: Tensor, training: bool, last_relu: bool = True) -> Tensor:
    out = images
    for i in range(4):
        of = {name: weights[f"blocks.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias")}
        out = F.conv2d(out, of["conv.weight"], padding=1)
        mean, var = weights[f"blocks.{i}.norm.running_mean"], weights[f"blocks.{i}.norm.running_var"]
        if training:
            mean, var = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3), unbiased=False)
        out = (out - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        out = out * of["norm.weight"].view(1, -1, 1, 1) + of["norm.bias"].view(1, -1, 1, 1)
        out = F.max_pool2d(F.relu(out) if i < 3 or last_relu else out, 2)
    return out.flatten(1)


@pytest.mark.parametrize(("training", "last_relu"), [(True, True), (False, True), (True, False), (False, False)])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool, last_relu: bool):
    network = used(last_relu).train(training)
    images = noise(5, 2, 33, 17, seed=9).requires_grad_()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: weights[name].detach().clone().requires_grad_() for name, _ in network.named_parameters()}
    expected = written_out(weights | own, images, training, last_relu)
    assert (expected < 0).any() == (not last_relu)
    out = network(images)
    torch.testing.assert_close(out, expected)
    pull = noise(*out.shape, seed=3) - 0.5
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    assert len(gradients) == len(slow) == 13
    for name, gradient, wanted in zip(["images", *own], gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("last_relu", [True, False])
def test_folded_batch_norm_gives_the_same_without_gradients(last_relu: bool):
    network, images = used(last_relu).eval(), noise(5, 2, 28, 28)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = written_out(before, images, False, last_relu)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(network(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_without_gradients_uses_the_batch_and_moves_running_statistics_by_a_tenth():
    network, images = used(), noise(5, 2, 28, 28)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(network(images), written_out(before, images, training=True))
    first = F.conv2d(images, before["blocks.0.conv.weight"], padding=1)
    norm, old = network.blocks[0].norm, "blocks.0.norm.running_"
    torch.testing.assert_close(norm.running_mean, 0.9 * before[f"{old}mean"] + 0.1 * first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 * before[f"{old}var"] + 0.1 * first.var(dim=(0, 2, 3)))


def test_batch_norm_left_in_training_mode_is_not_folded():
    """The transductive way: all in eval mode but the norms, which use the statistics of the batch."""
    network, images = used().eval(), noise(5, 2, 28, 28)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for block in network.blocks:
        block.norm.train()
    with torch.no_grad():
        torch.testing.assert_close(network(images), written_out(before, images, training=True))


@pytest.mark.parametrize(("size", "dims"), [(28, 64), (84, 1600), (16, 64), (32, 256)])
def test_dimensions_and_parameters_are_those_of_the_papers(size: int, dims: int):
    network = Conv4(in_channels=3).eval()
    with torch.no_grad():
        assert network(noise(2, 3, size, size, dtype=torch.float32)).shape == (2, dims)
    # 111,936 with the biases of the convolutions (Snell et al.'s code), which batch norm subtracts again
    assert sum(p.numel() for p in Conv4(1).parameters()) == 111_936 - 4 * 64


def test_images_that_four_poolings_would_leave_nothing_of_are_refused():
    with pytest.raises(UsageError, match=r"expected images of 1 channels and at least 16 x 16 .*, got 1 .* 15 x 28"):
        Conv4(1)(torch.zeros(2, 1, 15, 28))
    with pytest.raises(UsageError, match="got 3 channels"):
        Conv4(1)(torch.zeros(2, 3, 28, 28))
