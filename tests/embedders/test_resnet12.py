"""ResNet12 against its blocks written out on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.embedders.resnet12 import ResNet12

WIDTHS = (3, 4, 5, 6)


def lived_in() -> ResNet12:
    network = ResNet12(2, WIDTHS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                draw = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(draw + 0.5 if "running_var" in name else draw - 0.4)
    return network


def written_out(weights: dict[str, Tensor], images: Tensor, training: bool) -> Tensor:
    def norm(name: str, values: Tensor) -> Tensor:
        of = {part: weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        mean = values.mean(dim=(0, 2, 3)) if training else of["running_mean"]
        var = values.var(dim=(0, 2, 3), unbiased=False) if training else of["running_var"]
        scale = of["weight"] / (var + 1e-5).sqrt()
        return values * scale.view(1, -1, 1, 1) + (of["bias"] - mean * scale).view(1, -1, 1, 1)

    def leaky(values: Tensor) -> Tensor:
        return torch.where(values > 0, values, 0.1 * values)

    out = images
    for i in range(4):
        block = f"blocks.{i}"
        skip = norm(f"{block}.shortcut.1", F.conv2d(out, weights[f"{block}.shortcut.0.weight"]))
        out = leaky(norm(f"{block}.norms.0", F.conv2d(out, weights[f"{block}.convs.0.weight"], padding=1)))
        out = leaky(norm(f"{block}.norms.1", F.conv2d(out, weights[f"{block}.convs.1.weight"], padding=1)))
        out = norm(f"{block}.norms.2", F.conv2d(out, weights[f"{block}.convs.2.weight"], padding=1))
        out = F.max_pool2d(leaky(out + skip), 2)
    return out.sum(dim=(2, 3)) / (out.shape[2] * out.shape[3])


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_blocks_written_out(training: bool):
    network = lived_in().train(training)
    images = torch.rand(3, 2, 37, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images.requires_grad_()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: weights[name].clone().requires_grad_() for name, _ in network.named_parameters()}
    expected = written_out(weights | own, images, training)
    out = network(images)
    assert out.shape == (3, 6)
    torch.testing.assert_close(out, expected)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    for name, gradient, wanted in zip(["images", *own], gradients, slow, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_the_default_has_the_papers_size():
    """12.4 million parameters (Lee et al. 2019), 640 dimensions, whatever the image's size."""
    network = ResNet12().eval()
    assert sum(p.numel() for p in network.parameters()) == 12_424_320
    with torch.no_grad():
        assert network(torch.rand(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))).shape == (1, 640)
        assert network(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).shape == (2, 640)


def test_the_signal_neither_dies_nor_explodes_at_the_start():
    torch.manual_seed(0)
    out = ResNet12(1, (8, 8, 8, 8))(torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.05 < out.std().item() < 20
