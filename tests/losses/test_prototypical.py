"""PrototypicalLoss against values computed by hand.

Loops over items are in test_loss_contract.py, PML's NCALoss is in test_matching.py.
"""

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor

from pml_fewshot.losses.prototypical import PrototypicalLoss
from tests.losses.formulas import each_precision, outcome


def column(*values: float) -> Tensor:
    return torch.tensor(values).double().unsqueeze(1)


def test_default_is_squared_euclid_without_normalization() -> None:
    distance = PrototypicalLoss().distance
    assert isinstance(distance, LpDistance)
    assert (distance.p, distance.power, distance.normalize_embeddings) == (2, 2, False)


def test_hand_computed_values_with_and_without_support() -> None:
    # prototypes at 0 and 4 (the mean of 3 and 5); squared distances of the query at 1: 1 and 9
    loss = PrototypicalLoss()(column(1), torch.tensor([0]), None, column(0, 3, 5), torch.tensor([0, 1, 1]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-9)
    # item 0 (at 0): own prototype 2, other 5 -> 4, 25. Item 1 (at 2): own 0, other 5 -> 4, 9. Item 2 is alone.
    loss = PrototypicalLoss()(column(0, 2, 5), torch.tensor([3, 3, 1]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-21)) + math.log1p(math.exp(-5))) / 2, rel=1e-9)


@each_precision
def test_far_away_embeddings_have_their_loss_and_gradient(dtype: torch.dtype) -> None:
    query = torch.tensor([[0.0, 0.0]], dtype=dtype)
    support = torch.tensor([[20.0, 0.0], [0.0, 1.0], [40.0, 0.0]], dtype=dtype)
    given = (query, torch.tensor([1]), None, support, torch.tensor([1, 0, 1]))
    value, to_query, to_support = outcome(PrototypicalLoss(), given)
    # the class is at 30, another at 1: 900 - 1, and exp(-899) is 0
    assert value.item() == pytest.approx(899, rel=1e-6)
    torch.testing.assert_close(to_query, torch.tensor([[-60.0, 2.0]], dtype=dtype))
    torch.testing.assert_close(to_support, torch.tensor([[30.0, 0], [0, -2.0], [30.0, 0]], dtype=dtype))
