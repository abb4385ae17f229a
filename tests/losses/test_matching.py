"""MatchingLoss, and what it shares with all EpisodicLosses, against loops written from Vinyals et al. 2016 and PML."""

import copy
import inspect
import io
import math
import pickle
from functools import cache, partial
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import (
    BaseDistance,
    BatchedDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import MultipleLosses, NCALoss
from pytorch_metric_learning.miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    TripletMarginMiner,
)
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    BaseReducer,
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import (
    BaseRegularizer,
    CenterInvariantRegularizer,
    LpRegularizer,
    RegularFaceRegularizer,
    SparseCentersRegularizer,
    ZeroMeanRegularizer,
)
from pytorch_metric_learning.trainers import MetricLossOnly
from scipy.special import logsumexp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.episodic_loss import EpisodicLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss

DTYPES = [torch.float32, torch.float64]
SUPPORT_LABELS = torch.tensor([7, 0, 7, 9_000_000_000, 7, -3, 0])  # uneven shots: 3, 2, 1 and 1
QUERY_LABELS = torch.tensor([0, 7, -3, 7, 9_000_000_000])
BATCH_LABELS = torch.tensor([4, 4, 8, 11, 4, 11, 11, 11])  # 8 stands alone
DIMS = 5

# every distance that PML exports, in the forms whose behaviour differs, and why a class of it is left out
DISTANCES: dict[type, list[dict[str, object]]] = {
    LpDistance: [
        {},
        {"p": 1},
        {"power": 2},
        {"normalize_embeddings": False},
        {"normalize_embeddings": False, "power": 2},
        {"normalize_embeddings": False, "p": 1, "power": 3},
    ],
    SNRDistance: [{}, {"normalize_embeddings": False}],
    CosineSimilarity: [{}, {"power": 3}],
    DotProductSimilarity: [{}, {"normalize_embeddings": False}],
}
OUR_DISTANCES: dict[type, list[dict[str, object]]] = {WeightedL1Similarity: [{"dim": DIMS}]}
NO_DISTANCE_OF_A_LOSS = {
    BaseDistance: "abstract",
    BatchedDistance: "hands each slab of the matrix to a callback and returns None, so no loss of PML can use it",
}
REDUCERS: dict[type, list[partial]] = {
    MeanReducer: [partial(MeanReducer)],
    SumReducer: [partial(SumReducer)],
    AvgNonZeroReducer: [partial(AvgNonZeroReducer)],
    ThresholdReducer: [partial(ThresholdReducer, high=1.28), partial(ThresholdReducer, low=1.28)],
    PerAnchorReducer: [partial(PerAnchorReducer), partial(PerAnchorReducer, reducer=partial(SumReducer))],
    ClassWeightedReducer: [partial(ClassWeightedReducer, weights=torch.linspace(0.1, 2, 12))],
    DoNothingReducer: [partial(DoNothingReducer)],
    MultipleReducers: [partial(MultipleReducers, {"loss": SumReducer()})],
}
NO_REDUCER_OF_THIS_LOSS = {
    BaseReducer: "abstract",
    DivisorReducer: "asks the loss for a divisor, which only losses that count their own terms give (ProxyAnchorLoss)",
}
REGULARIZERS: dict[type, partial] = {
    LpRegularizer: partial(LpRegularizer, p=1, power=2),
    ZeroMeanRegularizer: partial(ZeroMeanRegularizer),
    CenterInvariantRegularizer: partial(CenterInvariantRegularizer),
    RegularFaceRegularizer: partial(RegularFaceRegularizer),
    SparseCentersRegularizer: partial(SparseCentersRegularizer, num_classes=4, centers_per_class=2),  # of 8 items
}
SQUARED_EUCLID = LpDistance(normalize_embeddings=False, power=2)
ALL_DISTANCES = [partial(kind, **options) for kind, forms in (DISTANCES | OUR_DISTANCES).items() for options in forms]
ALL_REDUCERS = [factory for forms in REDUCERS.values() for factory in forms]


def assert_close(got: Tensor, expected: Tensor) -> None:
    rtol = 1e-4 if got.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 100)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def name(factory: partial) -> str:
    options = ",".join(f"{k}={v}" for k, v in factory.keywords.items() if k != "weights")
    return f"{factory.func.__name__}({options})"


def exported(module: object, base: type) -> set[type]:
    return {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)} | {base}


# --- the formula, one query and one support item at a time ------------------------------------------------------------


def value(distance: BaseDistance, query: Tensor, item: Tensor) -> Tensor:
    """The similarity of one query to one support item, written from the distances' definitions."""
    x, y = query.double(), item.double()
    if distance.normalize_embeddings:
        x = x / (x.abs() ** distance.p).sum() ** (1 / distance.p)
        y = y / (y.abs() ** distance.p).sum() ** (1 / distance.p)
    if isinstance(distance, WeightedL1Similarity):
        weight = torch.tensor(len(x) ** -0.5).double()  # its weights are float32
        return -weight * sum((x[d] - y[d]).abs() for d in range(len(x)))
    if isinstance(distance, LpDistance):
        d = ((x - y).abs() ** distance.p).sum() ** (1 / distance.p)
    elif isinstance(distance, SNRDistance):
        d = (x - y).var() / x.var()
    else:
        d = (x * y).sum()
    return d**distance.power if distance.is_inverted else -(d**distance.power)


def share_of(scores: list[Tensor], labels: list[int], label: int) -> Tensor:
    """Equation 1: the sum over the items of one class of the attention a(x, x_i), a softmax over all items."""
    total = sum(score.exp() for score in scores)
    attention = [score.exp() / total for score in scores]
    return sum(a for a, of in zip(attention, labels, strict=True) if of == label)


