"""BatchSpec and Batch: sizes that make sense, and what a batch refuses to hold."""

import pytest
import torch

from pml_fewshot.sampling.batches import Batch, BatchSpec


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_size_is_the_number_of_items() -> None:
    assert BatchSpec(3, 5).size == 15
    assert BatchSpec(3, 5, views=2).size == 15  # a second view is no second item


def test_text_says_what_is_in_a_batch() -> None:
    assert str(BatchSpec(3, 5)) == "3 classes with 5 items each"


@pytest.mark.parametrize("name", ["classes", "per_class"])
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None])
def test_counts_must_be_counts(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"expected {name} to be an integer of at least 1, got {wrong}"):
        BatchSpec(**{"classes": 2, "per_class": 2, name: wrong})  # type: ignore[arg-type]


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2 classes in a batch, got 1; there is none"):
        BatchSpec(1, 4)


@pytest.mark.parametrize("views", [0, 3, -1])
def test_views_are_one_or_two(views: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 or 2 views, got {views}; use 2 for self-supervised losses"):
        BatchSpec(2, 2, views=views)


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


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), got \(4, 3, 3\); stack them"):
        Batch(images()[:, 0], torch.arange(4))


@pytest.mark.parametrize("labels", [torch.arange(3), torch.arange(4).unsqueeze(1)])
def test_there_is_one_label_for_each_image(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a batch's labels of shape \(4,\)"):
        Batch(images(), labels)
