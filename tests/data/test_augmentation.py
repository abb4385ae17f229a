"""RandomAffine against a slow formula, and what its randomness comes from."""

import math

import numpy as np
import pytest
import torch

from pml_fewshot.checks import UsageError
from pml_fewshot.data.augmentation import RandomAffine

# The columns of the uniform draws (B, 8), in the order that RandomAffine reads them.
ANGLE, SHEAR, SCALE_X, SCALE_Y, SHIFT_X, SHIFT_Y, APPLIED, MIRRORED = range(8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(0))


@pytest.mark.parametrize(("flip", "probability"), [(False, 0.7), (True, 0.7), (True, 1.0)])
def test_all_together_equal_a_slow_formula(flip: bool, probability: float):
    """Read each pixel at (scale)^-1 (rotation) (shear) (mirror) of its place, by hand, bilinearly, black outside."""
    images = noise(8, 2, 7, 7)
    out = RandomAffine(60, 0.4, 20, 0.2, flip, probability)(images, seeded(3)).numpy()
    drawn = torch.rand(8, 8, generator=seeded(3)).double().numpy()
    assert len(set(zip(drawn[:, APPLIED] < 0.7, drawn[:, MIRRORED] < 0.5, strict=True))) == 4  # all kinds are there
    pixels, size = images.double().numpy(), 7
    for b, draw in enumerate(drawn):
        spread = 2 * draw - 1
        angle, shear = math.radians(60 * spread[ANGLE]), math.tan(math.radians(20 * spread[SHEAR]))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        inverse_scale = np.diag([1 / (1 + 0.4 * spread[SCALE_X]), 1 / (1 + 0.4 * spread[SCALE_Y])])
        matrix = inverse_scale @ rotation @ np.array([[1, shear], [0, 1]])
        shift = 0.2 * size * spread[[SHIFT_X, SHIFT_Y]]
        if flip and draw[MIRRORED] < 0.5:
            matrix = matrix @ np.diag([-1, 1])
        if draw[APPLIED] >= probability:
            matrix, shift = np.eye(2), np.zeros(2)
        for row, column in np.ndindex(size, size):
            x, y = matrix @ np.array([column - 3.0, row - 3.0]) + shift + 3
            left, top = math.floor(x), math.floor(y)
            expected = np.zeros(2)
            for i, j in np.ndindex(2, 2):
                if 0 <= top + i < size and 0 <= left + j < size:
                    weight = (1 - abs(y - top - i)) * (1 - abs(x - left - j))
                    expected += weight * pixels[b, :, top + i, left + j]
            np.testing.assert_allclose(out[b, :, row, column], expected, atol=1e-4)


def test_each_image_is_distorted_by_its_own_amounts_and_all_channels_alike():
    colors = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    out = RandomAffine()((noise(1, 1, 9, 9) * colors).expand(8, -1, -1, -1), seeded(0))
    assert len({image.numpy().tobytes() for image in out}) == 8
    torch.testing.assert_close(out, out[:, :1] * colors)


def test_the_generator_alone_decides_and_the_images_stay_as_they_are():
    images, augment = noise(4, 1, 9, 9), RandomAffine(flip=True)
    before, kept, generator = torch.get_rng_state(), images.clone(), seeded(0)
    first, second = augment(images, generator), augment(images, generator)
    assert torch.equal(first, augment(images, seeded(0)))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, kept)
    assert augment(images.double(), seeded(0)).dtype == torch.float64


@pytest.mark.parametrize("amounts", [{"probability": 50}, {"scale": 1.0}, {"degrees": -1.0}, {"translate": -0.1}])
def test_amounts_out_of_range_are_refused(amounts: dict[str, float]):
    with pytest.raises(UsageError, match=f"expected {next(iter(amounts))}"):
        RandomAffine(**amounts)