def explicit_with_support(
    distance: BaseDistance,
    query: Tensor,
    query_labels: Tensor,
    support: Tensor,
    support_labels: Tensor,
    scale: float = 1.0,
) -> list[Tensor]:
    """Loss of each query: minus the logarithm of the share of its class."""
    losses = []
    for x, label in zip(query, query_labels.tolist(), strict=True):
        scores = [scale * value(distance, x, item) for item in support]
        losses.append(-share_of(scores, support_labels.tolist(), label).log())
    return losses


def explicit_leave_one_out(distance: BaseDistance, batch: Tensor, labels: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Loss of each item that is not alone in its class; the support of an item is all other items."""
    losses = []
    for i in range(len(batch)):
        others = [j for j in range(len(batch)) if j != i]
        if not any(labels[j] == labels[i] for j in others):
            continue
        losses += explicit_with_support(
            distance, batch[i : i + 1], labels[i : i + 1], batch[others], labels[others], scale
        )
    return losses


def squared_euclid_in_logarithms(query: Tensor, support: Tensor) -> list[list[float]]:
    """Similarities as Python numbers, for logarithms of sums that stay where exp would be 0."""
    return [[-sum((a - b) ** 2 for a, b in zip(q, s, strict=True)) for s in support.tolist()] for q in query.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_with_support_it_is_the_formula_of_the_paper(distance: partial, scale: float, dtype: torch.dtype) -> None:
    query, support = normal(5, DIMS, seed=1, dtype=dtype), normal(7, DIMS, seed=2, dtype=dtype)
    got = MatchingLoss(distance, scale=scale)(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    expected = explicit_with_support(distance(), query, QUERY_LABELS, support, SUPPORT_LABELS, scale)
    assert got.dtype == dtype
    # the scale is kept as the logarithm of a float32, good to 1e-7
    rtol = 1e-4 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), torch.stack(expected).mean(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_on_a_batch_each_item_attends_to_all_the_others(distance: partial, scale: float, dtype: torch.dtype) -> None:
    batch = normal(8, DIMS, seed=3, dtype=dtype)
    got = MatchingLoss(distance, scale=scale)(batch, BATCH_LABELS)
    expected = explicit_leave_one_out(distance(), batch, BATCH_LABELS, scale)
    assert len(expected) == 7  # class 8 has one item: it is attended to, but has nothing to attend to
    assert got.dtype == dtype
    rtol = 1e-4 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), torch.stack(expected).mean(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", range(8))
def test_any_labels_with_and_without_support(seed: int) -> None:
    """Numbers of classes and items, lone items and classes without a query, as they come."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(torch.randint(2, 6, (), generator=generator))
    support_labels = torch.cat([torch.arange(classes), torch.randint(classes, (5,), generator=generator)])
    support_labels = support_labels[torch.randperm(len(support_labels), generator=generator)]
    labels = torch.randint(classes, (6,), generator=generator)
    query, support = normal(6, 3, seed=10 + seed), normal(len(support_labels), 3, seed=20 + seed)
    loss = MatchingLoss(SQUARED_EUCLID)
    expected = explicit_with_support(SQUARED_EUCLID, query, labels, support, support_labels)
    assert_close(loss(query, labels, None, support, support_labels), torch.stack(expected).mean())
    expected = explicit_leave_one_out(SQUARED_EUCLID, support, support_labels)
    assert_close(loss(support, support_labels), torch.stack(expected).mean())


def test_hand_computed_value() -> None:
    # squared distances of the query at 1: 1 to class 0, 4 and 16 to class 1
    support, labels = torch.tensor([[0.0], [3.0], [5.0]]).double(), torch.tensor([0, 1, 1])
    for label, share in ((0, math.exp(-1)), (1, math.exp(-4) + math.exp(-16))):
        loss = MatchingLoss(SQUARED_EUCLID)(
            torch.tensor([[1.0]]).double(), torch.tensor([label]), None, support, labels
        )
        total = math.exp(-1) + math.exp(-4) + math.exp(-16)
        assert loss.item() == pytest.approx(-math.log(share / total), rel=1e-9)


def test_hand_computed_value_without_support() -> None:
    # item 0 (at 0): own at 2, other at 5 -> 4, 25. Item 1 (at 2): own at 0, other at 5 -> 4, 9. Item 2 is alone.
    loss = MatchingLoss(SQUARED_EUCLID)(torch.tensor([[0.0], [2.0], [5.0]]).double(), torch.tensor([3, 3, 1]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-21)) + math.log1p(math.exp(-5))) / 2, rel=1e-9)


def test_default_is_cosine_at_scale_one() -> None:
    loss = MatchingLoss()
    assert type(loss.distance) is CosineSimilarity
    assert loss.scale.item() == 1


def test_with_cosine_and_scale_one_five_classes_get_no_sharper_than_the_docstring_says() -> None:
    """Own class at cosine 1 and four others at -1: e / (e + 4 / e)."""
    support = torch.tensor([[1.0, 0], [-1, 0], [-1, 0], [-1, 0], [-1, 0]]).double()
    loss = MatchingLoss()(support[:1], torch.tensor([0]), None, support, torch.arange(5))
    assert math.exp(-loss.item()) == pytest.approx(math.e / (math.e + 4 / math.e))
    assert math.exp(-loss.item()) == pytest.approx(0.65, abs=0.005)


# --- PML's own loss, and the prototypical one, as second opinions -----------------------------------------------------


