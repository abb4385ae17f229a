"""PrototypicalLoss: its default, and far away; loops are in test_loss_contract.py."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_fewshot.losses.prototypical import PrototypicalLoss
from tests.losses.formulas import each_precision, outcome


def test_default_is_squared_euclid_without_normalization() -> None:
    distance = PrototypicalLoss().distance
    assert isinstance(distance, LpDistance)
    assert (distance.p, distance.power, distance.normalize_embeddings) == (2, 2, False)


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
