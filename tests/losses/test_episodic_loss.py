"""What the losses over a support set share: the scale, its warning, miners' weights, who takes part, subclasses."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.episodic_loss import EpisodicLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from tests.losses.formulas import BATCH_LABELS, LOSSES, SQUARED_EUCLID, arguments, each_input, losses_by_hand, normal

each_name = pytest.mark.parametrize("name", ["prototypical", "matching"])
BOUNDED = r"^a softmax over {} with scale {} gives the right one of 5 classes at most {:.2f}; give scale=10 or learn"


@pytest.mark.parametrize(
    ("distance", "scale", "bound"),
    [
        (CosineSimilarity(), 1, 0.65),
        (DotProductSimilarity(), 1, 0.65),
        (LpDistance(), 1, 0.65),
        (LpDistance(p=1), 0.5, 0.40),
        (LpDistance(power=2), 1, 0.93),
    ],
)
@each_name
def test_a_bounded_similarity_without_a_scale_is_warned_of(
    name: str, distance: Any, scale: float, bound: float
) -> None:
    with pytest.warns(UserWarning, match=BOUNDED.format(type(distance).__name__, scale, bound)) as caught:
        loss = LOSSES[name](distance, scale=scale)
    assert [warning.filename for warning in caught] == [__file__]
    # and the bound is reached: the right class as near as can be, four others as far as can be
    support = torch.tensor([[1.0, 0]] + 4 * [[-1.0, 0]]).double()
    value = loss(support[:1], torch.tensor([0]), None, support, torch.arange(5))
    assert math.exp(-value.item()) == pytest.approx(bound, abs=0.005)


@each_name
def test_no_warning_where_the_softmax_can_get_sharp(name: str) -> None:
    """Warnings are errors here."""
    LOSSES[name](CosineSimilarity(), scale=10)
    LOSSES[name](LpDistance(), scale=1, learn_scale=True)
    dot = DotProductSimilarity(normalize_embeddings=False)
    for unbounded in (SQUARED_EUCLID(), dot, LpDistance(power=-1), SNRDistance(), WeightedL1Similarity()):
        LOSSES[name](unbounded, scale=1)


@each_input
@each_name
def test_the_learned_scale_has_the_right_gradient_and_no_other_is_learned(name: str, episode: bool) -> None:
    loss, given = LOSSES[name](CosineSimilarity(), scale=10, learn_scale=True).double(), arguments(episode)
    assert loss.scale.item() == pytest.approx(10, rel=1e-6)

    def value(log_scale: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"log_scale": log_scale}, given)

    assert torch.autograd.gradcheck(value, loss.log_scale)
    assert torch.autograd.grad(loss(*given), loss.log_scale)[0].abs() > 1e-3
    assert not any(p.requires_grad for p in LOSSES[name](CosineSimilarity(), scale=10).parameters())


@pytest.mark.parametrize(
    ("episode", "mined", "weights"),
    [
        # query 1 is an anchor four times, 3 twice, 0 once; the other places index the support
        (True, ([1, 1, 3, 0, 1, 3, 1], [0, 2, 4, 1, 0, 2, 4], [1, 3, 5, 6, 1, 3, 5]), {0: 0.25, 1: 1, 3: 0.5}),
        # of pairs both anchors: 0 twice, 1 and 4 once
        (True, ([0, 1], [1, 2], [0, 4], [3, 3]), {0: 1, 1: 0.5, 4: 0.5}),
        # of a batch all places count; item 2 stands alone in its class and has no loss
        (False, ([3, 3], [5, 5], [2, 4]), {3: 1, 5: 1, 4: 0.5}),
        (True, ([], [], []), dict.fromkeys(range(8), 1)),
    ],
    ids=["triplets", "pairs", "batch", "nothing mined"],
)
@each_name
def test_mined_items_count_by_how_often_they_occur(name: str, episode: bool, mined: Any, weights: dict) -> None:
    losses = {i: loss for loss, (i,) in losses_by_hand(name, SQUARED_EUCLID(), arguments(episode))}
    expected = sum(weight * losses[i] for i, weight in weights.items()) / len(losses)
    given = arguments(episode, mined=tuple(torch.tensor(index).long() for index in mined))
    torch.testing.assert_close(LOSSES[name](distance=SQUARED_EUCLID())(*given), expected, rtol=1e-6, atol=0)


class Recorded(EpisodicLoss):
    """Answers with logits that were made beforehand, and keeps what it was asked."""

    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        self.asked = (queries, support, member, own_class)
        self.logits = normal(len(queries), member.shape[1], seed=3)
        return self.logits


def test_a_subclass_gives_logits_of_the_classes_in_the_order_of_their_labels() -> None:
    query, _, _, support, _ = arguments(True)
    of, labels = torch.tensor([7, 0, 7, 9_000_000_000, 7, -3, 0]), torch.tensor([0, 7, -3, 7, 0, 0, 0, 7])
    loss = Recorded(SQUARED_EUCLID())
    got = loss(query, labels, None, support, of)
    assert [part is given for part, given in zip(loss.asked, (query, support, 0, None), strict=True)] == [1, 1, 0, 1]
    assert loss.asked[2].tolist() == [[float(c == item) for c in (-3, 0, 7, 9_000_000_000)] for item in of.tolist()]
    assert loss.asked[2].dtype == support.dtype
    torch.testing.assert_close(got, F.cross_entropy(loss.logits, torch.tensor([1, 2, 0, 2, 1, 1, 1, 2])))
    # without a support it is told the classes, and lone items have no loss
    got = loss(query, BATCH_LABELS)
    target = torch.searchsorted(torch.tensor([4, 8, 11]), BATCH_LABELS)
    assert torch.equal(loss.asked[3], target)
    assert torch.equal(loss.asked[2], F.one_hot(target).double())
    kept = [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(got, F.cross_entropy(loss.logits[kept], target[kept]))
    # but not where the support is equal to the queries and another tensor
    got = loss(query, BATCH_LABELS, None, query.clone(), BATCH_LABELS.clone())
    assert loss.asked[3] is None
    torch.testing.assert_close(got, F.cross_entropy(loss.logits, target))


@pytest.mark.parametrize("distance", [CosineSimilarity, "cosine"])
def test_what_is_no_distance_is_refused_at_once(distance: Any) -> None:
    with pytest.raises(UsageError, match=r"expected distance as a PML distance or None, got .*; make one"):
        PrototypicalLoss(distance=distance)


@each_name
def test_a_support_without_the_queries_classes_and_a_scale_of_zero_or_below_raise(name: str) -> None:
    def call(*support: Tensor, label: int = 0) -> None:
        LOSSES[name](SQUARED_EUCLID())(normal(2, 5, seed=1), torch.tensor([7, label]), None, *support)

    for missing in (5, -7, 10_000_000_000):  # between, below and above the classes that are there
        with pytest.raises(UsageError, match=rf"^expected a support item .* none for classes \[{missing}\]; draw"):
            call(normal(2, 5), torch.tensor([7, 0]), label=missing)
    with pytest.raises(UsageError, match=r"^expected at least one support item, got none; draw"):
        call(normal(0, 5), torch.zeros(0).long())
    with pytest.raises(TypeError, match="support labels as integers or texts, got NoneType"):
        call(normal(2, 5))
    with pytest.raises(TypeError, match=r"support labels as integers or texts, got a tensor of torch\.float32"):
        call(normal(2, 5), torch.tensor([7.0, 0.0]))
    for scale in (0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=f"^expected scale above 0, got {scale}; "):
            LOSSES[name](scale=scale)
