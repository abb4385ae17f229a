"""What the tests of trunks share: weights as after use, batch norm by its formula, a comparison with layers by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def used(network: nn.Module) -> nn.Module:
    """In float64, with no weight, bias or running statistic of 0 or 1."""
    for seed, (name, value) in enumerate(network.double().state_dict().items()):
        drawn = noise(*value.shape, seed=seed)
        if name.endswith("running_var"):
            value.copy_(drawn + 0.5)
        elif value.ndim > 1:  # as large as keeps the signal's size from layer to layer
            value.copy_((drawn - 0.5) * (12 / value[0].numel()) ** 0.5)
        elif value.ndim == 1:
            value.copy_(drawn - 0.5)
    return network


def weights_of(network: nn.Module) -> Weights:
    return {name: value.clone() for name, value in network.state_dict().items()}


def batch_norm(weights: Weights, name: str, values: Tensor, training: bool) -> Tensor:
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    if training:
        mean, var = values.mean(dim=(0, 2, 3)), values.var(dim=(0, 2, 3), unbiased=False)
    scale = weights[f"{name}.weight"] / (var + 1e-5).sqrt()
    return values * scale.view(1, -1, 1, 1) + (weights[f"{name}.bias"] - mean * scale).view(1, -1, 1, 1)


def check(network: nn.Module, images: Tensor, written_out: Callable[[Weights, Tensor], Tensor]) -> Tensor:
    """Outputs, which are returned, and gradients of images and parameters are those of the layers written out."""
    weights, images = weights_of(network), images.requires_grad_()
    own = {name: weights[name].requires_grad_() for name, _ in network.named_parameters()}
    expected, out = written_out(weights, images), network(images)
    assert (out[0] - out[1]).abs().max() > 1e-4
    torch.testing.assert_close(out, expected)
    pull = noise(*out.shape, seed=3) - 0.5
    gradients = torch.autograd.grad((out * pull).sum(), [images, *network.parameters()])
    slow = torch.autograd.grad((expected * pull).sum(), [images, *own.values()])
    for name, gradient, wanted in zip(["images", *own], gradients, slow, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")
    return out
