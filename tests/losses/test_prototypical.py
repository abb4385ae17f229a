"""PrototypicalLoss against loops written from Snell et al. 2017, and against every part of PML it can be used with."""

import inspect
import math
from functools import partial

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from pytorch_metric_learning.distances import (
    BaseDistance,
    BatchedDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import NCALoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
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
from torch import Tensor, nn
from torch.utils.data import TensorDataset

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
NO_DISTANCE_OF_A_LOSS = {
    BaseDistance: "abstract",
    BatchedDistance: "hands each slab of the matrix to a callback and returns None, so no loss of PML can use it",
}
REDUCERS: dict[type, list[partial]] = {
    MeanReducer: [partial(MeanReducer)],
    SumReducer: [partial(SumReducer)],
    AvgNonZeroReducer: [partial(AvgNonZeroReducer)],
    ThresholdReducer: [partial(ThresholdReducer, high=1.5), partial(ThresholdReducer, low=0.5)],
    PerAnchorReducer: [partial(PerAnchorReducer), partial(PerAnchorReducer, reducer=partial(SumReducer))],
    ClassWeightedReducer: [partial(ClassWeightedReducer, weights=torch.linspace(0.1, 2, 12))],
    DoNothingReducer: [partial(DoNothingReducer)],
    MultipleReducers: [partial(MultipleReducers, {"loss": SumReducer()})],
}
NO_REDUCER_OF_THIS_LOSS = {
    BaseReducer: "abstract",
    DivisorReducer: "asks the loss for a divisor, which only losses that count their own terms give (ProxyAnchorLoss)",
}


def assert_close(got: Tensor, expected: Tensor) -> None:
    rtol = 1e-4 if got.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 100)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value(distance: BaseDistance, query: Tensor, prototype: Tensor) -> Tensor:
    """The similarity of one query to one prototype, written from the distances' definitions."""
    x, y = query.double(), prototype.double()
    if distance.normalize_embeddings:
        x = x / (x.abs() ** distance.p).sum() ** (1 / distance.p)
        y = y / (y.abs() ** distance.p).sum() ** (1 / distance.p)
    if isinstance(distance, LpDistance):
        d = ((x - y).abs() ** distance.p).sum() ** (1 / distance.p)
    elif isinstance(distance, SNRDistance):
        d = (x - y).var() / x.var()
    else:
        d = (x * y).sum()
    return d**distance.power if distance.is_inverted else -(d**distance.power)


def cross_entropy_of(scores: dict[int, Tensor], label: int) -> Tensor:
    """Eq. 2: minus the logarithm of the softmax at the query's own class."""
    return -(scores[label].exp() / torch.stack([s.exp() for s in scores.values()]).sum()).log()


def explicit_with_support(
    distance: BaseDistance, query: Tensor, query_labels: Tensor, support: Tensor, support_labels: Tensor, scale: float
) -> list[Tensor]:
    """Loss of each query: algorithm 1 of Snell et al. 2017, class by class."""
    prototypes: dict[int, Tensor] = {}
    for label in set(support_labels.tolist()):
        members = [support[i].double() for i in range(len(support)) if support_labels[i] == label]
        prototypes[label] = sum(members) / len(members)
    return [
        cross_entropy_of({c: scale * value(distance, query[i], p) for c, p in prototypes.items()}, int(query_labels[i]))
        for i in range(len(query))
    ]


def explicit_leave_one_out(distance: BaseDistance, batch: Tensor, labels: Tensor, scale: float) -> list[Tensor]:
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


SQUARED_EUCLID = LpDistance(normalize_embeddings=False, power=2)
ALL_DISTANCES = [partial(kind, **options) for kind, forms in DISTANCES.items() for options in forms]
ALL_REDUCERS = [factory for forms in REDUCERS.values() for factory in forms]


def name(factory: partial) -> str:
    options = ",".join(f"{k}={v}" for k, v in factory.keywords.items() if k != "weights")
    return f"{factory.func.__name__}({options})"


