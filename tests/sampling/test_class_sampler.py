"""Drawing without replacement against the textbook, and classes whose items are drawn on their own."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pml_fewshot.sampling import class_sampler
from pml_fewshot.sampling.class_sampler import ClassSampler, draw_without_replacement
from tests.sampling.material import scattered_labels, seeded


def shuffled(slots: list[int], size: int) -> list[int]:
    """The textbook Fisher-Yates shuffle, written out; a dict stands for the array, which may be of any size."""
    array: dict[int, int] = {}
    for i, j in enumerate(slots):
        assert i <= j < size
        array[i], array[j] = array.get(j, j), array.get(i, i)
    return [array[i] for i in range(len(slots))]


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), count=st.integers(1, 40), seed=st.integers(0, 2**32))
@example(sizes=[7, 30, 5, 1000], count=5, seed=3)
@example(sizes=[20] * 40 + [32, 16], count=16, seed=1)
@example(sizes=[32], count=32, seed=2)
@example(sizes=[1692] * 3, count=1692, seed=0)
@example(sizes=[10**12, 2**40, 64], count=64, seed=0)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_draws_equal_a_shuffle_of_whole_arrays_that_is_stopped_early(sizes: list[int], count: int, seed: int) -> None:
    """From the same random numbers, in blocks or not, as in all versions: published figures name their seeds.

    Of small sets, which are shuffled, also in the way of large ones.
    """
    sizes = [max(size, count) for size in sizes]
    uniform = torch.rand(count, len(sizes), generator=seeded(seed), dtype=torch.float64).T.tolist()
    slots = [[i + int(u * (size - i)) for i, u in enumerate(row)] for size, row in zip(sizes, uniform, strict=True)]
    for block, largest in product((2**14, 1), (max(sizes), max(33, *sizes))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_sampler, "BLOCK", block)
            patch.setattr(class_sampler, "MANY", 1)
            drawn = draw_without_replacement(torch.tensor(sizes), count, seeded(seed), largest)
        assert drawn.dtype == torch.int64
        assert drawn.T.tolist() == [shuffled(*each) for each in zip(slots, sizes, strict=True)]


@given(ahead=st.lists(st.integers(0, 4), min_size=1, max_size=40))
@example(ahead=[1] * 34 + [0])  # one number is carried through all steps and found: the longest path there is
@settings(deadline=None, max_examples=300, derandomize=True)
def test_steps_that_meet_again_and_again_find_what_swapping_leaves(ahead: list[int]) -> None:
    slots = [i + each for i, each in enumerate(ahead)]
    found = torch.empty(1, len(slots), dtype=torch.int64)
    class_sampler._found(torch.tensor([slots]), found)
    assert found.tolist() == [shuffled(slots, len(slots) + 4)]


def test_the_items_of_two_classes_are_drawn_on_their_own() -> None:
    labels = scattered_labels({0: 3, 1: 3})
    drawn = ClassSampler(labels, 2, 1, "a test").draw(5000, seeded(0))[:, :, 0]
    in_order = torch.where(labels[drawn[:, :1]] == 0, drawn, drawn.flip(1))  # class 0 first
    pairs = [tuple(pair) for pair in in_order.tolist()]
    assert len(set(pairs)) == 9
    assert all(abs(pairs.count(pair) - 5000 / 9) < 5 * (5000 / 9) ** 0.5 for pair in set(pairs))


@pytest.mark.parametrize(("times", "larger"), [(200, 20), (199, 20), (200, 33)])
def test_many_small_sets_alone_are_shuffled(times: int, larger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    shuffle = class_sampler._shuffled

    def noted(*given: Any) -> None:
        rows.append(len(given[1]))
        shuffle(*given)

    monkeypatch.setattr(class_sampler, "_shuffled", noted)
    sampler = ClassSampler(scattered_labels(dict.fromkeys(range(33), 20) | {40: larger}), 5, 16, "a test")
    drawn = sampler.draw(times, seeded(0))
    assert rows == ([1000] if times == 200 and larger == 20 else [])  # the items; of the 34 classes none
    monkeypatch.setattr(class_sampler, "MANY", 10**9 if rows else 1)
    assert torch.equal(drawn, sampler.draw(times, seeded(0)))  # in another way
