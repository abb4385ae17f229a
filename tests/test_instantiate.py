"""build: a partial or a class becomes its object, with the partials in it; everything else is left alone."""

from functools import partial

import pytest
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import NTXentLoss
from torch import nn

from pml_fewshot.instantiate import instantiate


def test_partial_is_called() -> None:
    built = instantiate(partial(LpDistance, p=1, power=3))
    assert isinstance(built, LpDistance)
    assert (built.p, built.power) == (1, 3)


def test_partials_among_the_arguments_are_built_first() -> None:
    built = instantiate(partial(NTXentLoss, temperature=0.3, distance=partial(LpDistance, p=1)))
    assert isinstance(built.distance, LpDistance)
    assert built.distance.p == 1
    assert built.temperature == 0.3


def test_partials_nest_to_any_depth_and_by_position() -> None:
    built = instantiate(
        partial(nn.Sequential, partial(nn.Sequential, partial(nn.Linear, 2, 3)), partial(nn.Linear, 3, 1))
    )
    assert (built[0][0].in_features, built[0][0].out_features, built[1].out_features) == (2, 3, 1)


def test_partial_of_a_partial() -> None:
    built = instantiate(partial(partial(LpDistance, p=1), power=2))
    assert (built.p, built.power) == (1, 2)


@pytest.mark.parametrize("part", [None, 3, "text", CosineSimilarity(), len])
def test_anything_else_is_returned_as_it_is(part: object) -> None:
    assert instantiate(part) is part


def test_class_is_called() -> None:
    assert isinstance(instantiate(CosineSimilarity), CosineSimilarity)


def test_plain_classes_among_the_arguments_stay_factories() -> None:
    def make(norm_layer: type[nn.Module], width: int) -> nn.Module:
        return norm_layer(width)

    assert isinstance(instantiate(partial(make, norm_layer=nn.BatchNorm1d, width=2)), nn.BatchNorm1d)


def test_each_build_is_a_new_object_and_the_partial_stays_as_it_was() -> None:
    part = partial(NTXentLoss, distance=partial(LpDistance, p=1))
    first, second = instantiate(part), instantiate(part)
    assert first is not second
    assert first.distance is not second.distance
    assert isinstance(part.keywords["distance"], partial)


def test_misspelt_argument_raises() -> None:
    with pytest.raises(TypeError, match="outt_features"):
        instantiate(partial(nn.Linear, 2, outt_features=3))


def test_partials_in_lists_tuples_and_dicts_are_called() -> None:
    part = partial(lambda *parts: parts, [partial(len, "ab")], (partial(len, "abc"),), {"key": partial(len, "")})
    assert instantiate(part) == ([2], (3,), {"key": 0})


def test_functions_are_passed_on() -> None:
    """MAML's loss may be one."""
    assert instantiate(partial(lambda loss: loss, nn.functional.cross_entropy)) is nn.functional.cross_entropy


def test_classes_of_pml_parts_among_the_arguments_are_built() -> None:
    assert isinstance(instantiate(partial(NTXentLoss, distance=CosineSimilarity)).distance, CosineSimilarity)
