"""RandomAffine and RandomWarp against slow formulas; transforms of one image, for each of a batch; their draws."""

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError
from pml_fewshot.data.augmentation import InTurn, PerImage, RandomAffine, RandomWarp, as_augmentation, augmented
from pml_fewshot.parts.describe import describe

# isort: split
from torchvision import transforms as v1  # whose import pml_fewshot's has prepared
from torchvision.transforms import v2

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


@pytest.mark.parametrize("nodes", [3, 4])
def test_a_warp_shifts_points_by_what_was_drawn_at_its_nodes_and_by_a_bicubic_curve_between(nodes: int):
    """On an image whose values are its columns, and one of its rows, a shift is a difference of values."""
    size, apart = 13, 12 // (nodes - 1)  # nodes at pixels 0, 4, 8 and 12, or 0, 6 and 12
    rows, columns = torch.meshgrid(torch.arange(13.0), torch.arange(13.0), indexing="ij")
    images = torch.stack([columns, rows]).expand(6, 2, size, size) + 100  # (and black far from both)
    out = RandomWarp(0, 0, 0, 0, probability=0.5, warp=0.02, nodes=nodes)(images, seeded(0)) - images
    generator = seeded(0)
    applied = torch.rand(6, 8, generator=generator)[:, APPLIED] < 0.5
    shifts = 0.02 * size * torch.randn(6, 2, nodes, nodes, generator=generator)
    assert 0 < applied.sum() < 6
    assert torch.equal(out[~applied], torch.zeros_like(out[~applied]))
    # (at the inner nodes, for a pixel of the border may be shifted out of the image)
    inner = slice(apart, 12, apart)
    torch.testing.assert_close(out[applied][:, :, inner, inner], shifts[applied][:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)

    def weight(t: float) -> float:  # Keys 1981, equation 15, with a = -0.75
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def shares(at: int) -> Tensor:  # of each node; beyond the last one its shift goes on
        found = torch.zeros(nodes)
        for place in range(-2, nodes + 2):
            found[min(max(place, 0), nodes - 1)] += weight(at / apart - place)
        return found

    for row, column in ((5, 7), (6, 6)):
        expected = torch.einsum("bcij,i,j->bc", shifts, shares(row), shares(column))
        torch.testing.assert_close(out[applied][:, :, row, column], expected[applied], atol=1e-4, rtol=0)


def test_without_a_shift_a_warp_is_the_affine_map_of_the_same_draws():
    images = noise(5, 2, 9, 6)
    assert torch.equal(RandomWarp(flip=True, warp=0)(images, seeded(2)), RandomAffine(flip=True)(images, seeded(2)))


def test_a_warp_keeps_the_images_type():
    for dtype in (torch.float64, torch.bfloat16):
        assert RandomWarp()(noise(4, 1, 9, 9).to(dtype), seeded(2)).dtype == dtype


@pytest.mark.parametrize(
    "amounts", [{"warp": -0.1}, {"warp": math.inf}, {"warp": math.nan}, {"nodes": 1}, {"nodes": 4.0}]
)
def test_a_warp_out_of_range_is_refused(amounts: dict[str, Any]):
    with pytest.raises(UsageError, match=f"expected {next(iter(amounts))} "):
        RandomWarp(**amounts)


def by_all_generators(image: Tensor) -> Tensor:
    return image * random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002


def crop(strength: float = 0.4) -> v2.Compose:
    colors = v2.ColorJitter(strength, strength, strength, 0.1)
    return v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), colors])


def global_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]


@pytest.mark.parametrize("transform", [crop(), by_all_generators], ids=["torchvision", "all generators"])
def test_each_image_is_transformed_as_by_itself_after_seeding(transform: Callable[[Tensor], Tensor]) -> None:
    images = noise(1, 3, 12, 10).expand(6, -1, -1, -1).clone()
    before, generator = global_states(), seeded(0)
    first, second = PerImage(transform)(images, generator), PerImage(transform)(images, generator)
    assert global_states() == before
    assert len({image.numpy().tobytes() for image in first}) == 6
    assert not torch.equal(first, second)
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002, whatever others have drawn before
    assert torch.equal(first, copy.deepcopy(PerImage(transform))(images, seeded(0)))
    for image, expected, seed in zip(images, first, torch.randint(2**63 - 1, (6,), generator=seeded(0)), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            np.random.seed(int(seed) % 2**32)  # noqa: NPY002
            random.seed(int(seed))
            assert torch.equal(transform(image), expected)


def test_the_global_generators_are_as_before_when_a_transform_fails() -> None:
    def broken(image: Tensor) -> Tensor:
        by_all_generators(image)
        raise RuntimeError("broken")

    before = global_states()
    with pytest.raises(RuntimeError, match="broken"):
        PerImage(broken)(noise(2, 1, 3, 3), seeded(0))
    assert global_states() == before


def test_images_stay_as_they_are_under_a_transform_that_works_in_place() -> None:
    images = noise(2, 3, 4, 4)
    kept = images.clone()
    out = PerImage(v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True))(images, seeded(0))
    torch.testing.assert_close(out, 2 * images - 1)
    assert torch.equal(images, kept)


FOR_PIL = [v1.ToPILImage(), lambda image: image.rotate(90)]


