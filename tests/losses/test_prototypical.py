"""PrototypicalLoss against values computed by hand and PML's NCALoss; loops over items are in test_loss_contract.py."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import NCALoss

from pml_fewshot.losses.prototypical import PrototypicalLoss
from tests.losses.formulas import SQUARED_EUCLID, normal


def test_default_is_squared_euclid_without_normalization() -> None:
    distance = PrototypicalLoss().distance
    assert isinstance(distance, LpDistance)
    assert (distance.p, distance.power, distance.normalize_embeddings) == (2, 2, False)


def test_hand_computed_value() -> None:
    # prototypes at 0 and 4 (the mean of 3 and 5); squared distances of the query at 1: 1 and 9
    support, labels = torch.tensor([[0.0], [3.0], [5.0]]).double(), torch.tensor([0, 1, 1])
    loss = PrototypicalLoss()(torch.tensor([[1.0]]).double(), torch.tensor([0]), None, support, labels)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-9)


def test_hand_computed_value_without_support() -> None:
    # item 0 (at 0): own prototype 2, other 5 -> 4, 25. Item 1 (at 2): own 0, other 5 -> 4, 9. Item 2 is alone.
    loss = PrototypicalLoss()(torch.tensor([[0.0], [2.0], [5.0]]).double(), torch.tensor([3, 3, 1]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-21)) + math.log1p(math.exp(-5))) / 2, rel=1e-9)


@pytest.mark.filterwarnings("ignore:a softmax over CosineSimilarity with scale 1")
@pytest.mark.parametrize("distance", [SQUARED_EUCLID, CosineSimilarity], ids=["euclid", "cosine"])
def test_at_one_shot_it_equals_nca_of_pml(distance: type) -> None:
    labels, support_labels = torch.arange(4).repeat_interleave(3), torch.tensor([2, 0, 3, 1])
    outcomes = []
    for loss in (PrototypicalLoss(distance()), NCALoss(distance=distance())):
        query, support = normal(12, 5, seed=1).requires_grad_(), normal(4, 5, seed=2).requires_grad_()
        value = loss(query, labels, None, support, support_labels)
        outcomes.append((value, *torch.autograd.grad(value, [query, support])))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_away_embeddings_have_their_loss_and_gradient(dtype: torch.dtype) -> None:
    query = torch.tensor([[0.0, 0.0]], dtype=dtype).requires_grad_()
    support = torch.tensor([[20.0, 0.0], [0.0, 1.0], [40.0, 0.0]], dtype=dtype).requires_grad_()
    loss = PrototypicalLoss()(query, torch.tensor([1]), None, support, torch.tensor([1, 0, 1]))
    # the class is at 30, another at 1: 900 - 1, and exp(-899) is 0
    assert loss.item() == pytest.approx(899, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(query.grad, torch.tensor([[-60.0, 2.0]], dtype=dtype))
    torch.testing.assert_close(support.grad, torch.tensor([[30.0, 0], [0, -2.0], [30.0, 0]], dtype=dtype))
