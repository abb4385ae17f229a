"""DihedralViews against images turned and mirrored pixel by pixel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot import Conv4, DihedralViews, Embedder, UsageError


def turned(image: Tensor) -> Tensor:
    """A square image (C, H, H) turned by 90 degrees, counterclockwise."""
    size = image.shape[1]
    made = torch.zeros_like(image)
    for y in range(size):
        for x in range(size):
            made[:, size - 1 - x, y] = image[:, y, x]
    return made


def mirrored(image: Tensor) -> Tensor:
    """A square image (C, H, H), left and right exchanged."""
    return torch.stack([image[:, :, -1 - x] for x in range(image.shape[2])], dim=2)


def all_views(image: Tensor) -> list[Tensor]:
    views = [image, mirrored(image)]
    for _ in range(3):
        views += [turned(views[-2]), turned(views[-1])]
    return views


def test_a_cosine_is_the_mean_of_those_of_all_views() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(72, 5)).double()
    found = DihedralViews(trunk).eval()(images)
    assert found.shape == (3, 40)
    for a, of_a in zip(images, found, strict=True):
        for b, of_b in zip(images, found, strict=True):
            pairs = zip(all_views(a), all_views(b), strict=True)
            cosines = [F.cosine_similarity(trunk(one[None]), trunk(other[None])).item() for one, other in pairs]
            torch.testing.assert_close((of_a @ of_b).item(), sum(cosines) / 8)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    made = torch.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            if 0 <= y + down < image.shape[1] and 0 <= x + right < image.shape[2]:
                made[:, y + down, x + right] = image[:, y, x]
    return made


def test_a_shifted_views_embedding_is_the_mean_over_five_images() -> None:
    image = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).double()
    found = DihedralViews(trunk, shift=2).eval()(image[None])[0].view(8, 5) * 8**0.5
    expected = []
    for view in all_views(image):
        moved = [shifted(view, *by) for by in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))]
        expected.append(F.normalize(sum(F.normalize(trunk(each[None])[0], dim=0) for each in moved), dim=0))
    for each in expected:
        assert min((each - block).abs().max() for block in found) < 1e-9
    with pytest.raises(UsageError, match="expected shift >= 0, got -1"):
        DihedralViews(trunk, shift=-1)


def test_a_turned_image_has_the_same_blocks_in_another_order() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    plain, other = (DihedralViews(trunk).eval()(each)[0].view(8, 3) for each in (image, image.rot90(1, (2, 3))))
    assert not torch.allclose(plain, other)
    torch.testing.assert_close(plain[plain[:, 0].argsort()], other[other[:, 0].argsort()])


def test_in_training_it_is_the_image_alone_and_sees_its_batch_once() -> None:
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    made = Embedder(DihedralViews(Conv4(channels=4))).train()
    plain = made.trunk.trunk
    expected = F.normalize(plain(images), dim=1)
    assert torch.equal(made(images), expected)
    assert plain.blocks[0].norm.num_batches_tracked == 2  # once for each call