@pytest.mark.parametrize(
    "transform",
    [
        v1.Compose([v1.RandomRotation((90, 90)), v1.ToTensor()]),
        v1.Compose([v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]), v1.RandomRotation((90, 90))]),
        v1.Compose([*FOR_PIL, v1.ToTensor()]),
        v2.Compose([v2.ToImage(), v2.PILToTensor(), v2.RandomRotation((90, 90)), v2.ToDtype(torch.float32, True)]),
        v2.Compose([*FOR_PIL, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        nn.Sequential(v2.RandomRotation((90, 90)), nn.Identity()),
        [v1.ToTensor(), v2.RandomRotation((90, 90)), None],
        lambda image: torch.rot90(image, dims=(1, 2)),
    ],
)
def test_transforms_made_for_pil_images_of_all_kinds_turn_a_batch(transform: Any) -> None:
    images = (255 * noise(3, 3, 6, 6)).round() / 255
    out = as_augmentation(transform)(images, seeded(0))
    assert type(out) is Tensor
    torch.testing.assert_close(out, images.rot90(dims=(2, 3)))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.ToPILImage(), r"from ToPILImage\(\), got a Image; end it with ToTensor"),
        (v2.ToDtype(torch.uint8, scale=True), r"from ToDtype\(scale=True\), got torch.uint8; end it with v2.ToDtype"),
        (v2.RandomChoice([v2.Resize(4), v2.Resize(5)]), r"from RandomChoice.*got shapes \(3, 4, 4\) and \(3, 5, 5\)"),
        (lambda image: image[None], r"got shape \(1, 3, 6, 6\) for \(3, 6, 6\); return it without a batch axis"),
    ],
)
def test_what_gives_no_batch_of_floats_is_refused(transform: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PerImage(transform)(noise(20, 3, 6, 6), seeded(1))


class OfBatches(nn.Module):
    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images


class OfOne(nn.Module):
    def forward(self, image: Tensor, strength: float = 0.3) -> Tensor:
        return image


class Ours(v2.Transform):
    pass


def passed_on(*arguments: Any) -> Tensor:
    return arguments[0]


OF_BATCHES = [RandomAffine(), PerImage(crop()), OfBatches(), lambda images, generator: images, passed_on]
OF_ONE = [crop(), Ours(), v1.Compose([]), v1.ToTensor(), OfOne(), lambda image: image, abs]


def test_what_takes_batches_stays_and_what_takes_one_image_is_wrapped() -> None:
    assert as_augmentation(None) is None
    for augment in OF_BATCHES:
        assert as_augmentation(augment) is augment
    for augment in OF_ONE:
        assert as_augmentation(augment) == PerImage(augment)
    several = as_augmentation([crop(), None, (RandomAffine(), by_all_generators)])
    assert isinstance(several, InTurn)
    assert [type(step) for step in several.steps] == [PerImage, InTurn]


def test_several_are_applied_in_turn_from_one_generator() -> None:
    images, generator = noise(4, 3, 9, 9), seeded(0)
    first = PerImage(crop())(images, generator)
    expected = RandomAffine()(first, generator)
    assert torch.equal(as_augmentation([crop(), RandomAffine()])(images, seeded(0)), expected)


@pytest.mark.parametrize("wrong", [RandomAffine, partial(RandomAffine, flip=True), v2.RandomCrop, "flip", 3])
def test_what_is_no_augmentation_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"expected augment\(images, generator\), a transform.*give an object"):
        as_augmentation(wrong)


def test_another_number_of_images_is_refused() -> None:
    for wrong, got in ((lambda images, _: images[1:], r"shape \(3, 1, 5, 5\)"), (lambda *_: None, "a NoneType")):
        with pytest.raises(UsageError, match=f"expected a tensor of 4 images.*from <function.*got {got}"):
            augmented(noise(4, 1, 5, 5), wrong, seeded(0))


def test_a_config_tells_transforms_of_other_amounts_apart() -> None:
    described = describe(PerImage(crop()))
    assert described == describe(copy.deepcopy(PerImage(crop())))
    assert described != describe(PerImage(crop(0.3)))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_images_that_are_not_square_are_turned_and_not_squeezed(shape: tuple[int, int]):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import affine

    images = noise(4, 2, *shape)
    out = RandomAffine(degrees=60, scale=0, shear=0, translate=0)(images, seeded(1))
    angles = 60 * (2 * torch.rand(4, 8, generator=seeded(1)) - 1)[:, ANGLE]
    for image, turned, angle in zip(images, out, angles.tolist(), strict=True):
        # torchvision turns the other way round
        expected = affine(image, -angle, [0, 0], 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)


def test_features_are_not_turned():
    with pytest.raises(
        UsageError, match=r"images \(B, C, H, W\) as floats .*, got torch.float32 of shape \(4, 7\); leave"
    ):
        RandomAffine()(noise(4, 7), seeded(0))


def test_normalizing_is_no_augmentation_and_transforms_of_bytes_are_named():
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    for wrong in (v2.Normalize([0.5], [0.2]), v2.Compose([v2.RandomCrop(4), v1.Compose([v1.Normalize([0.5], [0.2])])])):
        with pytest.raises(UsageError, match=r"an augmentation without Normalize, got .*; put it into the network"):
            as_augmentation(wrong)
    with pytest.raises(
        UsageError, match=r"a transform of float tensors \(3, 8, 8\), got Only torch.uint8 .*; use that of"
    ):
        as_augmentation(v1.RandAugment())(noise(2, 3, 8, 8), seeded(0))
