"""MatchingLoss against PML's NCALoss, and far away; loops are in test_loss_contract.py."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import NCALoss
from torch import Tensor

from pml_fewshot.losses.matching import MatchingLoss
from tests.losses.formulas import SQUARED_EUCLID, arguments, check_same, each_input, each_precision, outcome


@each_input
def test_default_is_nca_of_pml_with_cosine_and_a_warning_of_its_scale(episode: bool) -> None:
    with pytest.warns(UserWarning, match=r"at most 0\.65; give scale=10 or learn_scale=True"):
        loss = MatchingLoss()
    # of a batch's lone item PML gives no loss either, for its share is 0
    theirs = NCALoss(distance=CosineSimilarity())
    check_same(outcome(loss, arguments(episode)), outcome(theirs, arguments(episode)))


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
