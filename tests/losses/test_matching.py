"""MatchingLoss against PML's NCALoss and the prototypical loss, and far away; loops are in test_loss_contract.py."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import NCALoss
from torch import Tensor

from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from tests.losses.formulas import (
    DISTANCES,
    SQUARED_EUCLID,
    arguments,
    check_same,
    each_input,
    each_precision,
    normal,
    outcome,
)

cosine_alone = pytest.mark.filterwarnings("ignore:a softmax over")


def test_hand_computed_value() -> None:
    # squared distances of the query at 1: 1 to class 0, 4 and 16 to class 1
    query, support = torch.tensor([[1.0]]).double(), torch.tensor([[0.0], [3.0], [5.0]]).double()
    total = math.exp(-1) + math.exp(-4) + math.exp(-16)
    for label, share in ((0, math.exp(-1)), (1, math.exp(-4) + math.exp(-16))):
        given = (query, torch.tensor([label]), None, support, torch.tensor([0, 1, 1]))
        assert MatchingLoss(SQUARED_EUCLID())(*given).item() == pytest.approx(-math.log(share / total), rel=1e-9)


def test_default_is_cosine_at_scale_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"at most 0\.65; give scale=10 or learn_scale=True"):
        loss = MatchingLoss()
    assert type(loss.distance) is CosineSimilarity
    assert loss.scale.item() == 1


@cosine_alone
@each_input
def test_default_is_nca_of_pml_with_cosine(episode: bool) -> None:
    # of a batch's lone item PML gives no loss either, for its share is 0
    theirs = NCALoss(distance=CosineSimilarity())
    check_same(outcome(MatchingLoss(), arguments(episode)), outcome(theirs, arguments(episode)))


@cosine_alone
@pytest.mark.parametrize("distance", DISTANCES)
def test_at_one_shot_it_equals_the_prototypical_loss_and_nca(distance: str) -> None:
    make = DISTANCES[distance]
    labels, support_labels = torch.arange(4).repeat_interleave(3), torch.tensor([2, 0, 3, 1])
    ours, *others = (
        outcome(loss, (normal(12, 5, seed=1), labels, None, normal(4, 5, seed=2), support_labels))
        for loss in (MatchingLoss(make()), PrototypicalLoss(make()), NCALoss(distance=make()))
    )
    for other in others:
        check_same(ours, other, rtol=1e-9)


@each_precision
@pytest.mark.parametrize("spread", [10.0, 200.0])  # squared distances of hundreds and of 100,000s
@each_input
def test_far_away_embeddings_have_their_loss_and_gradient(episode: bool, spread: float, dtype: torch.dtype) -> None:
    """By torch's logarithms of sums in float64, a second way to both."""
    given = [spread * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments(episode, dtype)]
    exact = [leaf.double().requires_grad_() for leaf in given[::3]]
    scores = -(exact[0].unsqueeze(1) - exact[-1]).square().sum(dim=2)
    if not episode:
        scores = scores - torch.eye(8).double() * 1e12
    own = given[1].unsqueeze(1) == given[-1 if episode else 1]
    kept = own.sum(dim=1) > (0 if episode else 1)
    slow = (scores.logsumexp(dim=1) - scores.masked_fill(~own, -1e12).logsumexp(dim=1))[kept]
    assert slow.max() > 100
    expected = [slow.mean(), *torch.autograd.grad(slow.mean(), exact)]
    for got, wanted in zip(outcome(MatchingLoss(SQUARED_EUCLID()), tuple(given)), expected, strict=True):
        assert wanted.abs().max() > 1
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@each_precision
def test_a_query_far_from_its_class_and_near_another_is_drawn_to_its_class(dtype: torch.dtype) -> None:
    """exp(-900) is 0 even in float64: NCALoss drops such a query, which has most to learn."""
    query, support = torch.tensor([[0.0]], dtype=dtype), torch.tensor([[30.0], [0.0], [31.0]], dtype=dtype)
    given = (query, torch.tensor([1]), None, support, torch.tensor([1, 0, 1]))
    value, *gradients = outcome(MatchingLoss(SQUARED_EUCLID()), given)
    assert value.item() == pytest.approx(900, rel=1e-6)
    # both terms of the loss by hand: -2 * 30 towards the nearest of its class; the near item adds nothing
    for gradient, wanted in zip(gradients, ([-60.0], [60.0, 0.0, 0.0]), strict=True):
        torch.testing.assert_close(gradient.flatten(), torch.tensor(wanted, dtype=dtype))


@each_precision
@pytest.mark.parametrize(
    ("where", "expected", "slope"),
    [
        ([0.0, 1.0, 40.0], 0.0, [0.0, 0.0, 0.0]),
        # items 0 and 1 have each other at 1600, and the lone one at 1 and at 1521
        ([0.0, 40.0, 1.0], (1600 - 1 + 1600 - 1521) / 2, [-80 + 1.0, 80 - 39.0, -1 + 39.0]),
    ],
)
def test_a_lone_item_far_away_breaks_nothing(where: list, expected: float, slope: list, dtype: torch.dtype) -> None:
    batch = torch.tensor(where, dtype=dtype).unsqueeze(1)
    value, gradient = outcome(MatchingLoss(SQUARED_EUCLID()), (batch, torch.tensor([0, 0, 1])))
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient.flatten(), torch.tensor(slope, dtype=dtype))
