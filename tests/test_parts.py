"""build: a partial or a class becomes its object, with the partials in it; everything else is left alone."""

from functools import partial

import pytest
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import NTXentLoss
from torch import nn

from pml_fewshot.parts import build


def test_partial_is_called() -> None:
    built = build(partial(LpDistance, p=1, power=3))
    assert isinstance(built, LpDistance)
    assert (built.p, built.power) == (1, 3)


def test_partials_among_the_arguments_are_built_first() -> None:
    built = build(partial(NTXentLoss, temperature=0.3, distance=partial(LpDistance, p=1)))
    assert isinstance(built.distance, LpDistance)
    assert built.distance.p == 1
    assert built.temperature == 0.3


def test_partials_nest_to_any_depth_and_by_position() -> None:
    built = build(partial(nn.Sequential, partial(nn.Sequential, partial(nn.Linear, 2, 3)), partial(nn.Linear, 3, 1)))
    assert (built[0][0].in_features, built[0][0].out_features, built[1].out_features) == (2, 3, 1)


def test_partial_of_a_partial() -> None:
    built = build(partial(partial(LpDistance, p=1), power=2))
    assert (built.p, built.power) == (1, 2)


@pytest.mark.parametrize("part", [None, 3, "text", CosineSimilarity(), len, [partial(len, "ab")]])
def test_anything_else_is_returned_as_it_is(part: object) -> None:
    assert build(part) is part


def test_class_is_called() -> None:
    assert isinstance(build(CosineSimilarity), CosineSimilarity)


def test_plain_classes_among_the_arguments_stay_factories() -> None:
    def make(norm_layer: type[nn.Module], width: int) -> nn.Module:
        return norm_layer(width)

    assert isinstance(build(partial(make, norm_layer=nn.BatchNorm1d, width=2)), nn.BatchNorm1d)


def test_each_build_is_a_new_object_and_the_partial_stays_as_it_was() -> None:
    part = partial(NTXentLoss, distance=partial(LpDistance, p=1))
    first, second = build(part), build(part)
    assert first is not second
    assert first.distance is not second.distance
    assert isinstance(part.keywords["distance"], partial)


def test_misspelt_argument_raises() -> None:
    with pytest.raises(TypeError, match="outt_features"):
        build(partial(nn.Linear, 2, outt_features=3))


def test_functions_are_factories() -> None:
    def make() -> nn.Module:
        return nn.Linear(2, 3)

    assert build(make).out_features == 3


def test_classes_of_pml_parts_among_the_arguments_are_built() -> None:
    assert isinstance(build(partial(NTXentLoss, distance=CosineSimilarity)).distance, CosineSimilarity)
