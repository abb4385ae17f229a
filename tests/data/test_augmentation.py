"""RandomAffine: each amount against a simple case, all together against a slow formula."""

import math

import numpy as np
import pytest
import torch

from pml_fewshot.data.augmentation import RandomAffine

# The columns of the uniform draws (B, 8), in the order that RandomAffine reads them.
ANGLE, SHEAR, SCALE_X, SCALE_Y, SHIFT_X, SHIFT_Y, APPLIED, MIRRORED = range(8)
NOTHING = {"degrees": 0.0, "scale": 0.0, "shear": 0.0, "translate": 0.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int, seed: int) -> np.ndarray:
    return torch.rand(count, 8, generator=seeded(seed)).double().numpy()


def distort(
    monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, augment: RandomAffine, **drawn: float
) -> torch.Tensor:
    """Distorts with the named draws set, the others in the middle, where they do nothing."""
    columns = {"angle": ANGLE, "shear": SHEAR, "scale_x": SCALE_X, "scale_y": SCALE_Y, "x": SHIFT_X, "y": SHIFT_Y}
    uniform = torch.full((len(images), 8), 0.5)
    for name, value in drawn.items():
        uniform[:, columns[name]] = value
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: uniform)
        return augment(images, seeded(0))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed))


def dot(row: int, column: int, size: int = 9) -> torch.Tensor:
    image = torch.zeros(1, 1, size, size)
    image[0, 0, row, column] = 1
    return image


def test_no_amounts_change_nothing():
    images = noise(6, 3, 9, 7)
    torch.testing.assert_close(RandomAffine(**NOTHING)(images, seeded(0)), images, atol=2e-5, rtol=0)


def test_probability_zero_changes_nothing():
    images = noise(6, 3, 9, 9)
    augment = RandomAffine(degrees=90, scale=0.5, shear=30, translate=0.5, probability=0)
    torch.testing.assert_close(augment(images, seeded(0)), images, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, 3), (-1, 2), (3, -3), (0.5, 0), (0, 6)])
def test_a_dot_is_shifted(monkeypatch: pytest.MonkeyPatch, right: float, down: float):
    """The draws tell where to read, so the picture moves the other way; what leaves the picture is gone."""
    augment = RandomAffine(**NOTHING | {"translate": 1.0})
    moved = distort(monkeypatch, dot(4, 4), augment, x=0.5 - right / 18, y=0.5 - down / 18)
    expected = torch.zeros(1, 1, 9, 9)
    if right == 0.5:
        expected[0, 0, 4, 4] = expected[0, 0, 4, 5] = 0.5
    elif 4 + down < 9:
        expected[0, 0, int(4 + down), int(4 + right)] = 1
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_what_is_shifted_in_is_black():
    images = torch.ones(64, 1, 8, 8)
    out = RandomAffine(**NOTHING | {"translate": 0.5})(images, seeded(0))
    shift = -(2 * draws(64, 0)[:, [SHIFT_X, SHIFT_Y]] - 1) * 0.5 * 8  # pixels right and down
    for image, (right, down) in zip(out, shift, strict=True):
        for row in range(8):
            for column in range(8):
                # the share of this pixel's neighbourhood that was inside before
                inside = max(0.0, min(1.0, 1 + row - down, 8 - row + down))
                inside *= max(0.0, min(1.0, 1 + column - right, 8 - column + right))
                assert image[0, row, column].item() == pytest.approx(inside, abs=1e-4)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3), (360, 0)])
