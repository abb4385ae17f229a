"""ResNet12 against its blocks written out on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.embedders.resnet12 import ResNet12


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(weights: dict[str, Tensor], images: Tensor, training: bool) -> Tensor:
    def convolved(values: Tensor, conv: str, norm: str, padding: int) -> Tensor:
        values = F.conv2d(values, weights[f"{conv}.weight"], padding=padding)
        mean = values.mean(dim=(0, 2, 3)) if training else weights[f"{norm}.running_mean"]
        var = values.var(dim=(0, 2, 3), unbiased=False) if training else weights[f"{norm}.running_var"]
        scale = weights[f"{norm}.weight"] / (var + 1e-5).sqrt()
        return values * scale.view(1, -1, 1, 1) + (weights[f"{norm}.bias"] - mean * scale).view(1, -1, 1, 1)

    def leaky(values: Tensor) -> Tensor:
        return torch.where(values > 0, values, 0.1 * values)

    for block in (f"blocks.{i}" for i in range(4)):
        out = leaky(convolved(images, f"{block}.convs.0", f"{block}.norms.0", 1))
        out = leaky(convolved(out, f"{block}.convs.1", f"{block}.norms.1", 1))
        out = convolved(out, f"{block}.convs.2", f"{block}.norms.2", 1)
        images = F.max_pool2d(leaky(out + convolved(images, f"{block}.shortcut.0", f"{block}.shortcut.1", 0)), 2)
    return images.sum(dim=(2, 3)) / (images.shape[2] * images.shape[3])


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool):
    network = ResNet12(2, (3, 4, 5, 6)).double().train(training)
    with torch.no_grad():
        for seed, (name, value) in enumerate(network.state_dict().items()):
            if value.is_floating_point():
                value.copy_(noise(*value.shape, seed=seed) + (0.5 if "running_var" in name else -0.4))
    images = noise(3, 2, 37, 32, seed=99).requires_grad_()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: weights[name].clone().requires_grad_() for name, _ in network.named_parameters()}
    expected, out = written_out(weights | own, images, training), network(images)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sin().sum(), [images, *network.parameters()])
    slow = torch.autograd.grad(expected.sin().sum(), [images, *own.values()])
    for name, gradient, wanted in zip(["images", *own], gradients, slow, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_the_default_has_the_papers_size_and_a_signal_that_neither_dies_nor_explodes():
    """12.4 million parameters (Lee et al. 2019), 640 dimensions."""
    torch.manual_seed(0)
    network = ResNet12()
    assert sum(p.numel() for p in network.parameters()) == 12_424_320
    with torch.no_grad():
        out = network(noise(4, 3, 20, 16, dtype=torch.float32))
    assert out.shape == (4, 640)
    assert 0.05 < out.std().item() < 20