def exported(module: object, base: type) -> set[type]:
    return {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)} | {base}


# --- the lists above are complete -------------------------------------------------------------------------------------


def test_every_distance_of_pml_is_covered() -> None:
    assert exported(pml_distances, BaseDistance) == DISTANCES.keys() | NO_DISTANCE_OF_A_LOSS.keys()


def test_every_reducer_of_pml_is_covered() -> None:
    assert exported(pml_reducers, BaseReducer) == REDUCERS.keys() | NO_REDUCER_OF_THIS_LOSS.keys()


def test_batched_distance_cannot_be_the_distance_of_any_loss() -> None:
    batched = BatchedDistance(SQUARED_EUCLID, iter_fn=lambda matrix, start, end: None)
    assert batched(normal(4, DIMS), normal(2, DIMS)) is None
    for loss in (PrototypicalLoss(batched), NCALoss(distance=batched)):
        with pytest.raises(TypeError, match="NoneType"):
            loss(normal(4, DIMS), torch.tensor([0, 1, 0, 1]), None, normal(2, DIMS), torch.tensor([0, 1]))


def test_divisor_reducer_cannot_reduce_losses_without_a_divisor() -> None:
    with pytest.raises(KeyError, match="divisor"):
        PrototypicalLoss(reducer=DivisorReducer())(normal(8, DIMS), BATCH_LABELS)


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_with_support_it_is_the_formula_of_the_paper(distance: partial, scale: float, dtype: torch.dtype) -> None:
    query, support = normal(5, DIMS, seed=1, dtype=dtype), normal(7, DIMS, seed=2, dtype=dtype)
    got = PrototypicalLoss(distance, scale=scale)(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    expected = explicit_with_support(distance(), query, QUERY_LABELS, support, SUPPORT_LABELS, scale)
    assert got.dtype == dtype
    # the scale is kept as the logarithm of a float32, good to 1e-7
    torch.testing.assert_close(
        got.double(), torch.stack(expected).mean(), rtol=1e-4 if dtype == torch.float32 else 2e-7, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_on_a_batch_each_item_is_left_out_of_its_prototype(distance: partial, dtype: torch.dtype) -> None:
    batch = normal(8, DIMS, seed=3, dtype=dtype)
    got = PrototypicalLoss(distance)(batch, BATCH_LABELS)
    expected = explicit_leave_one_out(distance(), batch, BATCH_LABELS, 1.0)
    assert len(expected) == 7  # class 8 has one item: it is compared with, but has nothing to be compared to
    assert_close(got.double() if dtype == torch.float64 else got, torch.stack(expected).mean().to(dtype))


def test_default_is_squared_euclid_without_normalisation() -> None:
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


def test_a_batch_without_two_items_of_a_class_has_zero_loss_and_gradient() -> None:
    batch = normal(4, DIMS).requires_grad_()
    loss = PrototypicalLoss()(batch, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert batch.grad is not None
    assert not batch.grad.any()


def test_class_that_only_the_support_holds_counts_as_a_wrong_answer() -> None:
    query, support = normal(3, DIMS, seed=1), normal(4, DIMS, seed=2)
    labels, support_labels = torch.tensor([2, 5, 2]), torch.tensor([2, 5, 9, 9])
    got = PrototypicalLoss()(query, labels, None, support, support_labels)
    expected = explicit_with_support(SQUARED_EUCLID, query, labels, support, support_labels, 1.0)
    assert_close(got, torch.stack(expected).mean())


@pytest.mark.parametrize("distance", [SQUARED_EUCLID, CosineSimilarity()], ids=["euclid", "cosine"])
def test_at_one_shot_it_equals_nca_of_pml(distance: BaseDistance) -> None:
    query, support = normal(12, DIMS, seed=1), normal(4, DIMS, seed=2)
    labels, support_labels = torch.arange(4).repeat_interleave(3), torch.arange(4)
    ours = PrototypicalLoss(distance)(query, labels, None, support, support_labels)
    assert_close(ours, NCALoss(distance=distance)(query, labels, None, support, support_labels))


# --- reducers and regularizers ----------------------------------------------------------------------------------------


def reduce_by_hand(reducer: BaseReducer, losses: list[Tensor], labels: list[int]) -> Tensor:
    """What each reducer of PML's manual does to a loss per item."""
    if isinstance(reducer, MultipleReducers):
        reducer = reducer.reducers["loss"]
    if isinstance(reducer, PerAnchorReducer):
        reducer = reducer.reducer
    if isinstance(reducer, SumReducer):
        return sum(losses)
    if isinstance(reducer, ThresholdReducer):
        low, high = reducer.low, reducer.high
        losses = [x for x in losses if (low is None or x > low) and (high is None or x < high)]
        assert losses, "a threshold that leaves nothing tests nothing"
    if isinstance(reducer, ClassWeightedReducer):
        losses = [x * reducer.weights[label] for x, label in zip(losses, labels, strict=True)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
@pytest.mark.parametrize("reducer", ALL_REDUCERS, ids=name)
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_every_distance_with_every_reducer(distance: partial, reducer: partial, with_support: bool) -> None:
    labels = torch.tensor([0, 7, 3, 7, 11]) if with_support else BATCH_LABELS  # class weights ask for small labels
    embeddings = 0.3 * normal(len(labels), DIMS, seed=1)  # near enough for losses on both sides of the thresholds
    if with_support:
        support, support_labels = 0.3 * normal(7, DIMS, seed=2), torch.tensor([7, 0, 7, 11, 7, 3, 0])
        got = PrototypicalLoss(distance, reducer=reducer)(embeddings, labels, None, support, support_labels)
        losses = explicit_with_support(distance(), embeddings, labels, support, support_labels, 1.0)
        kept = list(range(len(labels)))
    else:
        got = PrototypicalLoss(distance, reducer=reducer)(embeddings, labels)
        losses = explicit_leave_one_out(distance(), embeddings, labels, 1.0)
        kept = [i for i, label in enumerate(labels) if (labels == label).sum() > 1]
    if reducer.func is DoNothingReducer:
        assert got.keys() == {"loss"}
        assert got["loss"]["reduction_type"] == "element"
        assert got["loss"]["indices"].tolist() == kept
        assert_close(got["loss"]["losses"], torch.stack(losses))
        return
    built = reducer.func(
        *reducer.args, **{k: v() if isinstance(v, partial) else v for k, v in reducer.keywords.items()}
    )
    expected = reduce_by_hand(built, losses, labels[kept].tolist())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)  # class weights are float32


REGULARIZERS: dict[type, partial] = {
    LpRegularizer: partial(LpRegularizer, p=1, power=2),
    ZeroMeanRegularizer: partial(ZeroMeanRegularizer),
    CenterInvariantRegularizer: partial(CenterInvariantRegularizer),
    RegularFaceRegularizer: partial(RegularFaceRegularizer),
    SparseCentersRegularizer: partial(SparseCentersRegularizer, num_classes=4, centers_per_class=2),  # of 8 items
}


def test_every_regularizer_of_pml_is_covered() -> None:
    assert exported(pml_regularizers, BaseRegularizer) == REGULARIZERS.keys() | {BaseRegularizer}


@pytest.mark.parametrize(
    "reducer", [MeanReducer(), SumReducer(), ThresholdReducer(low=0.1)], ids=["mean", "sum", "low"]
)
@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=name)
@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_every_regularizer_adds_its_value(regularizer: partial, reducer: BaseReducer, with_support: bool) -> None:
    batch = normal(8, DIMS, seed=3)
    labels = torch.arange(4).repeat(2)
    episode = (None, normal(4, DIMS, seed=4), torch.arange(4)) if with_support else ()
    loss = PrototypicalLoss(reducer=reducer, embedding_regularizer=regularizer, embedding_reg_weight=0.7)
    plain = PrototypicalLoss(reducer=reducer)
    assert_close(loss(batch, labels, *episode), plain(batch, labels, *episode) + 0.7 * regularizer()(batch))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_gradient_with_support(distance: partial) -> None:
    loss = PrototypicalLoss(distance)
    query, support = normal(5, DIMS, seed=1).requires_grad_(), normal(7, DIMS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, s: loss(q, QUERY_LABELS, None, s, SUPPORT_LABELS), (query, support))


@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_gradient_without_support(distance: partial) -> None:
    loss = PrototypicalLoss(distance)
    assert torch.autograd.gradcheck(lambda b: loss(b, BATCH_LABELS), normal(8, DIMS, seed=3).requires_grad_())


@pytest.mark.parametrize("with_support", [True, False], ids=["support", "batch"])
def test_learned_scale_has_the_right_gradient(with_support: bool) -> None:
    loss = PrototypicalLoss(CosineSimilarity(), scale=10, learn_scale=True).double()
    arguments = (None, normal(7, DIMS, seed=2), SUPPORT_LABELS) if with_support else ()
    labels = QUERY_LABELS if with_support else BATCH_LABELS
    batch = normal(len(labels), DIMS, seed=1)
    assert loss.log_scale.exp().item() == pytest.approx(10)
    loss(batch, labels, *arguments).backward()
    assert loss.log_scale.grad is not None
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = PrototypicalLoss(CosineSimilarity()).double()
        moved.log_scale.data = loss.log_scale.detach() + sign * step
        values.append(moved(batch, labels, *arguments).item())
    assert loss.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_scale_is_fixed_unless_asked_for() -> None:
    assert [p for p in PrototypicalLoss(scale=3).parameters() if p.requires_grad] == []


# --- miners -----------------------------------------------------------------------------------------------------------


def test_mined_anchors_weigh_the_queries() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    losses = explicit_with_support(SQUARED_EUCLID, query, QUERY_LABELS, support, SUPPORT_LABELS, 1.0)
    # query 1 is an anchor four times, 3 twice, 0 once, 2 and 4 never; the other places index the support
    triplets = tuple(torch.tensor(x) for x in ([1, 1, 3, 0, 1, 3, 1], [0, 2, 4, 1, 0, 2, 4], [1, 3, 5, 6, 1, 3, 5]))
    got = PrototypicalLoss()(query, QUERY_LABELS, triplets, support, SUPPORT_LABELS)
    assert_close(got, (0.25 * losses[0] + losses[1] + 0.5 * losses[3]) / 5)


def test_mined_pairs_of_a_batch_weigh_its_items() -> None:
    batch = normal(6, DIMS, seed=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    losses = explicit_leave_one_out(SQUARED_EUCLID, batch, labels, 1.0)
    pairs = tuple(torch.tensor(x) for x in ([0, 1], [1, 2], [0], [3]))  # item 0 and 1 stand there twice, 2 and 3 once
    expected = (losses[0] + losses[1] + 0.5 * losses[2] + 0.5 * losses[3]) / 6
    assert_close(PrototypicalLoss()(batch, labels, pairs), expected)


@pytest.mark.parametrize("miner", [TripletMarginMiner(margin=0.5), MultiSimilarityMiner()], ids=["triplet", "ms"])
def test_miners_of_pml_choose_queries(miner: nn.Module) -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    mined = miner(query, QUERY_LABELS, support, SUPPORT_LABELS)
    anchors = torch.cat([mined[0]] if len(mined) == 3 else [mined[0], mined[2]])
    counts = torch.bincount(anchors, minlength=5).double()
    losses = explicit_with_support(SQUARED_EUCLID, query, QUERY_LABELS, support, SUPPORT_LABELS, 1.0)
    got = PrototypicalLoss()(query, QUERY_LABELS, mined, support, SUPPORT_LABELS)
    assert_close(got, (torch.stack(losses) * counts / counts.max()).mean())


# --- properties -------------------------------------------------------------------------------------------------------


def test_relabelling_and_reordering_change_nothing() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    loss = PrototypicalLoss()
    expected = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    new_name = {7: 100, 0: -5, 9_000_000_000: 3, -3: 2**62}
    renamed = [torch.tensor([new_name[int(c)] for c in labels]) for labels in (QUERY_LABELS, SUPPORT_LABELS)]
    assert_close(loss(query, renamed[0], None, support, renamed[1]), expected)
    generator = torch.Generator().manual_seed(5)
    q, s = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    assert_close(loss(query[q], QUERY_LABELS[q], None, support[s], SUPPORT_LABELS[s]), expected)


def test_rotating_and_shifting_the_space_changes_nothing_for_euclid() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    rotation, _ = torch.linalg.qr(normal(DIMS, DIMS, seed=6))
    shift = normal(1, DIMS, seed=7)
    loss = PrototypicalLoss()
    assert_close(
        loss(query @ rotation + shift, QUERY_LABELS, None, support @ rotation + shift, SUPPORT_LABELS),
        loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS),
    )
    batch = normal(8, DIMS, seed=3)
    assert_close(loss(batch @ rotation + shift, BATCH_LABELS), loss(batch, BATCH_LABELS))


def test_repeating_the_support_changes_nothing() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    loss = PrototypicalLoss()
    assert_close(
        loss(query, QUERY_LABELS, None, support.repeat(3, 1), SUPPORT_LABELS.repeat(3)),
        loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS),
    )


def test_labels_may_be_a_view_that_is_not_contiguous() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    every_other = torch.stack([QUERY_LABELS, QUERY_LABELS], dim=1)[:, 0]
    assert not every_other.is_contiguous()
    loss = PrototypicalLoss()
    expected = loss(query, QUERY_LABELS, None, support, SUPPORT_LABELS)
    assert loss(query, every_other, None, support, SUPPORT_LABELS) == expected


def test_inputs_stay_as_they_are() -> None:
    query, support = normal(5, DIMS, seed=1), normal(7, DIMS, seed=2)
    labels, support_labels = QUERY_LABELS.clone(), SUPPORT_LABELS.clone()
    PrototypicalLoss()(query, labels, None, support, support_labels)
    assert torch.equal(query, normal(5, DIMS, seed=1))
    assert torch.equal(support, normal(7, DIMS, seed=2))
    assert torch.equal(labels, QUERY_LABELS)
    assert torch.equal(support_labels, SUPPORT_LABELS)


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [5, -7, 10_000_000_000])  # between, below and above the classes that are there
def test_query_without_support_raises_and_names_the_class(missing: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a support item .* none for classes \[{missing}\].*draw"):
        PrototypicalLoss()(normal(2, 3), torch.tensor([7, missing]), None, normal(7, 3), SUPPORT_LABELS)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_scale_must_be_above_zero(scale: float) -> None:
    with pytest.raises(ValueError, match="expected scale above 0"):
        PrototypicalLoss(scale=scale)


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="reducr"):
        PrototypicalLoss(reducr=MeanReducer())


def test_missing_labels_raise() -> None:
    with pytest.raises(ValueError, match="labels"):
        PrototypicalLoss()(normal(4, 3))


# --- as a part of PML's own machinery ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # PML's progress bar does
def test_trains_in_the_trainer_of_pml() -> None:
    torch.manual_seed(0)
    images, labels = normal(16, 6, dtype=torch.float32), torch.arange(4).repeat(4)
    trunk = nn.Linear(6, 3)
    before = trunk.weight.detach().clone()
    trainer = MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        batch_size=16,
        loss_funcs={"metric_loss": PrototypicalLoss()},
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
