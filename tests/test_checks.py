"""checks: what passes, and what the errors say."""

import numpy as np
import pytest
import torch

from pml_fewshot.checks import (
    BLOCK_ROWS,
    as_labels,
    as_names,
    check_at_least_one,
    check_disjoint,
    check_enough_items,
    check_finite,
)


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None])
def test_counts_are_integers_of_at_least_one(value: object):
    check_at_least_one("shots", 1)
    with pytest.raises(ValueError, match=r"expected shots to be an integer of at least 1, got .*; give shots >= 1"):
        check_at_least_one("shots", value)


def test_finite_values_of_any_type_pass():
    for values in (torch.ones(4, 3), torch.tensor([[1, 2]]), torch.empty(0, 3)):
        check_finite(values, "rows")
    for dtype in (torch.float32, torch.float16):
        check_finite(torch.full((100, 3), torch.finfo(dtype).max, dtype=dtype), "rows")  # their sum is infinite


def refusal(values: torch.Tensor) -> str:
    with pytest.raises(ValueError, match=r"^expected finite rows, got NaN or infinity in") as caught:
        check_finite(values, "rows")
    return str(caught.value).split(" got NaN or infinity in ")[1].split(";")[0]


@pytest.mark.parametrize("shape", [(), (2,), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_counted_across_blocks(shape: tuple[int, ...], dtype: torch.dtype):
    assert BLOCK_ROWS == 16_384
    count = 2 * BLOCK_ROWS + 5
    values = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_finite(values, "rows")
    for row in (count - 1, 2 * BLOCK_ROWS, BLOCK_ROWS, BLOCK_ROWS - 1, 0):  # each alone, at the edges of the blocks
        one = values.clone()
        one[row] = float("nan")
        assert refusal(one) == f"1 of {count} rows, first in row {row}"
    several = values.clone()
    several[[7, BLOCK_ROWS + 3, count - 2]] = float("inf")
    several[BLOCK_ROWS + 4] = -float("inf")
    assert refusal(several) == f"4 of {count} rows, first in row 7"


@pytest.mark.parametrize("shape", [(3,), (3, 2), (BLOCK_ROWS + 3, 2)])
def test_a_nan_among_values_whose_sum_overflows_is_found_and_only_it(shape: tuple[int, ...]):
    largest = torch.finfo(torch.float64).max
    values = torch.full(shape, largest, dtype=torch.float64)
    for sign in (1, -1):
        check_finite(sign * values, "rows")
    values[::2] *= -1
    check_finite(values, "rows")
    values[-1] = float("nan")
    assert refusal(values) == f"1 of {len(values)} rows, first in row {len(values) - 1}"


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (torch.tensor([5, -3, 2**60]), [5, -3, 2**60], ()),
        (torch.tensor([5, 3, 0], dtype=torch.uint8), [5, 3, 0], ()),
        (np.array([5, -3, 0], np.int16), [5, -3, 0], ()),
        ((5, -3, 0), [5, -3, 0], ()),
        ([np.int64(5), np.int64(3), np.int64(0)], [5, 3, 0], ()),
        (["ü", "b", "ü"], [1, 0, 1], ("b", "ü")),
        (np.array(["ü", "b", "ü"], object), [1, 0, 1], ("b", "ü")),
        (np.array(["c", "b", "c"], np.bytes_), [1, 0, 1], ("b", "c")),
    ],
)
def test_labels_are_converted_to_int64_and_texts_numbered(labels: object, expected: list[int], names: tuple[str, ...]):
    found, found_names = as_labels(labels, 3, "the set's")
    assert (found.dtype, found.tolist(), found_names) == (torch.int64, expected, names)


def test_labels_of_other_kinds_and_numbers_are_refused():
    for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.bool), [0.5, 1, 2], [True, False, True], [None, 1, 2]):
        with pytest.raises(TypeError, match=r"expected the set's labels as integers or texts, got .*; convert them"):
            as_labels(wrong, 3, "the set's")
    with pytest.raises(ValueError, match=r"the set's labels below 2\*\*63, got 9223372036854775808; number"):
        as_labels(np.array([1, 2**63, 0], np.uint64), 3, "the set's")
    for shape in ((2,), (4,), (3, 1), ()):
        with pytest.raises(ValueError, match=r"labels of shape \(3,\), got shape"):
            as_labels(torch.zeros(shape, dtype=torch.int64), 3, "the set's")


@pytest.mark.parametrize(
    ("labels", "odd"),
    [
        (["a", float("nan")], "nan in row 1"),
        ([1, "1"], "1 in row 0"),
        ([True, "x"], "True"),
        (["a", b"a"], "b'a' in row 1"),
    ],
)
def test_what_is_no_text_among_texts_is_named(labels: list[object], odd: str):
    """numpy would make a text of it: a class named "nan"."""
    with pytest.raises(TypeError, match=f"the set's labels as integers or texts, got {odd}.* beside texts; convert"):
        as_labels(labels, 2, "the set's")
    with pytest.raises(ValueError, match="expected one of the set's labels for each item, got a list of lists of diff"):
        as_labels([[1], [2, 3]], 2, "the set's")


def test_class_names_come_in_order_or_with_their_numbers():
    expected = ("bee", "ant")
    for names in (["bee", "ant"], np.array(["bee", "ant"]), {"ant": 1, "bee": 0}, {1: "ant", 0: "bee"}):
        assert as_names(names) == expected
    for names, message in (
        ({"bee", "ant"}, "class names in order, got the set"),
        (
            {"bee": 0, "ant": 2},
            "class names with the numbers from 0 on, each once, got {'bee': 0, 'ant': 2}; give a list",
        ),
        (["a", "b", "a"], "different class names, got \\['a'\\] more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            as_names(names)


def test_the_first_class_with_too_few_items_is_named_by_its_label():
    labels, counts = torch.tensor([-7, 10**12, 30]), torch.tensor([4, 2, 3])
    check_enough_items(labels, counts, 2, "1 + 1")
    found = r"\(1 \+ 3\) in every class, got 2 in class 1000000000000 \(2 of 3 classes have too few"
    with pytest.raises(ValueError, match=f"at least 4 items {found}"):
        check_enough_items(labels, counts, 4, "1 + 3")


def test_a_class_in_two_groups_is_named_with_both():
    check_disjoint([("train", ["a", "b", "a"]), ("val", ["c"]), ("test", [])])
    with pytest.raises(ValueError, match=r"class 'b' in train and in test; put each class into one split"):
        check_disjoint([("train", ["a", "b"]), ("val", ["c"]), ("test", ["d", "b"])])
