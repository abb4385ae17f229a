"""ClassSampler: what it draws is distinct, uniform over classes and items, and decided by the generator alone."""

import pytest
import torch
from torch import Tensor

from pml_fewshot.sampling.class_sampler import SMALL, ClassSampler

SIZES = {-7: 3, 0: 4, 5: 5, 2**40: 6, 11: 3}  # class -> items, in no order


def scattered_labels(sizes: dict[int, int]) -> Tensor:
    labels = torch.tensor([label for label, size in sizes.items() for _ in range(size)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(labels: Tensor, classes: int, per_class: int, times: int, seed: int = 0) -> Tensor:
    return ClassSampler(labels, classes, per_class, "a test").draw(times, seeded(seed))


# as few as can be, as many as there are, and in between
@pytest.mark.parametrize(("classes", "per_class"), [(1, 1), (2, 3), (3, 2), (5, 3), (5, 1)])
def test_every_draw_holds_distinct_items_of_distinct_classes(classes: int, per_class: int) -> None:
    labels = scattered_labels(SIZES)
    drawn = draws(labels, classes, per_class, 200)
    assert drawn.shape == (200, classes, per_class)
    for draw in drawn:
        of_class = labels[draw]
        assert (of_class == of_class[:, :1]).all()
        assert len(set(of_class[:, 0].tolist())) == classes
        assert len(set(draw.flatten().tolist())) == classes * per_class


def test_every_class_comes_up_as_often_as_every_other_however_large_it_is() -> None:
    labels, times = scattered_labels(SIZES), 20_000
    classes = labels[draws(labels, 2, 1, times)[:, :, 0]]
    expected = times * 2 / len(SIZES)
    chi_square = sum((int((classes == label).sum()) - expected) ** 2 / expected for label in SIZES)
    assert chi_square < 18.5  # 4 degrees of freedom: 1 in 1,000


@pytest.mark.parametrize("size", [4, SMALL + 1])  # both ways of drawing
def test_every_item_of_a_class_comes_up_as_often_in_every_place(size: int) -> None:
    labels = scattered_labels({3: size, 8: size})
    times = 500 * size
    drawn = draws(labels, 2, 2, times)
    for place in range(2):
        counts = torch.bincount(drawn[:, :, place].flatten(), minlength=len(labels)).double()
        expected = times / size
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # as many degrees of freedom as items less two, of variance twice that: within five standard deviations
        degrees = 2 * size - 2
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_the_items_of_two_classes_are_drawn_on_their_own() -> None:
    labels = scattered_labels({0: 3, 1: 3})
    drawn = draws(labels, 2, 1, 5000)[:, :, 0]
    in_order = torch.where(labels[drawn[:, :1]] == 0, drawn, drawn.flip(1))  # class 0 first
    pairs = [tuple(pair) for pair in in_order.tolist()]
    assert len(set(pairs)) == 9
    assert all(abs(pairs.count(pair) - 5000 / 9) < 5 * (5000 / 9) ** 0.5 for pair in set(pairs))


def test_the_generator_decides_everything() -> None:
    labels = scattered_labels(SIZES)
    before = torch.get_rng_state()
    drawer, generator = ClassSampler(labels, 3, 2, "a test"), seeded(4)
    first, second = drawer.draw(50, generator), drawer.draw(50, generator)
    assert not torch.equal(first, second)
    again = seeded(4)
    assert torch.equal(first, drawer.draw(50, again))
    assert torch.equal(second, ClassSampler(labels, 3, 2, "another").draw(50, again))
    assert not torch.equal(first, draws(labels, 3, 2, 50, seed=5))
    assert torch.equal(before, torch.get_rng_state())


def test_new_names_for_the_classes_in_the_same_order_change_nothing() -> None:
    labels = scattered_labels(SIZES)
    rank = {label: i for i, label in enumerate(sorted(SIZES))}
    renamed = torch.tensor([rank[int(label)] for label in labels])
    assert torch.equal(draws(labels, 3, 2, 50), draws(renamed, 3, 2, 50))


def test_too_few_classes_raise() -> None:
    with pytest.raises(ValueError, match="expected at least 6 classes for a test, got 5 classes; ask for fewer"):
        ClassSampler(scattered_labels(SIZES), 6, 1, "a test")


def test_a_class_too_small_raises_and_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"at least 4 items \(a test\) in every class, got 3 in class -7 \(2 of 5 classes"
    ):
        ClassSampler(scattered_labels(SIZES), 2, 4, "a test")
