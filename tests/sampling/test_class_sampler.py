"""Drawing without replacement against the textbook, and classes whose items are drawn on their own."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pml_fewshot.sampling import class_sampler
from pml_fewshot.sampling.class_sampler import ClassSampler, draw_without_replacement
from tests.sampling.material import scattered_labels, seeded


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), count=st.integers(1, 12), seed=st.integers(0, 2**32))
@example(sizes=[7, 30, 5, 1000], count=5, seed=3)
@example(sizes=[1692] * 3, count=33, seed=0)
@example(sizes=[1692] * 3, count=1692, seed=0)  # takes 31 s where the cost grows with the square
@settings(deadline=None, max_examples=150, derandomize=True)
def test_draws_equal_a_shuffle_of_the_whole_array_that_is_stopped_early(sizes: list[int], count: int, seed: int):
    """The textbook Fisher-Yates shuffle, written out, from the same random numbers; small, large, in blocks or not."""
    sizes = [max(size, count) for size in sizes]
    uniform = torch.rand(count, len(sizes), generator=seeded(seed), dtype=torch.float64)
    expected = []
    for row, size in enumerate(sizes):
        array = list(range(size))
        for i in range(count):
            j = i + int(uniform[i, row].item() * (size - i))
            array[i], array[j] = array[j], array[i]
        expected.append(array[:count])
    for blocks in (2**22, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_sampler, "MAX_SHUFFLED", blocks)
            drawn = draw_without_replacement(torch.tensor(sizes), count, seeded(seed))
        assert drawn.dtype == torch.int64
        assert drawn.T.tolist() == expected


def test_the_items_of_two_classes_are_drawn_on_their_own() -> None:
    labels = scattered_labels({0: 3, 1: 3})
    drawn = ClassSampler(labels, 2, 1, "a test").draw(5000, seeded(0))[:, :, 0]
    in_order = torch.where(labels[drawn[:, :1]] == 0, drawn, drawn.flip(1))  # class 0 first
    pairs = [tuple(pair) for pair in in_order.tolist()]
    assert len(set(pairs)) == 9
    assert all(abs(pairs.count(pair) - 5000 / 9) < 5 * (5000 / 9) ** 0.5 for pair in set(pairs))
