"""conv_norm_pool against torch's convolution, batch norm and pooling one after the other, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pml_fewshot.embedders import conv_norm_pool as module
from pml_fewshot.embedders.conv_norm_pool import by_moments, conv_norm_pool, patch_moments

Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(images: Tensor, weight: Tensor, *of_norm: object) -> Tensor:
    return F.max_pool2d(F.batch_norm(F.conv2d(images, weight, padding=1), *of_norm), 2)  # type: ignore[arg-type]


def norm(channels: int, affine: bool = True, running: bool = True) -> Norm:
    """Running mean and variance, scale (of either sign) and shift."""
    mean, variance, scale, shift = rand(4, channels, seed=1)
    statistics = (mean, 1 + variance) if running else (None, None)
    return (*statistics, *((scale - 0.5, shift) if affine else (None, None)))


def copies(tensors: Norm) -> Norm:
    return tuple(None if each is None else each.clone().requires_grad_(i > 1) for i, each in enumerate(tensors))  # type: ignore[return-value]


@pytest.mark.parametrize("numbers", [1, 2**20], ids=["image by image", "all at once"])
@pytest.mark.parametrize(
    ("shape", "affine", "running"),
    [
        ((5, 1, 8, 8), True, True),
        ((4, 3, 7, 9), True, False),
        ((3, 2, 2, 5), False, True),
        ((2, 1, 5, 4), False, False),
    ],
)
def test_value_statistics_and_two_derivatives_are_those_of_the_three_one_after_the_other(
    shape: tuple[int, ...], affine: bool, running: bool, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OUTPUT_NUMBERS", numbers)
    monkeypatch.setattr(module, "PATCH_NUMBERS", numbers)
    images, of_norm = rand(*shape), norm(6, affine, running)
    found = []
    for function in (conv_norm_pool, written_out):
        weight, parts = (rand(6, shape[1], 3, 3, seed=2) - 0.5).requires_grad_(), copies(of_norm)
        assert by_moments(images, weight)
        output = function(images, weight, *parts, True, 0.3, 1e-3)
        wanted = [weight, *(each for each in parts[2:] if each is not None)]
        first = torch.autograd.grad((output * rand(*output.shape, seed=3)).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(
            sum((each * rand(*each.shape, seed=4)).sum() for each in first), wanted, materialize_grads=True
        )
        found.append([output, *first, *second, *(each for each in parts[:2] if each is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_derivatives_agree_with_differences() -> None:
    images, (_, _, scale, shift) = rand(3, 1, 6, 6), norm(2)
    weight = (rand(2, 1, 3, 3, seed=2) - 0.5).requires_grad_()

    def pooled(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return conv_norm_pool(images, weight, None, None, scale, shift, True, 0.1, 1e-3)

    assert scale is not None
    assert shift is not None
    inputs = weight, scale.requires_grad_(), shift.requires_grad_()
    assert torch.autograd.gradcheck(pooled, inputs)
    assert torch.autograd.gradgradcheck(pooled, inputs)


def test_moments_are_those_of_the_patches_written_out() -> None:
    images = 100 + rand(3, 2, 5, 4)  # far from 0, where squares would cancel; but the padding is of 0
    patches = F.unfold(images, 3, padding=1).transpose(0, 1).flatten(1)  # (K, B * H * W)
    mean, covariance = patch_moments(images.float())
    torch.testing.assert_close(mean, patches.mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(covariance, torch.cov(patches, correction=0), rtol=1e-4, atol=1e-3)


def test_images_of_one_color_have_no_variance_and_still_finite_outputs() -> None:
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, 0, 1, 1] = 1  # sees no padding
    ones = torch.ones(2)
    output = conv_norm_pool(torch.full((2, 1, 4, 4), 0.7), weight, None, None, ones, ones, True, 0.1, 1e-5)
    torch.testing.assert_close(output, torch.ones(2, 2, 2, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_elsewhere_the_three_come_one_after_the_other(channels: int, training: bool, with_gradient: bool) -> None:
    images, of_norm = rand(2, channels, 6, 6).requires_grad_(with_gradient), norm(5)
    weight = rand(5, channels, 3, 3, seed=2)
    assert by_moments(images, weight) == (channels == 3 and not with_gradient)
    one, other = (each(images, weight, *copies(of_norm), training, 0.1, 1e-5) for each in (conv_norm_pool, written_out))
    torch.testing.assert_close(one, other)
    if with_gradient:
        torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), images)[0] for each in (one, other)))


def test_a_mode_gets_the_three_as_one_function() -> None:
    class Notes(TorchFunctionMode):
        def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
            seen.append(func)
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    seen: list[object] = []
    with Notes():
        conv_norm_pool(rand(2, 1, 6, 6), rand(2, 1, 3, 3), None, None, None, None, True, 0.1, 1e-5)
    assert conv_norm_pool in seen


def test_the_variance_of_an_edge_filter_on_smooth_images_does_not_cancel() -> None:
    x = torch.arange(28) - 13.5
    blob = 255 * torch.exp(-(x[:, None] ** 2 + x**2) / 50)  # sigma 5
    images = torch.stack([blob, 0.9 * blob]).unsqueeze(1)
    curve = torch.tensor([1.0, -2.0, 1.0])
    weight = torch.outer(curve, curve)[None, None]
    found = conv_norm_pool(images, weight, None, None, None, None, True, 0.1, 1e-5)
    exact = written_out(images.double(), weight.double(), None, None, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=5e-3)


def test_no_images_and_transforms_of_torch_are_left_to_torch() -> None:
    weight = rand(2, 1, 3, 3)
    assert not by_moments(rand(0, 1, 6, 6), weight)
    images = rand(3, 1, 6, 6)

    def total(weight: Tensor) -> Tensor:
        return conv_norm_pool(images, weight, None, None, None, None, True, 0.1, 1e-5).square().sum()

    leaf = weight.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(weight), torch.autograd.grad(total(leaf), leaf)[0])
