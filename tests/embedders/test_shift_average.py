"""ShiftAverage against images shifted one pixel at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot import Conv4, Embedder, ShiftAverage
from pml_fewshot.checks import UsageError


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """An image (C, H, W) moved pixel by pixel; what comes in is 0."""
    moved = torch.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            if 0 <= y - down < image.shape[1] and 0 <= x - right < image.shape[2]:
                moved[:, y, x] = image[:, y - down, x - right]
    return moved


@pytest.mark.parametrize("pixels", [1, 2])
def test_it_is_the_mean_direction_over_all_shifts(pixels: int) -> None:
    images = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(70, 4)).double()
    steps = range(-pixels, pixels + 1)
    for image, found in zip(images, ShiftAverage(trunk, pixels).eval()(images), strict=True):
        each = [F.normalize(trunk(shifted(image, y, x)[None])[0], dim=0) for y in steps for x in steps]
        torch.testing.assert_close(found, sum(each) / len(each))


def test_in_training_it_is_the_image_alone_and_sees_its_batch_once() -> None:
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    made = Embedder(ShiftAverage(Conv4(channels=4))).train()
    plain = made.trunk.trunk
    expected = F.normalize(plain(images), dim=1)
    assert torch.equal(made(images), expected)
    assert plain.blocks[0].norm.num_batches_tracked == 2  # once for each call


def test_no_pixels_are_refused() -> None:
    with pytest.raises(UsageError, match="expected pixels"):
        ShiftAverage(nn.Flatten(), 0)