@pytest.mark.parametrize("size", [8, 9])
def test_the_highest_draw_turns_against_the_clock_like_rot90(
    monkeypatch: pytest.MonkeyPatch, degrees: int, turns: int, size: int
):
    images, augment = noise(1, 3, size, size), RandomAffine(**NOTHING | {"degrees": degrees})
    out = distort(monkeypatch, images, augment, angle=1.0)
    torch.testing.assert_close(out, images.rot90(turns, dims=(2, 3)), atol=1e-4, rtol=0)
    back = distort(monkeypatch, images, augment, angle=0.0)
    torch.testing.assert_close(back, images.rot90(-turns, dims=(2, 3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "axis"), [("scale_x", 3), ("scale_y", 2)])
def test_scale_widens_one_axis_about_the_middle(monkeypatch: pytest.MonkeyPatch, name: str, axis: int):
    image = torch.zeros(1, 1, 16, 16)
    image[:, :, 6:10, 6:10] = 1
    larger = distort(monkeypatch, image, RandomAffine(**NOTHING | {"scale": 0.5}), **{name: 1.0})
    smaller = distort(monkeypatch, image, RandomAffine(**NOTHING | {"scale": 0.5}), **{name: 0.0})
    for out, length in ((larger, 6), (smaller, 2)):
        torch.testing.assert_close(out, out.flip(2, 3), atol=1e-5, rtol=0)  # still in the middle
        along, across = out.sum(axis).amax().item(), out.sum(5 - axis).amax().item()
        assert along == pytest.approx(length)
        assert across == pytest.approx(4)


def test_shear_moves_rows_sideways_in_proportion_to_their_height(monkeypatch: pytest.MonkeyPatch):
    column = torch.zeros(1, 1, 17, 17)
    column[..., 8] = 1
    augment = RandomAffine(**NOTHING | {"shear": math.degrees(math.atan(0.5))})
    out = distort(monkeypatch, column, augment, shear=1.0)[0, 0]
    place = (out * torch.arange(17)).sum(1) / out.sum(1)
    torch.testing.assert_close(place, 8 - 0.5 * (torch.arange(17) - 8), atol=1e-4, rtol=0)


def test_half_of_the_images_are_mirrored_and_nothing_else():
    images = noise(400, 1, 5, 6)
    out = RandomAffine(**NOTHING, flip=True)(images, seeded(0))
    mirrored = draws(400, 0)[:, MIRRORED] < 0.5
    assert 160 < mirrored.sum() < 240
    for image, result, flipped in zip(images, out, mirrored, strict=True):
        torch.testing.assert_close(result, image.flip(2) if flipped else image, atol=2e-5, rtol=0)


def test_probability_is_the_share_of_images_that_are_distorted():
    images = noise(500, 1, 6, 6)
    out = RandomAffine(probability=0.3)(images, seeded(0))
    changed = ((out - images).abs().amax(dim=(1, 2, 3)) > 1e-3).numpy()
    np.testing.assert_array_equal(changed, draws(500, 0)[:, APPLIED] < np.float32(0.3))
    assert 0.25 < changed.mean() < 0.35


def test_probability_zero_mirrors_nothing():
    images = noise(20, 1, 6, 6)
    out = RandomAffine(flip=True, probability=0)(images, seeded(0))
    torch.testing.assert_close(out, images, atol=2e-5, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_all_together_equal_a_slow_formula(flip: bool):
    """Read each pixel at (scale)^-1 (rotation) (shear) (mirror) of its place, by hand, bilinearly, black outside."""
    images = noise(8, 2, 7, 7)
    probability = 1.0 if flip else 0.7  # so that it does not matter whether a mirrored image counts as distorted
    augment = RandomAffine(degrees=60, scale=0.4, shear=20, translate=0.2, flip=flip, probability=probability)
    out = augment(images, seeded(4)).numpy()
    drawn = draws(8, 4)
    assert flip or (drawn[:, APPLIED] < 0.7).sum() in range(3, 8)  # both kinds are there
    pixels, size = images.double().numpy(), 7
    for b, draw in enumerate(drawn):
        spread = 2 * draw - 1
        angle, shear = math.radians(60 * spread[ANGLE]), math.tan(math.radians(20 * spread[SHEAR]))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        inverse_scale = np.diag([1 / (1 + 0.4 * spread[SCALE_X]), 1 / (1 + 0.4 * spread[SCALE_Y])])
        matrix = inverse_scale @ rotation @ np.array([[1, shear], [0, 1]])
        shift = 0.2 * size * spread[[SHIFT_X, SHIFT_Y]]
        if draw[APPLIED] >= probability:
            matrix, shift = np.eye(2), np.zeros(2)
        if flip and draw[MIRRORED] < 0.5:
            matrix = matrix @ np.diag([-1, 1])
        for row in range(size):
            for column in range(size):
                x, y = matrix @ np.array([column - 3.0, row - 3.0]) + shift + 3
                left, top = math.floor(x), math.floor(y)
                expected = np.zeros(2)
                for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    if 0 <= top + i < size and 0 <= left + j < size:
                        weight = (1 - abs(y - top - i)) * (1 - abs(x - left - j))
                        expected += weight * pixels[b, :, top + i, left + j]
                np.testing.assert_allclose(out[b, :, row, column], expected, atol=1e-4)


def test_each_image_is_distorted_by_its_own_amounts_and_all_channels_alike():
    base = noise(1, 1, 9, 9)
    colours = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    out = RandomAffine()((base * colours).expand(8, -1, -1, -1), seeded(0))
    assert len({image.numpy().tobytes() for image in out}) == 8
    torch.testing.assert_close(out, out[:, :1] * colours)
    assert out.min() >= 0
    assert out.max() <= 1


def test_the_generator_alone_decides():
    images, augment = noise(4, 1, 9, 9), RandomAffine(flip=True)
    before, kept = torch.get_rng_state(), images.clone()
    generator = seeded(0)
    first, second = augment(images, generator), augment(images, generator)
    assert torch.equal(first, augment(images, seeded(0)))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, kept)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
    ],
)
def test_any_floats_keep_their_type(dtype: torch.dtype):
    assert RandomAffine()(noise(2, 1, 5, 5).to(dtype), seeded(0)).dtype == dtype


@pytest.mark.parametrize("amounts", [{"probability": 50}, {"scale": 1.0}, {"degrees": -1.0}, {"translate": -0.1}])
def test_amounts_out_of_range_are_refused(amounts: dict[str, float]):
    with pytest.raises(ValueError, match=f"expected {next(iter(amounts))}"):
        RandomAffine(**amounts)
