"""BatchSpec and Batch: sizes that make sense, and what a batch refuses to hold."""

import pytest
import torch

from pml_fewshot.sampling.batches import Batch, BatchSpec

IMAGES, LABELS = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def test_size_and_text_say_what_is_in_a_batch() -> None:
    assert BatchSpec(3, 5).size == BatchSpec(3, 5, views=2).size == 15  # a second view is no second item
    assert str(BatchSpec(3, 5)) == "3 classes with 5 items each"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2), "classes to be an integer of at least 1, got 0"),
        ((2, 2.5), "per_class to be an integer of at least 1, got 2.5"),
        ((1, 4), "at least 2 classes in a batch, got 1; there is none"),
        ((2, 2, 0), "1 or 2 views, got 0; use 2 for self-supervised losses"),
        ((2, 2, 3), "1 or 2 views, got 3"),
    ],
)
def test_other_sizes_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        BatchSpec(*sizes)


@pytest.mark.parametrize("device", ["cpu", torch.device("meta")])  # meta: without memory, shapes and places only
def test_moving_takes_all_of_it_along(device: torch.device | str) -> None:
    assert Batch(IMAGES, LABELS).to(device).other_view is None
    batch = Batch(IMAGES, LABELS, 1 - IMAGES)
    moved = batch.to(device)
    for name in ("images", "labels", "other_view"):
        value = getattr(moved, name)
        assert value.device == torch.device(device)
        assert value.is_meta or torch.equal(value, getattr(batch, name))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, 0, 0, 0], LABELS, r"expected images \(B, C, H, W\), or items \(B, \*item\), got \(4,\); stack them"),
        (IMAGES, LABELS[:3], r"expected a batch's labels of shape \(4,\)"),
        (IMAGES, LABELS.unsqueeze(1), r"expected a batch's labels of shape \(4,\)"),
    ],
)
def test_other_shapes_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(images, labels)
