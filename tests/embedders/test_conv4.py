"""Conv4 against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.embedders.conv4 import Conv4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def lived_in(in_channels: int = 2, channels: int = 6, dtype: torch.dtype = torch.float64) -> Conv4:
    """A network whose batch norms have been used: no weight, bias or running statistic is 0 or 1."""
    network = Conv4(in_channels, channels).to(dtype)
    with torch.no_grad():
        for i, block in enumerate(network.blocks):
            norm, shape = block.norm, (channels,)
            block.conv.weight.copy_(torch.randn(block.conv.weight.shape, generator=seeded(i), dtype=dtype) * 0.3)
            norm.weight.copy_(noise(*shape, seed=10 + i, dtype=dtype) - 0.3)  # negative ones too
            norm.bias.copy_(noise(*shape, seed=20 + i, dtype=dtype) - 0.5)
            norm.running_mean.copy_(noise(*shape, seed=30 + i, dtype=dtype) - 0.5)
            norm.running_var.copy_(noise(*shape, seed=40 + i, dtype=dtype) + 0.5)
    return network


def written_out(weights: dict[str, Tensor], images: Tensor, training: bool) -> Tensor:
    out = images
    for i in range(4):
        of = {name: weights[f"blocks.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias")}
        out = F.conv2d(out, of["conv.weight"], padding=1)
        if training:
            mean = out.mean(dim=(0, 2, 3))
            var = out.var(dim=(0, 2, 3), unbiased=False)
        else:
            mean, var = weights[f"blocks.{i}.norm.running_mean"], weights[f"blocks.{i}.norm.running_var"]
        out = (out - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        out = out * of["norm.weight"].view(1, -1, 1, 1) + of["norm.bias"].view(1, -1, 1, 1)
        out = F.max_pool2d(F.relu(out), 2)
    return out.flatten(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (33, 16)])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool, size: tuple[int, int]):
    network = lived_in().train(training)
    images = noise(5, 2, *size, seed=9).requires_grad_()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: weights[name].detach().clone().requires_grad_() for name, _ in network.named_parameters()}
    expected = written_out(weights | own, images, training)
    out = network(images)
    torch.testing.assert_close(out, expected)
    pull = torch.randn(out.shape, generator=seeded(3), dtype=out.dtype)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    names = ["images", *own]
    assert len(gradients) == len(slow) == 13
    for name, gradient, wanted in zip(names, gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [(28, 28), (33, 16)])
def test_folded_batch_norm_gives_the_same_without_gradients(size: tuple[int, int]):
    network = lived_in().eval()
    images = noise(5, 2, *size)
    expected = written_out(network.state_dict(), images, training=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(network(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_without_gradients_still_uses_and_updates_the_batch_statistics():
    network, other = lived_in(), lived_in()
    images = noise(5, 2, 28, 28)
    with torch.no_grad():
        out = network(images)
    torch.testing.assert_close(out, written_out(lived_in().state_dict(), images, training=True))
    other(images)
    assert not torch.equal(network.blocks[0].norm.running_mean, lived_in().blocks[0].norm.running_mean)
    for (name, value), wanted in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_running_statistics_move_by_a_tenth_of_the_batchs():
    network = lived_in()
    norm, images = network.blocks[0].norm, noise(5, 2, 16, 16)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    first = F.conv2d(images, network.blocks[0].conv.weight, padding=1)
    network(images)
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * first.var(dim=(0, 2, 3)))


@pytest.mark.parametrize(("size", "dims"), [(28, 64), (84, 1600), (16, 64), (32, 256)])
def test_dimensions_are_those_of_the_papers(size: int, dims: int):
    network = Conv4(in_channels=3).eval()
    with torch.no_grad():
        assert network(noise(2, 3, size, size, dtype=torch.float32)).shape == (2, dims)


def test_the_parameters_are_those_of_the_papers():
    """111,936 with the biases of the convolutions (Snell et al.'s code), which batch norm takes off again."""
    assert sum(p.numel() for p in Conv4(1).parameters()) == 111_936 - 4 * 64


def test_the_memory_layout_of_the_images_changes_nothing():
    network, images = lived_in().eval(), noise(3, 2, 28, 28)
    torch.testing.assert_close(network(images), network(images.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(network(images), network(images.transpose(2, 3).contiguous().transpose(2, 3)))


def test_batch_norm_left_in_training_mode_is_not_folded():
    """The transductive way: all in eval mode but the norms, which use the statistics of the batch."""
    network, images = lived_in().eval(), noise(5, 2, 28, 28)
    for block in network.blocks:
        block.norm.train()
    with torch.no_grad():
        folded_or_not = network(images)
    torch.testing.assert_close(folded_or_not, network(images))


def test_images_that_four_poolings_would_leave_nothing_of_are_refused():
    with pytest.raises(
        ValueError, match=r"expected images of 1 channels and at least 16 x 16 pixels, got 1 .* 15 x 28"
    ):
        Conv4(1)(torch.zeros(2, 1, 15, 28))
    with pytest.raises(ValueError, match="got 3 channels"):
        Conv4(1)(torch.zeros(2, 3, 28, 28))


# --- last_relu --------------------------------------------------------------------------------------------------------


def without_the_last_relu(network: Conv4) -> Conv4:
    """The same weights and statistics in a network that ends with a pooling."""
    other = Conv4(network.in_channels, network.blocks[0].norm.num_features, last_relu=False)
    other = other.to(network.blocks[0].conv.weight.dtype)
    other.load_state_dict(network.state_dict())
    return other.train(network.training)


def first_three_blocks_and_a_bare_fourth(weights: dict[str, Tensor], images: Tensor, training: bool) -> Tensor:
    out = images
    for i in range(4):
        of = {name: weights[f"blocks.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias")}
        out = F.conv2d(out, of["conv.weight"], padding=1)
        running = (weights[f"blocks.{i}.norm.running_mean"], weights[f"blocks.{i}.norm.running_var"])
        running = (None, None) if training else running
        out = F.batch_norm(out, *running, of["norm.weight"], of["norm.bias"], training=training)
        out = F.max_pool2d(F.relu(out) if i < 3 else out, 2)
    return out.flatten(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (33, 16)])
def test_without_the_last_relu_only_the_last_block_may_be_negative(training: bool, size: tuple[int, int]):
    network = without_the_last_relu(lived_in().train(training))
    images = noise(5, 2, *size, seed=9).requires_grad_()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: weights[name].detach().clone().requires_grad_() for name, _ in network.named_parameters()}
    out = network(images)
    expected = first_three_blocks_and_a_bare_fourth(weights | own, images, training)
    assert (expected < 0).any()
    torch.testing.assert_close(out, expected)
    pull = torch.randn(out.shape, generator=seeded(3), dtype=out.dtype)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    for name, gradient, wanted in zip(["images", *own], gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_without_the_last_relu_the_folded_batch_norm_gives_the_same():
    network = without_the_last_relu(lived_in().eval())
    images = noise(5, 2, 28, 28)
    expected = first_three_blocks_and_a_bare_fourth(network.state_dict(), images, training=False)
    with torch.no_grad():
        folded = network(images)
    torch.testing.assert_close(folded, expected)
    assert (folded < 0).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_last_relu_is_all_that_the_two_differ_by(training: bool):
    network = lived_in().train(training)
    other = without_the_last_relu(network)
    images = noise(5, 2, 28, 28)
    with torch.no_grad():
        ends_with_relu, ends_without = network(images), other(images)
    torch.testing.assert_close(ends_with_relu, ends_without.clamp(min=0))
    assert (ends_without < 0).any()
    assert (ends_with_relu == 0).any()
    for (name, value), wanted in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name  # and so do the running statistics


def test_the_last_relu_is_there_unless_asked_for_otherwise():
    assert [block.relu for block in Conv4().blocks] == [True] * 4
    assert [block.relu for block in Conv4(last_relu=True).blocks] == [True] * 4
    assert [block.relu for block in Conv4(last_relu=False).blocks] == [True, True, True, False]
