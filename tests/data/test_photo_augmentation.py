"""The batched augmentations of photos against torchvision's, image by image, with the same amounts."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.data.photo_augmentation import CHANGES, ColorJitter, RandomHorizontalFlip, RandomResizedCrop

# isort: split
from torchvision.transforms import v2  # whose import pml_fewshot's has prepared
from torchvision.transforms.v2 import functional as tv

THEIRS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
ALL = [RandomResizedCrop((5, 7)), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.2)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(0))


def crops_at_borders(height: int, width: int) -> Tensor:
    """The whole image, a pixel in each corner, strips along the borders, and the image but for one pixel's border."""
    whole, inner = [(0, 0, height, width)], [(1, 1, height - 2, width - 2)]
    corners = [(top, left, 1, 1) for top in (0, height - 1) for left in (0, width - 1)]
    strips = [(0, 0, height, 2), (0, width - 2, height, 2), (0, 0, 1, width), (height - 1, 0, 1, width)]
    return torch.tensor(whole + inner + corners + strips)


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (31, 5), (40, 44), (1, 1)], ids=str)
@pytest.mark.parametrize("image", [(3, 21, 16), (1, 11, 30)], ids=str)
def test_crops_equal_torchvisions(image: tuple[int, ...], size: tuple[int, int]) -> None:
    """Smaller and larger than the crop, of odd shapes, gray and in color."""
    transform, drawn_for = RandomResizedCrop(size), noise(30, *image)
    crops = torch.cat([crops_at_borders(*image[1:]), transform.draw(drawn_for, seeded(1))])
    images = noise(len(crops), *image)
    expected = torch.stack(
        [tv.resized_crop(x, *crop, list(size)) for x, crop in zip(images, crops.tolist(), strict=True)]
    )
    torch.testing.assert_close(transform.apply(images, crops), expected, rtol=0, atol=1e-5)
    double = transform.apply(images.double(), crops)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, expected.double(), rtol=0, atol=1e-5)


def test_a_crop_of_the_size_wanted_is_cut_out_exactly() -> None:
    images = noise(1, 3, 9, 9)
    assert torch.equal(RandomResizedCrop(4).apply(images, torch.tensor([[3, 5, 4, 4]])), images[:, :, 3:7, 5:9])


def in_turn(image: Tensor, order: list[int], amounts: list[float]) -> Tensor:
    for number in order:
        image = THEIRS[number](image, amounts[number])
    return image


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_equal_torchvisions_in_every_order_and_at_the_bounds(channels: int) -> None:
    orders = torch.tensor(list(permutations(range(4)))).repeat(4, 1)
    images = noise(len(orders), channels, 6, 5)
    images[:, :, 0] = images[:, :1, 0]  # gray pixels
    images[:, :, 1, :2] = torch.tensor([0.0, 1.0])  # black and white
    images[:, 0, 2] = images[:, -1, 2]  # two channels alike
    jitter = ColorJitter(0.9, 0.9, (0, 3), 0.5)
    _, amounts = jitter.draw(images, seeded(1))
    amounts[:4] = torch.tensor([[0, 0, 0, -0.5], [1.9, 1.9, 3, 0.5], [1, 1, 1, 0], [0.1, 0.1, 0, 0.5]])
    expected = torch.stack([in_turn(*each) for each in zip(images, orders.tolist(), amounts.tolist(), strict=True)])
    torch.testing.assert_close(jitter.apply(images, orders, amounts), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
def test_a_change_that_is_not_asked_for_is_not_made(number: int) -> None:
    name, images = list(CHANGES)[number], noise(8, 3, 6, 5)
    jitter = ColorJitter(**{name: 0.4})
    _, amounts = jitter.draw(images, seeded(1))
    expected = torch.stack([THEIRS[number](x, a) for x, a in zip(images, amounts[:, number].tolist(), strict=True)])
    torch.testing.assert_close(jitter(images, seeded(1)), expected, rtol=0, atol=1e-5)
    assert torch.equal(ColorJitter()(images * 3, seeded(1)), images * 3)  # not even cut off at 1


def test_the_images_that_are_drawn_are_mirrored() -> None:
    images, flip = noise(40, 3, 4, 5), RandomHorizontalFlip(0.3)
    mirrored = flip.draw(images, seeded(1))
    expected = torch.stack([tv.hflip(x) if m else x for x, m in zip(images, mirrored.tolist(), strict=True)])
    assert torch.equal(flip(images, seeded(1)), expected)
    share = flip.draw(torch.empty(10_000, 1, 1, 1), seeded(2)).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.02)
    assert torch.equal(RandomHorizontalFlip(0)(images, seeded(1)), images)
    assert torch.equal(RandomHorizontalFlip(1)(images, seeded(1)), images.flip(3))


def largest_gap(ours: Tensor, theirs: Tensor) -> float:
    """Between two samples' distribution functions, of which a Kolmogorov-Smirnov test is made."""
    places = torch.cat([ours, theirs]).sort().values
    below = [torch.searchsorted(each.sort().values, places, right=True) / len(each) for each in (ours, theirs)]
    return (below[0] - below[1]).abs().max().item()


