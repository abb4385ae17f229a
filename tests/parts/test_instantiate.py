"""instantiate: a partial becomes its object, with the partials in it; everything else is left alone."""

from functools import partial

import pytest
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss, NTXentLoss
from torch import nn

from pml_fewshot.evaluation.heads import k_nearest_neighbours
from pml_fewshot.parts.instantiate import instantiate


def test_partials_are_called_with_those_among_their_arguments_first() -> None:
    built = instantiate(partial(NTXentLoss, temperature=0.3, distance=partial(partial(LpDistance, p=1), power=3)))
    assert isinstance(built.distance, LpDistance)
    assert (built.temperature, built.distance.p, built.distance.power) == (0.3, 1, 3)
    nested = partial(nn.Sequential, partial(nn.Sequential, partial(nn.Linear, 2, 3)), partial(nn.Linear, 3, 1))
    built = instantiate(nested)  # by position, to any depth
    assert (built[0][0].in_features, built[0][0].out_features, built[1].out_features) == (2, 3, 1)
    part = partial(lambda *parts: parts, [partial(len, "ab")], (partial(len, "abc"),), {"key": partial(len, "")})
    assert instantiate(part) == ([2], (3,), {"key": 0})
    with pytest.raises(TypeError, match="outt_features"):
        instantiate(partial(nn.Linear, 2, outt_features=3))


@pytest.mark.parametrize("part", [None, 3, "text", CosineSimilarity(), len, nn.BatchNorm1d])
def test_anything_else_is_returned_and_passed_on_as_it_is(part: object) -> None:
    """MAML's loss may be a function, and torchvision's norm_layer wants a class."""
    assert instantiate(part) is part
    assert instantiate(partial(lambda part: part, part)) is part


def test_a_partial_of_a_function_that_wants_more_is_passed_on() -> None:
    head = partial(k_nearest_neighbours, k=5)
    assert instantiate(partial(dict, head=head, made=partial(sorted, "ba")))["head"] is head
    with pytest.raises(TypeError, match="embedding_size"):  # of a class: what it lacks is said
        instantiate(partial(ArcFaceLoss, num_classes=3))


def test_classes_of_pml_parts_are_built() -> None:
    assert isinstance(instantiate(CosineSimilarity), CosineSimilarity)
    assert isinstance(instantiate(partial(NTXentLoss, distance=CosineSimilarity)).distance, CosineSimilarity)


def test_each_build_is_a_new_object_and_the_partial_stays_as_it_was() -> None:
    part = partial(NTXentLoss, distance=partial(LpDistance, p=1))
    first, second = instantiate(part), instantiate(part)
    assert first is not second
    assert first.distance is not second.distance
    assert isinstance(part.keywords["distance"], partial)
