"""BatchSpec and Batch: sizes that make sense, and what a batch refuses to hold."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from pml_fewshot.batches import Batch, BatchSpec


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_size_is_the_number_of_items() -> None:
    assert BatchSpec(3, 5).size == 15
    assert BatchSpec(3, 5, views=2).size == 15  # a second view is no second item


def test_a_batch_has_one_view_unless_asked_for_two() -> None:
    assert BatchSpec(2, 1).views == 1


def test_text_says_what_is_in_a_batch() -> None:
    assert str(BatchSpec(3, 5)) == "3 classes with 5 items each"


@pytest.mark.parametrize("name", ["classes", "per_class"])
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None])
def test_counts_must_be_counts(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"expected {name} to be an integer of at least 1, got {wrong}"):
        BatchSpec(**{"classes": 2, "per_class": 2, name: wrong})  # type: ignore[arg-type]


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2 classes in a batch, got 1; there is no other"):
        BatchSpec(1, 4)


@pytest.mark.parametrize("views", [0, 3, -1])
def test_views_are_one_or_two(views: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 or 2 views, got {views}; use 2 for self-supervised losses"):
        BatchSpec(2, 2, views=views)


def test_neither_can_be_changed() -> None:
    spec, batch = BatchSpec(2, 2), Batch(images(), torch.arange(4))
    with pytest.raises(FrozenInstanceError):
        spec.classes = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        batch.labels = torch.zeros(4)  # type: ignore[misc]


def test_a_batch_holds_what_it_was_given() -> None:
    labels = torch.tensor([5, -1, 5, 2**40])
    batch = Batch(images(), labels, images(seed=1))
    assert torch.equal(batch.images, images())
    assert torch.equal(batch.labels, labels)
    assert batch.other_view is not None
    assert torch.equal(batch.other_view, images(seed=1))
    assert Batch(images(), labels).other_view is None


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("with_view", [False, True])
def test_moving_takes_all_of_it_along(device: torch.device | str, with_view: bool) -> None:
    batch = Batch(images(), torch.arange(4), images(seed=1) if with_view else None).to(device)
    assert torch.equal(batch.images, images())
    assert torch.equal(batch.labels, torch.arange(4))
    if with_view:
        assert batch.other_view is not None
        assert torch.equal(batch.other_view, images(seed=1))
    else:
        assert batch.other_view is None


@pytest.mark.parametrize("with_view", [False, True])
def test_moving_moves_every_part(with_view: bool) -> None:
    moved = Batch(images(), torch.arange(4), images(seed=1) if with_view else None).to("meta")
    parts = [moved.images, moved.labels, *([moved.other_view] if moved.other_view is not None else [])]
    assert len(parts) == 2 + with_view
    assert all(part.device.type == "meta" for part in parts)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), got \(4, 3, 3\); stack them"):
        Batch(images()[:, 0], torch.arange(4))


@pytest.mark.parametrize("labels", [torch.arange(3), torch.arange(4).unsqueeze(1)])
def test_there_is_one_label_for_each_image(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a batch's labels of shape \(4,\)"):
        Batch(images(), labels)


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a batch's labels as an int64 tensor"):
        Batch(images(), torch.zeros(4))