def items(with_support: bool, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """Leaves that want a gradient, and the arguments of a loss made of them by `call`."""
    if with_support:
        return [normal(5, DIMS, seed=1, dtype=dtype), normal(7, DIMS, seed=2, dtype=dtype)], QUERY_LABELS
    return [normal(8, DIMS, seed=3, dtype=dtype)], BATCH_LABELS


def call(loss: nn.Module, leaves: list[Tensor], labels: Tensor, mined: Any = None) -> Tensor:
    support = (leaves[1], SUPPORT_LABELS) if len(leaves) == 2 else ()
    return loss(leaves[0], labels, mined, *support)


def assert_same_value_and_gradient(ours: nn.Module, theirs: nn.Module, with_support: bool, dtype: torch.dtype) -> None:
    outcomes = []
    for loss in (ours, theirs):
        leaves, labels = items(with_support, dtype)
        for leaf in leaves:
            leaf.requires_grad_()
        result = call(loss, leaves, labels)
        outcomes.append((result, *torch.autograd.grad(result, leaves)))
    for got, expected in zip(*outcomes, strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_default_is_nca_of_pml_with_cosine(with_support: bool, dtype: torch.dtype) -> None:
    # of the batch's lone item PML gives no loss either, for its share is 0
    assert_same_value_and_gradient(MatchingLoss(), NCALoss(distance=CosineSimilarity()), with_support, dtype)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_scale_is_the_softmax_scale_of_nca(with_support: bool, scale: float) -> None:
    for distance in (CosineSimilarity(), LpDistance(), SQUARED_EUCLID):
        theirs = NCALoss(softmax_scale=scale, distance=distance)
        leaves, labels = items(with_support, torch.float64)
        got, expected = call(MatchingLoss(distance, scale=scale), leaves, labels), call(theirs, leaves, labels)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_at_one_shot_it_equals_the_prototypical_loss_and_nca(distance: partial) -> None:
    labels, support_labels = torch.arange(4).repeat_interleave(3), torch.tensor([2, 0, 3, 1])
    outcomes = []
    for loss in (MatchingLoss(distance), PrototypicalLoss(distance), NCALoss(distance=distance())):
        query, support = normal(12, DIMS, seed=1).requires_grad_(), normal(4, DIMS, seed=2).requires_grad_()
        result = loss(query, labels, None, support, support_labels)
        outcomes.append((result, *torch.autograd.grad(result, [query, support])))
    for other in outcomes[1:]:
        for got, expected in zip(outcomes[0], other, strict=True):
            assert_close(got, expected)


def test_at_more_shots_it_is_not_the_prototypical_loss() -> None:
    leaves, labels = items(True, torch.float64)
    assert abs(call(MatchingLoss(SQUARED_EUCLID), leaves, labels) - call(PrototypicalLoss(), leaves, labels)) > 0.01


def test_classes_that_coincide_are_the_prototypical_loss_at_any_number_of_shots() -> None:
    query, centres = normal(6, DIMS, seed=1), normal(3, DIMS, seed=2)
    labels, of_item = torch.arange(3).repeat(2), torch.arange(3).repeat_interleave(4)
    ours, theirs = (
        loss(query, labels, None, centres[of_item], of_item)
        for loss in (MatchingLoss(SQUARED_EUCLID), PrototypicalLoss())
    )
    assert_close(ours, theirs)


# --- far-away embeddings ----------------------------------------------------------------------------------------------


def slow_far_losses(query: Tensor, labels: Tensor, support: Tensor, of: Tensor, leave_out: bool) -> list[float]:
    losses = []
    for i, scores in enumerate(squared_euclid_in_logarithms(query.double(), support.double())):
        others = [j for j in range(len(support)) if not (leave_out and j == i)]
        own = [scores[j] for j in others if of[j] == labels[i]]
        if own:
            losses.append(float(logsumexp([scores[j] for j in others]) - logsumexp(own)))
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [5.0, 12.0, 100.0])  # squared distances of hundreds, thousands and 10,000s
@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_far_away_embeddings_have_their_loss_and_gradient(
    with_support: bool, spread: float, dtype: torch.dtype
) -> None:
    leaves, labels = items(with_support, dtype)
    leaves = [(spread * leaf).requires_grad_() for leaf in leaves]
    loss = call(MatchingLoss(SQUARED_EUCLID), leaves, labels)
    of = SUPPORT_LABELS if with_support else labels
    expected = slow_far_losses(leaves[0].detach(), labels, leaves[-1].detach(), of, not with_support)
    assert max(expected) > 100
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    gradients = torch.autograd.grad(loss, leaves)
    # the logarithms of sums of torch, in float64, as a second way to the gradient
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = -(exact[0].unsqueeze(1) - exact[-1]).square().sum(dim=2)
    if not with_support:
        scores = scores - torch.eye(len(scores)).double() * 1e12
    own = labels.unsqueeze(1) == of
    has_own = own.sum(dim=1) > (0 if with_support else 1)
    slow = (scores.logsumexp(dim=1) - scores.masked_fill(~own, -1e12).logsumexp(dim=1))[has_own].mean()
    for got, wanted in zip(gradients, torch.autograd.grad(slow, exact), strict=True):
        assert torch.isfinite(got).all()
        assert wanted.abs().max() > 1
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_far_from_its_class_and_near_another_is_drawn_to_its_class(dtype: torch.dtype) -> None:
    """exp(-900) is 0 even in float64: NCALoss drops such a query, which has most to learn."""
    query = torch.tensor([[0.0, 0.0]], dtype=dtype).requires_grad_()
    support = torch.tensor([[30.0, 0.0], [0.0, 0.0], [31.0, 0.0]], dtype=dtype).requires_grad_()
    loss = MatchingLoss(SQUARED_EUCLID)(query, torch.tensor([1]), None, support, torch.tensor([1, 0, 1]))
    assert loss.item() == pytest.approx(900, rel=1e-6)
    loss.backward()
    # both terms of the loss by hand: -2 * 30 towards the nearest of its class; the near item adds nothing
    torch.testing.assert_close(query.grad, torch.tensor([[-60.0, 0.0]], dtype=dtype))
    torch.testing.assert_close(support.grad, torch.tensor([[60.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lone_item_far_away_breaks_nothing(dtype: torch.dtype) -> None:
    batch = torch.tensor([[0.0], [1.0], [40.0]], dtype=dtype).requires_grad_()
    loss = MatchingLoss(SQUARED_EUCLID)(batch, torch.tensor([0, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(batch.grad).all()
    far = torch.tensor([[0.0], [40.0], [1.0]], dtype=dtype).requires_grad_()
    loss = MatchingLoss(SQUARED_EUCLID)(far, torch.tensor([0, 0, 1]))
    loss.backward()
    # items 0 and 1 have each other at 1600, and the lone one at 1 and at 1521
    assert loss.item() == pytest.approx((1600 - 1 + 1600 - 1521) / 2, rel=1e-6)
    torch.testing.assert_close(far.grad, torch.tensor([[-80 + 1.0], [80 - 39.0], [-1 + 39.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_dot_products_do_not_overflow(dtype: torch.dtype) -> None:
    dot = DotProductSimilarity(normalize_embeddings=False)
    batch = (100 * normal(8, DIMS, seed=3, dtype=dtype)).requires_grad_()
    loss = MatchingLoss(dot)(batch, BATCH_LABELS)
    x = batch.detach().double()
    scores = x @ x.T
    expected = []
    for i in range(8):
        own = [scores[i, j] for j in range(8) if j != i and BATCH_LABELS[j] == BATCH_LABELS[i]]
        if own:
            expected.append(logsumexp([scores[i, j] for j in range(8) if j != i]) - logsumexp(own))
    assert loss.item() == pytest.approx(sum(expected) / 7, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, batch)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_sixteen_bits_give_nearly_the_same(with_support: bool, dtype: torch.dtype) -> None:
    leaves, labels = items(with_support, torch.float64)
    got = call(MatchingLoss(scale=2), [leaf.to(dtype) for leaf in leaves], labels)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(call(MatchingLoss(scale=2), leaves, labels).item(), rel=0.03)


# --- who takes part ---------------------------------------------------------------------------------------------------


def test_a_batch_without_two_items_of_a_class_has_zero_loss_and_gradient() -> None:
    batch = normal(4, DIMS).requires_grad_()
    loss = MatchingLoss()(batch, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert batch.grad is not None
    assert not batch.grad.any()


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_where_all_items_are_of_one_class_there_is_nothing_to_tell_apart(with_support: bool) -> None:
    batch = normal(4, DIMS).requires_grad_()
    support = (None, normal(3, DIMS, seed=1), torch.full((3,), 6)) if with_support else ()
    loss = MatchingLoss()(batch, torch.full((4,), 6), *support)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert batch.grad.abs().max() < 1e-12


def test_a_lone_item_is_a_wrong_answer_for_the_others_and_gets_a_gradient_from_them() -> None:
    batch = normal(8, DIMS, seed=3).requires_grad_()
    with_it = MatchingLoss(SQUARED_EUCLID)(batch, BATCH_LABELS)
    (gradient,) = torch.autograd.grad(with_it, batch)
    assert gradient[2].abs().max() > 1e-3
    without = [0, 1, 3, 4, 5, 6, 7]
    left = MatchingLoss(SQUARED_EUCLID)(batch[without], BATCH_LABELS[without])
    assert with_it > left + 1e-3


def test_class_that_only_the_support_holds_counts_as_a_wrong_answer() -> None:
    query, support = normal(3, DIMS, seed=1), normal(4, DIMS, seed=2)
    labels, support_labels = torch.tensor([2, 5, 2]), torch.tensor([2, 5, 9, 9])
    got = MatchingLoss(SQUARED_EUCLID)(query, labels, None, support, support_labels)
    expected = explicit_with_support(SQUARED_EUCLID, query, labels, support, support_labels)
    assert_close(got, torch.stack(expected).mean())


def test_a_support_equal_to_the_queries_but_another_tensor_is_searched_whole() -> None:
    """Only where no support is given are items left out of their own support."""
    batch = normal(8, DIMS, seed=3)
    got = MatchingLoss()(batch, BATCH_LABELS, None, batch.clone(), BATCH_LABELS.clone())
    expected = explicit_with_support(CosineSimilarity(), batch, BATCH_LABELS, batch, BATCH_LABELS)
    assert len(expected) == 8
    assert_close(got, torch.stack(expected).mean())


def test_one_query_alone_has_a_loss() -> None:
    """NCALoss has none for a single query."""
    query, support = normal(1, DIMS, seed=1), normal(7, DIMS, seed=2)
    got = MatchingLoss()(query, torch.tensor([7]), None, support, SUPPORT_LABELS)
    (expected,) = explicit_with_support(CosineSimilarity(), query, torch.tensor([7]), support, SUPPORT_LABELS)
    assert_close(got, expected)


# --- every distance with every reducer and every regularizer ----------------------------------------------------------


def test_every_distance_of_pml_is_covered() -> None:
    assert exported(pml_distances, BaseDistance) == DISTANCES.keys() | NO_DISTANCE_OF_A_LOSS.keys()


def test_every_reducer_of_pml_is_covered() -> None:
    assert exported(pml_reducers, BaseReducer) == REDUCERS.keys() | NO_REDUCER_OF_THIS_LOSS.keys()


def test_every_regularizer_of_pml_is_covered() -> None:
    assert exported(pml_regularizers, BaseRegularizer) == REGULARIZERS.keys() | {BaseRegularizer}


def test_batched_distance_cannot_be_the_distance_of_any_loss() -> None:
    batched = BatchedDistance(SQUARED_EUCLID, iter_fn=lambda matrix, start, end: None)
    with pytest.raises(TypeError, match="NoneType"):
        MatchingLoss(batched)(normal(4, DIMS), torch.tensor([0, 1, 0, 1]), None, normal(2, DIMS), torch.tensor([0, 1]))


def test_divisor_reducer_cannot_reduce_losses_without_a_divisor() -> None:
    with pytest.raises(KeyError, match="divisor"):
        MatchingLoss(reducer=DivisorReducer())(normal(8, DIMS), BATCH_LABELS)


def reduce_by_hand(factory: partial, losses: list[Tensor], labels: list[int]) -> Tensor:
    """What each reducer of PML's manual does to a loss per item."""
    kind = factory.keywords["reducer"].func if "reducer" in factory.keywords else factory.func
    if kind in (SumReducer, MultipleReducers):  # the latter is made with a sum
        return sum(losses)
    if kind is ThresholdReducer:
        low, high = factory.keywords.get("low", -math.inf), factory.keywords.get("high", math.inf)
        kept = [x for x in losses if low < x < high]
        assert 0 < len(kept) < len(losses), "a threshold that leaves nothing or everything tests nothing"
        losses = kept
    if kind is ClassWeightedReducer:
        losses = [x * factory.keywords["weights"][label] for x, label in zip(losses, labels, strict=True)]
    return sum(losses) / len(losses)


GRID_LABELS = torch.tensor([0, 7, 3, 7, 11, 0, 3, 3])  # class weights ask for small labels, a regularizer for 8 items
GRID_SUPPORT_LABELS = torch.tensor([7, 0, 7, 11, 7, 3, 0])


def grid_arguments(with_support: bool) -> tuple:
    """Near enough for losses on both sides of the thresholds."""
    batch = 0.5 * normal(8, DIMS, seed=5)
    return (
        (batch, GRID_LABELS, None, 0.5 * normal(7, DIMS, seed=2), GRID_SUPPORT_LABELS)
        if with_support
        else (
            batch,
            BATCH_LABELS,
        )
    )


@cache
def grid_losses(number: int, with_support: bool) -> list[Tensor]:
    distance, arguments = ALL_DISTANCES[number](), grid_arguments(with_support)
    if with_support:
        batch, labels, _, support, support_labels = arguments
        return explicit_with_support(distance, batch, labels, support, support_labels)
    return explicit_leave_one_out(distance, *arguments)


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
@pytest.mark.parametrize("reducer", ALL_REDUCERS, ids=name)
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_every_distance_with_every_reducer_and_regularizer(
    distance: partial, reducer: partial, with_support: bool
) -> None:
    """Every pair of the three kinds occurs: the regularizer moves on with the distance and with the reducer."""
    arguments = grid_arguments(with_support)
    number = ALL_DISTANCES.index(distance)
    losses = grid_losses(number, with_support)
    regularizers = list(REGULARIZERS.values())
    labels = arguments[1]
    kept = [i for i in range(8) if with_support or (labels == labels[i]).sum() > 1]
    for regularizer in (None, regularizers[(number + ALL_REDUCERS.index(reducer)) % len(regularizers)]):
        loss = MatchingLoss(distance, reducer=reducer, embedding_regularizer=regularizer, embedding_reg_weight=0.7)
        got = loss(*arguments)
        added = 0.7 * regularizer()(arguments[0]) if regularizer is not None else 0.0
        if reducer.func is DoNothingReducer:
            assert got["loss"]["reduction_type"] == "element"
            assert got["loss"]["indices"].tolist() == kept
            assert_close(got["loss"]["losses"], torch.stack(losses))
            assert got.keys() == {"loss", "embedding_reg_loss"} if regularizer else {"loss"}
            if regularizer is not None:
                assert_close(got["embedding_reg_loss"]["losses"], added)
            continue
        expected = reduce_by_hand(reducer, losses, labels[kept].tolist()) + added
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)  # class weights are float32


def test_parts_may_be_objects_classes_or_partials() -> None:
    leaves, labels = items(True, torch.float64)
    values = [
        call(MatchingLoss(distance, reducer=reducer, embedding_regularizer=regularizer), leaves, labels)
        for distance, reducer, regularizer in (
            (LpDistance(), SumReducer(), LpRegularizer()),
            (LpDistance, SumReducer, LpRegularizer),
            (partial(LpDistance, p=2), partial(SumReducer), partial(LpRegularizer)),
        )
    ]
    assert values[0] == values[1] == values[2]
    assert values[0] != call(MatchingLoss(LpDistance()), leaves, labels)


# --- gradients and the scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_gradient_with_support(distance: partial) -> None:
    loss = MatchingLoss(distance, scale=1.7)
    query, support = normal(5, DIMS, seed=1).requires_grad_(), normal(7, DIMS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, s: loss(q, QUERY_LABELS, None, s, SUPPORT_LABELS), (query, support), fast_mode=True
    )


@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_gradient_without_support(distance: partial) -> None:
    loss = MatchingLoss(distance, scale=1.7)
    assert torch.autograd.gradcheck(
        lambda b: loss(b, BATCH_LABELS), normal(8, DIMS, seed=3).requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_learned_scale_has_the_right_gradient(with_support: bool) -> None:
    loss = MatchingLoss(scale=10, learn_scale=True).double()
    leaves, labels = items(with_support, torch.float64)
    assert loss.scale.item() == pytest.approx(10, rel=1e-6)
    call(loss, leaves, labels).backward()
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.abs() > 1e-3
    step = 1e-6
    values = []
    for sign in (1, -1):
        scale = math.exp(loss.log_scale.item() + sign * step)
        values.append(call(NCALoss(softmax_scale=scale, distance=CosineSimilarity()), leaves, labels).item())
    assert loss.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_the_learned_similarity_gets_its_gradient_too() -> None:
    similarity = WeightedL1Similarity(DIMS).double()
    leaves, labels = items(True, torch.float64)
    weights = dict(similarity.named_parameters())

    def of(*parameters: Tensor) -> Tensor:
        loss = MatchingLoss(similarity)
        named = {f"distance.{key}": value for key, value in zip(weights, parameters, strict=True)}
        arguments = (leaves[0], labels, None, leaves[1], SUPPORT_LABELS)
        return torch.func.functional_call(loss, named, arguments)

    assert torch.autograd.gradcheck(of, [w.detach().clone().requires_grad_() for w in weights.values()])


def test_scale_is_fixed_unless_asked_for() -> None:
    assert [p for p in MatchingLoss(scale=3).parameters() if p.requires_grad] == []
    assert [n for n, p in MatchingLoss(scale=3, learn_scale=True).named_parameters() if p.requires_grad] == [
        "log_scale"
    ]


def test_scaling_dot_products_is_scaling_the_embeddings() -> None:
    leaves, labels = items(True, torch.float64)
    dot = DotProductSimilarity(normalize_embeddings=False)
    got = call(MatchingLoss(dot, scale=4), leaves, labels)
    expected = call(MatchingLoss(dot), [2 * leaf for leaf in leaves], labels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_training_the_scale_lowers_the_loss_and_keeps_it_above_zero() -> None:
    query, support = torch.eye(4).double(), torch.eye(4).double()  # perfectly told apart: the sharper the better
    loss = MatchingLoss(scale=1, learn_scale=True).double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value_now = loss(query, torch.arange(4), None, support, torch.arange(4))
        value_now.backward()
        optimizer.step()
        values.append(value_now.item())
    assert values == sorted(values, reverse=True)
    assert loss.scale > 3
    labels = torch.tensor([1, 2, 3, 0])  # and here every answer is wrong: the flatter the better
    for _ in range(200):
        optimizer.zero_grad()
        loss(query, labels, None, support, torch.arange(4)).backward()
        optimizer.step()
    assert 0 < loss.scale < 0.2


def test_the_learned_scale_is_part_of_the_state() -> None:
    loss = MatchingLoss(scale=6, learn_scale=True)
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    other = MatchingLoss(learn_scale=True)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.scale, loss.scale)
    leaves, labels = items(True, torch.float64)
    for twin in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert call(twin, leaves, labels) == call(loss, leaves, labels)


# --- miners -----------------------------------------------------------------------------------------------------------


def test_mined_anchors_weigh_the_queries() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    losses = explicit_with_support(CosineSimilarity(), query, QUERY_LABELS, support, SUPPORT_LABELS)
    # query 1 is an anchor four times, 3 twice, 0 once, 2 and 4 never; the other places index the support
    triplets = tuple(torch.tensor(x) for x in ([1, 1, 3, 0, 1, 3, 1], [0, 2, 4, 1, 0, 2, 4], [1, 3, 5, 6, 1, 3, 5]))
    got = MatchingLoss()(query, QUERY_LABELS, triplets, support, SUPPORT_LABELS)
    assert_close(got, (0.25 * losses[0] + losses[1] + 0.5 * losses[3]) / 5)


def test_mined_pairs_with_support_weigh_the_queries_of_both_kinds() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    losses = explicit_with_support(CosineSimilarity(), query, QUERY_LABELS, support, SUPPORT_LABELS)
    pairs = tuple(torch.tensor(x) for x in ([0, 1], [1, 2], [0, 4], [3, 3]))  # anchors 0 twice, 1 and 4 once
    got = MatchingLoss()(query, QUERY_LABELS, pairs, support, SUPPORT_LABELS)
    assert_close(got, (losses[0] + 0.5 * losses[1] + 0.5 * losses[4]) / 5)


def test_mined_pairs_of_a_batch_weigh_its_items() -> None:
    batch = normal(6, DIMS, seed=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    losses = explicit_leave_one_out(CosineSimilarity(), batch, labels)
    pairs = tuple(torch.tensor(x) for x in ([0, 1], [1, 2], [0], [3]))  # item 0 and 1 stand there twice, 2 and 3 once
    expected = (losses[0] + losses[1] + 0.5 * losses[2] + 0.5 * losses[3]) / 6
    assert_close(MatchingLoss()(batch, labels, pairs), expected)


def test_the_weights_stay_with_their_items_where_a_lone_one_is_left_out() -> None:
    batch = normal(8, DIMS, seed=3)
    losses = explicit_leave_one_out(CosineSimilarity(), batch, BATCH_LABELS)  # of items 0, 1, 3, 4, 5, 6, 7
    triplets = tuple(torch.tensor(x) for x in ([3, 3], [5, 5], [2, 2]))  # 2 is the lone one
    assert_close(MatchingLoss()(batch, BATCH_LABELS, triplets), (losses[2] + losses[4]) / 7)


MINERS = [
    TripletMarginMiner(margin=0.5),
    MultiSimilarityMiner(),
    BatchHardMiner(),
    BatchEasyHardMiner(),
    PairMarginMiner(pos_margin=0.9, neg_margin=0.9),
]


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
@pytest.mark.parametrize("miner", MINERS, ids=lambda m: type(m).__name__)
def test_miners_of_pml_choose_queries_as_for_nca(miner: nn.Module, with_support: bool) -> None:
    leaves, labels = items(with_support, torch.float64)
    support = (leaves[1], SUPPORT_LABELS) if with_support else ()
    mined = miner(leaves[0], labels, *support)
    anchors = mined if not with_support else [mined[0]] if len(mined) == 3 else [mined[0], mined[2]]
    counts = torch.bincount(torch.cat(list(anchors)), minlength=len(labels)).double()
    assert counts.max() > 0
    if with_support:
        losses = explicit_with_support(CosineSimilarity(), *leaves[:1], labels, leaves[1], SUPPORT_LABELS)
    else:
        losses = explicit_leave_one_out(CosineSimilarity(), leaves[0], labels)
    kept = [i for i in range(len(labels)) if with_support or (labels == labels[i]).sum() > 1]
    got = call(MatchingLoss(), leaves, labels, mined)
    assert_close(got, (torch.stack(losses) * counts[kept] / counts.max()).mean())
    assert_close(got, call(NCALoss(distance=CosineSimilarity()), leaves, labels, mined))


def test_a_miner_that_found_nothing_weighs_nothing() -> None:
    empty = tuple(torch.zeros(0, dtype=torch.long) for _ in range(3))
    leaves, labels = items(True, torch.float64)
    assert call(MatchingLoss(), leaves, labels, empty) == call(MatchingLoss(), leaves, labels)


# --- properties -------------------------------------------------------------------------------------------------------


def test_the_shares_of_all_classes_sum_to_one() -> None:
    query, support = normal(1, DIMS, seed=1), normal(7, DIMS, seed=2)
    for distance in ALL_DISTANCES:
        loss = MatchingLoss(distance, scale=2)
        shares = [
            loss(query, torch.tensor([label]), None, support, SUPPORT_LABELS).neg().exp().item()
            for label in (7, 0, 9_000_000_000, -3)
        ]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) == pytest.approx(1, rel=1e-10)


def test_relabelling_and_reordering_change_nothing() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    loss = MatchingLoss()
    expected = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    new_name = {7: 100, 0: -5, 9_000_000_000: 3, -3: 2**62}
    renamed = [torch.tensor([new_name[int(c)] for c in labels]) for labels in (QUERY_LABELS, SUPPORT_LABELS)]
    assert_close(loss(query, renamed[0], None, support, renamed[1]), expected)
    generator = torch.Generator().manual_seed(5)
    q, s = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    assert_close(loss(query[q], QUERY_LABELS[q], None, support[s], SUPPORT_LABELS[s]), expected)
    batch, order = normal(8, DIMS, seed=3), torch.randperm(8, generator=generator)
    assert_close(loss(batch[order], BATCH_LABELS[order]), loss(batch, BATCH_LABELS))


def test_rotating_and_shifting_the_space_changes_nothing_for_euclid() -> None:
    query, support, batch = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2), normal(8, DIMS, seed=3)
    rotation, _ = torch.linalg.qr(normal(DIMS, DIMS, seed=6))
    shift = normal(1, DIMS, seed=7)
    loss = MatchingLoss(SQUARED_EUCLID)
    assert_close(
        loss(query @ rotation + shift, QUERY_LABELS, None, support @ rotation + shift, SUPPORT_LABELS),
        loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS),
    )
    assert_close(loss(batch @ rotation + shift, BATCH_LABELS), loss(batch, BATCH_LABELS))


def test_the_length_of_embeddings_changes_nothing_for_cosine() -> None:
    leaves, labels = items(True, torch.float64)
    lengths = [0.1 + normal(len(leaf), 1, seed=8).abs() for leaf in leaves]
    scaled = [leaf * length for leaf, length in zip(leaves, lengths, strict=True)]
    assert_close(call(MatchingLoss(), scaled, labels), call(MatchingLoss(), leaves, labels))


def test_repeating_the_whole_support_changes_nothing_but_repeating_a_class_favours_it() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    loss = MatchingLoss()
    expected = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    assert_close(loss(query, QUERY_LABELS, None, support.repeat(3, 1), SUPPORT_LABELS.repeat(3)), expected)
    sevens = SUPPORT_LABELS == 7
    more = torch.cat([support, support[sevens]]), torch.cat([SUPPORT_LABELS, SUPPORT_LABELS[sevens]])
    of_seven = query[1:2], QUERY_LABELS[1:2]
    assert loss(*of_seven, None, *more) < loss(*of_seven, None, support, SUPPORT_LABELS) - 1e-3


def test_labels_may_be_a_view_that_is_not_contiguous() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    every_other = torch.stack([QUERY_LABELS, QUERY_LABELS], dim=1)[:, 0]
    assert not every_other.is_contiguous()
    loss = MatchingLoss()
    expected = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    assert loss(query, every_other, None, support, SUPPORT_LABELS) == expected


def test_inputs_stay_as_they_are() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    labels, support_labels = QUERY_LABELS.clone(), SUPPORT_LABELS.clone()
    MatchingLoss()(query, labels, None, support, support_labels)
    MatchingLoss(SQUARED_EUCLID)(query, labels)
    assert torch.equal(query, normal(5, DIMS, seed=1))
    assert torch.equal(support, normal(7, DIMS, seed=2))
    assert torch.equal(labels, QUERY_LABELS)
    assert torch.equal(support_labels, SUPPORT_LABELS)


# --- EpisodicLoss, what a subclass is given and gives -----------------------------------------------------------------


class Recorded(EpisodicLoss):
    """Answers with logits that were made beforehand, and keeps what it was asked."""

    def __init__(self, logits: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.logits = logits

    def class_scores(self, queries: Tensor, support: Tensor, member: Tensor, own_class: Tensor | None) -> Tensor:
        self.asked = (queries, support, member, own_class)
        return self.logits


def test_a_subclass_is_asked_for_logits_of_its_support_in_the_order_of_the_labels() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    loss = Recorded(normal(5, 4, seed=3))
    got = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    queries, items_given, member, own_class = loss.asked
    assert queries is query
    assert items_given is support
    assert own_class is None
    classes = [-3, 0, 7, 9_000_000_000]
    assert member.tolist() == [[float(of == c) for c in classes] for of in SUPPORT_LABELS.tolist()]
    assert member.dtype == support.dtype
    target = torch.tensor([classes.index(c) for c in QUERY_LABELS.tolist()])
    assert_close(got, F.cross_entropy(loss.logits, target))


def test_a_subclass_is_told_the_classes_of_a_batch_and_lone_items_have_no_loss() -> None:
    batch = normal(8, DIMS, seed=1)
    loss = Recorded(normal(8, 3, seed=3))
    got = loss(batch, BATCH_LABELS)
    queries, items_given, member, own_class = loss.asked
    assert queries is batch
    assert items_given is batch
    classes = [4, 8, 11]
    assert own_class.tolist() == [classes.index(c) for c in BATCH_LABELS.tolist()]
    assert member.argmax(dim=1).tolist() == own_class.tolist()
    assert member.sum(dim=1).tolist() == [1] * 8
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert_close(got, F.cross_entropy(loss.logits[kept], own_class[kept]))


def test_similarity_is_larger_for_nearer_whatever_the_distance() -> None:
    x, y = normal(3, DIMS, seed=1), normal(4, DIMS, seed=2)
    for distance in ALL_DISTANCES:
        got = MatchingLoss(distance).similarity(x, y)
        expected = torch.stack([torch.stack([value(distance(), q, r) for r in y]) for q in x])
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_statistics_are_kept_where_asked_for() -> None:
    leaves, labels = items(True, torch.float64)
    loss = MatchingLoss(collect_stats=True, distance=LpDistance(collect_stats=True))
    call(loss, leaves, labels)
    assert loss.collect_stats is True
    mean_length = leaves[0].norm(dim=1).mean().item()
    assert loss.distance.initial_avg_query_norm == pytest.approx(mean_length)
    assert MatchingLoss(collect_stats=False).collect_stats is False


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [5, -7, 10_000_000_000])  # between, below and above the classes that are there
def test_query_without_support_raises_and_names_the_class(missing: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a support item .* none for classes \[{missing}\].*draw"):
        MatchingLoss()(normal(2, 3), torch.tensor([7, missing]), None, normal(7, 3), SUPPORT_LABELS)


def test_an_empty_support_has_no_item_of_any_class() -> None:
    with pytest.raises(ValueError, match=r"expected at least one support item, got none"):
        MatchingLoss()(normal(1, 3), torch.tensor([7]), None, torch.zeros(0, 3).double(), torch.zeros(0).long())


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_scale_must_be_above_zero(scale: float) -> None:
    with pytest.raises(ValueError, match="expected scale above 0"):
        MatchingLoss(scale=scale)


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="reducr"):
        MatchingLoss(reducr=MeanReducer())


def test_missing_labels_raise() -> None:
    with pytest.raises(ValueError, match="labels"):
        MatchingLoss()(normal(4, 3))


def test_support_without_labels_or_with_labels_of_another_type_raises() -> None:
    query, labels, support = normal(2, 3), torch.tensor([0, 1]), normal(2, 3, seed=1)
    with pytest.raises(TypeError, match="support labels as an int64 tensor, got a NoneType"):
        MatchingLoss()(query, labels, None, support)
    with pytest.raises(TypeError, match=r"support labels as an int64 tensor, got a tensor of torch\.float32"):
        MatchingLoss()(query, labels, None, support, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="must equal number of labels"):
        MatchingLoss()(query, labels, None, support, torch.tensor([0, 1, 1]))


# --- as a part of PML's own machinery ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # PML's progress bar does
def test_trains_in_the_trainer_of_pml() -> None:
    torch.manual_seed(0)
    images, labels = normal(16, 6, dtype=torch.float32), torch.arange(4).repeat(4)
    trunk, loss = nn.Linear(6, 3), MatchingLoss(scale=5, learn_scale=True)
    before = trunk.weight.detach().clone()
    trainer = MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD([*trunk.parameters(), *loss.parameters()], lr=0.1)},
        batch_size=16,
        loss_funcs={"metric_loss": loss},
        dataset=TensorDataset(images, labels),
        mining_funcs={},
        iterations_per_epoch=1,
        data_device="cpu",
        dataloader_num_workers=0,
    )
    losses: list[float] = []
    trainer.end_of_iteration_hook = lambda t: losses.append(t.losses["metric_loss"].item())
    trainer.train(num_epochs=2)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert not torch.equal(trunk.weight, before)
    assert loss.scale.item() != pytest.approx(5, rel=1e-4)


def test_counts_among_multiple_losses() -> None:
    leaves, labels = items(False, torch.float64)
    parts = MultipleLosses([MatchingLoss(scale=3), PrototypicalLoss()], weights=[1, 0.5])
    expected = call(MatchingLoss(scale=3), leaves, labels) + 0.5 * call(PrototypicalLoss(), leaves, labels)
    assert_close(parts(leaves[0], labels), expected)
