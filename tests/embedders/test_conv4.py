"""Conv4 against convolution, batch norm, ReLU and pooling written out, in that order and on the same weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.conv4 import Conv4, ConvBlock
from tests.embedders.formulas import Weights, batch_norm, check, noise, used, weights_of


def conv4(last_relu: bool = True) -> Conv4:
    return used(Conv4(2, 6) if last_relu else Conv4(2, 6, last_relu=False))  # a ReLU is the default


def written_out(weights: Weights, images: Tensor, training: bool, last_relu: bool = True) -> Tensor:
    out = images
    for i in range(4):
        out = F.conv2d(out, weights[f"blocks.{i}.conv.weight"], padding=1)
        out = batch_norm(weights, f"blocks.{i}.norm", out, training)
        out = F.max_pool2d(F.relu(out) if i < 3 or last_relu else out, 2)
    return out.flatten(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last_relu", [True, False])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool, last_relu: bool):
    by_hand = partial(written_out, training=training, last_relu=last_relu)
    out = check(conv4(last_relu).train(training), noise(5, 2, 33, 17, seed=9), by_hand)
    assert (out < 0).any() == (not last_relu)


@pytest.mark.parametrize("last_relu", [True, False])
def test_folded_batch_norm_gives_the_same_without_gradients(last_relu: bool):
    network, images = conv4(last_relu).eval(), noise(5, 2, 28, 28)
    before = weights_of(network)
    expected = written_out(before, images, False, last_relu)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(network(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_pooled_it_gives_the_mean_over_the_map_and_flattened_the_channels_come_first():
    network, images = conv4().eval(), noise(3, 2, 37, 52)
    pooled = used(Conv4(2, 6, pool=True)).eval()
    maps = network(images).unflatten(1, (6, 2, 3))
    torch.testing.assert_close(maps.permute(0, 2, 3, 1), network.blocks(images).permute(0, 2, 3, 1))
    torch.testing.assert_close(pooled(images), maps.sum(dim=(2, 3)) / 6)
    assert list(pooled.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("norms_only", [False, True])  # the transductive way: all else is in eval mode
def test_training_without_gradients_uses_the_batch_and_moves_running_statistics_by_a_tenth(norms_only: bool):
    network, images = conv4().train(not norms_only), noise(5, 2, 28, 28)
    for block in network.blocks:
        block.norm.train()
    before = weights_of(network)
    with torch.no_grad():
        torch.testing.assert_close(network(images), written_out(before, images, training=True))
    first = F.conv2d(images, before["blocks.0.conv.weight"], padding=1)
    norm, old = network.blocks[0].norm, "blocks.0.norm.running_"
    torch.testing.assert_close(norm.running_mean, 0.9 * before[f"{old}mean"] + 0.1 * first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 * before[f"{old}var"] + 0.1 * first.var(dim=(0, 2, 3)))


@pytest.mark.parametrize(("size", "dims"), [(28, 64), (84, 1600), (16, 64), (32, 256)])
def test_dimensions_and_parameters_are_those_of_the_papers(size: int, dims: int):
    with torch.device("meta"):
        assert Conv4(in_channels=3)(torch.zeros(2, 3, size, size)).shape == (2, dims)
        # 111,936 with the biases of the convolutions (Snell et al.'s code), which batch norm subtracts again
        assert sum(p.numel() for p in Conv4().parameters()) == 111_936 - 4 * 64


@pytest.mark.parametrize("shape", [(1, 15, 28), (1, 28, 15), (3, 28, 28)])
def test_images_that_four_poolings_would_leave_nothing_of_are_refused(shape: tuple[int, ...]):
    got = f"{shape[0]} channels of {shape[1]} x {shape[2]}"
    with pytest.raises(UsageError, match=f"expected images of 1 channels and at least 16 x 16 pixels, got {got}; set"):
        Conv4(1)(torch.zeros(2, *shape))


class Doubled(nn.Module):
    """Another layer in a convolution's place, whose weights it has."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.weight = conv, conv.weight

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.conv(images)


def with_norm(**options: Any) -> Callable[[ConvBlock], None]:
    return lambda block: setattr(block, "norm", nn.BatchNorm2d(4, **options))


CHANGES: dict[str, Callable[[ConvBlock], None]] = {
    "stock": lambda block: None,
    "cumulative": with_norm(momentum=None),
    "not tracked": with_norm(track_running_stats=False),
    "no longer tracked": lambda block: setattr(block.norm, "track_running_stats", False),
    "not affine": with_norm(affine=False),
    "other norm": lambda block: setattr(block, "norm", nn.InstanceNorm2d(4, affine=True)),
    "other layer": lambda block: setattr(block, "conv", Doubled(block.conv)),
}


@pytest.mark.parametrize("layer", ["conv", "norm"])
def test_hooks_of_a_layer_are_called_in_training(layer: str) -> None:
    block, shapes = ConvBlock(1, 4).train(), []
    getattr(block, layer).register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    block(noise(3, 1, 6, 6).float())
    assert shapes == [(3, 4, 6, 6)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_is_its_layers_one_after_the_other(
    change: Callable[[ConvBlock], None], training: bool, gradient: bool
) -> None:
    torch.manual_seed(0)
    block = ConvBlock(1, 4)
    change(block)
    block = block.double().train(training)
    if isinstance(block.norm, nn.BatchNorm2d) and block.norm.running_var is not None:
        block.norm.running_var.mul_(3)
    layers = copy.deepcopy(block)
    with torch.set_grad_enabled(gradient):
        for seed in (1, 2):
            images = noise(3, 1, 6, 6, seed=seed).double()
            expected = F.max_pool2d(layers.norm(layers.conv(images)).relu(), 2)
            torch.testing.assert_close(block(images), expected)
    for one, other in zip(block.buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(one, other)
