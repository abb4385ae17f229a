"""describe: parts that do something else are described otherwise."""

import numpy as np

from pml_fewshot.parts.describe import describe


class Scaled:
    def __init__(self, by: float) -> None:
        self.by = by

    def apply(self, x: float) -> float:
        return self.by * x


def test_bound_methods_and_long_arrays_are_told_apart_by_what_they_hold():
    assert describe(Scaled(2).apply) == describe(Scaled(2).apply) != describe(Scaled(3).apply)
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1  # where numpy's repr shows dots
    assert describe(long) == describe(long.copy()) != describe(other)
    assert describe(np.array(["a", "b"])) == ["a", "b"]