# torchvision's method, and its name before 0.21
CROP = getattr(v2.RandomResizedCrop, "make_params", None) or v2.RandomResizedCrop._get_params

ALIKE = 1.95 * (2 / 2000) ** 0.5  # for samples of 2000: a larger gap has a probability of 0.001


@pytest.mark.parametrize(
    ("shape", "options"),
    [((84, 84), {}), ((60, 90), {"scale": (0.3, 0.9), "ratio": (0.5, 3)}), ((20, 100), {"scale": (0.15, 1)})],
)
def test_crops_are_distributed_as_torchvisions(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """The last are of images so wide that many tries are needed, and some crops are the one from the middle."""
    theirs = v2.RandomResizedCrop(8, **options)
    image = torch.empty(1, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [CROP(theirs, [image]) for _ in range(2000)]
    expected = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    crops = RandomResizedCrop(8, **options).draw(torch.empty(2000, 1, *shape), seeded(0))
    statistics: list[Callable[[Tensor], Tensor]] = [
        *(lambda c, i=i: c[:, i] for i in range(4)),  # type: ignore[misc]
        lambda c: c[:, 2] * c[:, 3],
        lambda c: c[:, 3] / c[:, 2],
        lambda c: c[:, 0] / (shape[0] - c[:, 2] + 1),
        lambda c: (c[:, 1] + 0.5) / (shape[1] - c[:, 3] + 1),
    ]
    for statistic in statistics:
        assert largest_gap(statistic(crops.double()), statistic(expected.double())) < ALIKE
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, :2] + crops[:, 2:] <= torch.tensor(shape)).all()


@pytest.mark.parametrize("shape", [(10, 100), (100, 10), (101, 100), (9, 30)], ids=str)
def test_where_no_crop_fits_it_is_torchvisions_from_the_middle(shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {"scale": (1, 1), "ratio": (1.0001, 1.001) if shape == (101, 100) else (0.75, 4 / 3)}
    expected = CROP(v2.RandomResizedCrop(8, **options), [torch.empty(1, *shape)])
    crops = RandomResizedCrop(8, **options).draw(torch.empty(5, 1, *shape), seeded(0))
    assert crops.tolist() == [[expected[name] for name in ("top", "left", "height", "width")]] * 5


def test_colors_are_drawn_evenly() -> None:
    jitter = ColorJitter(0.4, 2, (0.5, 0.7), 0.1)
    orders, amounts = jitter.draw(torch.empty(24_000, 3, 1, 1), seeded(0))
    bounds = torch.tensor([[0.6, 0, 0.5, -0.1], [1.4, 3, 0.7, 0.1]], dtype=torch.float64)  # a factor is 0 at least
    shares = (amounts - bounds[0]) / (bounds[1] - bounds[0])
    for share in shares.T:
        assert largest_gap(share, torch.linspace(0, 1, 24_000, dtype=torch.float64)) < 0.01
    assert shares.T.corrcoef().sub(torch.eye(4)).abs().max() < 0.03
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert 850 < counts.min() <= counts.max() < 1150


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: type(augment).__name__)
def test_each_image_has_its_own_draw_and_the_generator_alone_decides(augment: Callable[..., Tensor]) -> None:
    images = noise(1, 3, 60, 50).expand(30, -1, -1, -1).clone()
    before, kept, generator = torch.get_rng_state(), images.clone(), seeded(0)
    first, second = augment(images, generator), augment(images, generator)
    assert len({image.numpy().tobytes() for image in first}) == (2 if augment == RandomHorizontalFlip() else 30)
    assert torch.equal(first, augment(images, seeded(0)))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, kept)
    assert 0 <= first.min() <= first.max() <= 1 + 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, seeded(0)), first)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RandomResizedCrop, {"size": 0}),
        (RandomResizedCrop, {"size": (3, 8, 8)}),
        (RandomResizedCrop, {"scale": (0.5, 1.5), "size": 8}),
        (RandomResizedCrop, {"ratio": (2, 1), "size": 8}),
        (RandomHorizontalFlip, {"p": 50}),
        (ColorJitter, {"brightness": -0.1}),
        (ColorJitter, {"contrast": (-0.1, 1)}),
        (ColorJitter, {"saturation": (0.1, 1, 2)}),
        (ColorJitter, {"hue": 0.6}),
    ],
)
def test_amounts_out_of_range_are_refused(kind: type, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"expected {next(iter(options))}"):
        kind(**options)


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: type(augment).__name__)
def test_what_is_no_batch_of_images_is_refused(augment: Callable[..., Tensor]) -> None:
    for wrong in (noise(3, 9, 8), (255 * noise(2, 3, 9, 8)).byte()):
        with pytest.raises(UsageError, match=r"expected images \(B, C, H, W\) as floats"):
            augment(wrong, seeded(0))
    with pytest.raises(UsageError, match="expected images of 1 or 3 channels, got 4"):
        ColorJitter()(noise(2, 4, 9, 8), seeded(0))
