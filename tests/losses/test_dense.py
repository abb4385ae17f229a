"""The dense losses against PML's own, over distances, reducers, miners and episodes, and against loops."""

import math
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.reducers as pml_reducers
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.losses import CrossBatchMemory, MultipleLosses, NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss

DTYPES = [torch.float32, torch.float64]
NTXENT, TRIPLET = (NTXentLoss, DenseNTXentLoss), (TripletMarginLoss, DenseTripletMarginLoss)
PAIRS = pytest.mark.parametrize("kinds", [NTXENT, TRIPLET], ids=["ntxent", "triplet"])
LABELS = torch.tensor([2, 0, 2, 5, 0, 2, 7, 5, 0, 2, 5, 5])  # classes of 4, 3, 4 and 1 items, in no order
REF_LABELS = torch.tensor([5, 5, 0, 2, 9, 2, 0])  # none of class 7, one of an own class 9
DISTANCES = [
    partial(CosineSimilarity),
    partial(DotProductSimilarity, normalize_embeddings=False),
    partial(LpDistance),
    partial(LpDistance, p=1),
    partial(LpDistance, normalize_embeddings=False, power=2),
    partial(SNRDistance),
]
REDUCERS: list[Any] = [
    None,
    partial(MeanReducer),
    partial(SumReducer),
    partial(AvgNonZeroReducer),
    partial(AvgNonZeroReducer, high=0.4),
    partial(AvgNonZeroReducer, collect_stats=True),
    partial(ThresholdReducer, low=0.2, high=2.0),
    partial(ClassWeightedReducer, weights=torch.linspace(0.1, 2, 10)),
    partial(PerAnchorReducer),
    partial(DoNothingReducer),
    partial(MultipleReducers, {"loss": SumReducer()}),
]
TUPLES = ["none", "triplet miner", "pair miner", "triplets", "pairs"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for a second thread takes longer than these small tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def items(episode: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Embeddings and labels of a batch, or of queries and a support set."""
    embeddings = 0.5 * normal(12, 6, seed=1, dtype=dtype)
    support = (0.5 * normal(7, 6, seed=2, dtype=dtype), REF_LABELS) if episode else (None, None)
    return embeddings, LABELS, *support


def tuples(kind: str, embeddings: Tensor, labels: Tensor, ref: Tensor | None, ref_labels: Tensor | None) -> Any:
    """What a miner hands to the loss; the hand-made ones repeat and shuffle pairs."""
    if kind == "none":
        return None
    if kind == "triplet miner":
        return TripletMarginMiner(margin=0.3)(embeddings, labels, ref, ref_labels)
    if kind == "pair miner":
        return MultiSimilarityMiner(epsilon=0.2)(embeddings, labels, ref, ref_labels)
    found = lmu.convert_to_pairs(None, labels, labels if ref is None else ref_labels)
    if kind == "pairs":  # some negatives twice or three times; anchor 1 has no negative, others no positive
        a1, p, a2, n = found
        choice = torch.tensor([3, 0, 5, 3, 1, 11, 3, 20, 22, 19])
        kept = a2[choice] != 1
        return a1[:9], p[:9], a2[choice][kept], n[choice][kept]
    a, p, n = lmu.get_all_triplets_indices(labels, labels if ref is None else ref_labels)
    choice = torch.tensor([4, 4, 0, 9, 30, 31, 4, 12, 2, 9, 17])
    return a[choice], p[choice], n[choice]


def flat(output: Any) -> list[Tensor]:
    """The tensors of a loss's output, which the reducer that does nothing leaves as a dict."""
    if isinstance(output, Tensor):
        return [output]
    assert output.keys() == {"loss"}
    return [output["loss"]["losses"], *output["loss"]["indices"]]


def assert_same(kinds: tuple[type, type], episode: bool, dtype: torch.dtype, tuple_kind: str, **options: Any) -> Tensor:
    """Value and gradient of the dense loss are those of PML's, or both raise the same."""
    gradients, outputs = [], []
    for kind in kinds:
        built = {k: v() if isinstance(v, partial) else v for k, v in options.items()}
        embeddings, labels, ref, ref_labels = items(episode, dtype)
        found = tuples(tuple_kind, embeddings, labels, ref, ref_labels)
        leaves = [x.requires_grad_() for x in (embeddings, ref) if x is not None]
        try:
            output = flat(kind(**built)(embeddings, labels, found, ref, ref_labels))
        except (NotImplementedError, IndexError, KeyError) as error:
            outputs.append(type(error))
            gradients.append([])
            continue
        outputs.append(output)
        weights = torch.linspace(0.5, 1, output[0].numel(), dtype=dtype).view_as(output[0])
        found = torch.autograd.grad((weights * output[0]).sum(), leaves, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)])
    if isinstance(outputs[0], type):
        assert outputs[0] is outputs[1]
        return torch.zeros(())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for expected, got in zip((*outputs[0], *gradients[0]), (*outputs[1], *gradients[1]), strict=True):
        assert got.dtype == expected.dtype
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(scale, 1.0))
    return outputs[1][0]


# --- PML's own losses as the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.func.__name__)
@PAIRS
def test_every_distance_reducer_and_tuple(
    kinds: tuple[type, type], distance: partial, episode: bool, dtype: torch.dtype
) -> None:
    for reducer in REDUCERS:
        for tuple_kind in TUPLES:
            assert_same(kinds, episode, dtype, tuple_kind, distance=distance, reducer=reducer)


def test_the_grid_holds_every_distance_and_reducer_that_these_losses_accept() -> None:
    kinds = {kind for kind in vars(pml_distances).values() if isinstance(kind, type)}
    assert {k.__name__ for k in kinds - {d.func for d in DISTANCES}} == {"BaseDistance", "BatchedDistance"}
    kinds = {kind for kind in vars(pml_reducers).values() if isinstance(kind, type)}
    assert {k.__name__ for k in kinds - {r.func for r in REDUCERS if r}} == {"BaseReducer", "DivisorReducer"}


@PAIRS
def test_reducers_that_pml_refuses_are_refused(kinds: tuple[type, type]) -> None:
    embeddings, labels, *_ = items(False, torch.float64)
    for kind in kinds:
        with pytest.raises(KeyError, match="divisor"):
            kind(reducer=DivisorReducer())(embeddings, labels)
    for kind in TRIPLET:
        with pytest.raises(NotImplementedError, match="Triplet reduction"):
            kind(reducer=PerAnchorReducer())(embeddings, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
@pytest.mark.parametrize("temperature", [0.0091, 0.07, 1.0, 50.0])
def test_temperatures(temperature: float, episode: bool, dtype: torch.dtype) -> None:
    for distance in DISTANCES:
        for tuple_kind in TUPLES:
            loss = assert_same(NTXENT, episode, dtype, tuple_kind, distance=distance, temperature=temperature)
            assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("smooth", [False, True], ids=["hinge", "smooth"])
@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swap"])
@pytest.mark.parametrize("margin", [0.05, 0.7, -3.0])  # at -3 no normalised triplet violates
def test_forms_of_the_triplet_loss(margin: float, swap: bool, smooth: bool, dtype: torch.dtype) -> None:
    for distance in DISTANCES:
        for reducer in (None, partial(MeanReducer), partial(DoNothingReducer)):
            form = {"distance": distance, "reducer": reducer, "margin": margin, "swap": swap, "smooth_loss": smooth}
            for episode in (False, True):
                assert_same(TRIPLET, episode, dtype, "none", **form)


@pytest.mark.parametrize("per_anchor", [1, 5])
def test_random_triplets_are_those_of_pml(per_anchor: int) -> None:
    values = []
    for kind in TRIPLET:
        torch.manual_seed(3)
        values.append(kind(triplets_per_anchor=per_anchor)(*items(False, torch.float64)[:2]))
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("reducer", REDUCERS[:-2], ids=lambda r: r.func.__name__ if r else "default")
@PAIRS
def test_with_an_embedding_regularizer(kinds: tuple[type, type], reducer: Any, dtype: torch.dtype) -> None:
    regularized = {"reducer": reducer, "embedding_regularizer": partial(LpRegularizer), "embedding_reg_weight": 0.3}
    for episode in (False, True):
        loss = assert_same(kinds, episode, dtype, "none", **regularized)
        if loss:  # 0 where the reducer is refused
            assert loss != assert_same(kinds, episode, dtype, "none", reducer=reducer)


@PAIRS
def test_balanced_batch_of_ordinary_size(kinds: tuple[type, type]) -> None:
    for dtype in DTYPES:
        batch, labels = normal(48, 16, seed=4, dtype=dtype), torch.arange(12).repeat(4)
        values = [kind()(batch, labels) for kind in kinds]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=0)


# --- the formulas, as loops -------------------------------------------------------------------------------------------


def cosines(x: Tensor, y: Tensor) -> list[list[float]]:
    return [[float(a @ b / (a.norm() * b.norm())) for b in y] for a in x]


@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
def test_ntxent_is_its_formula(episode: bool) -> None:
    x, labels, ref, ref_labels = items(episode, torch.float64)
    y, other = (x, labels) if ref is None else (ref, ref_labels)
    similarity, losses = cosines(x, y), []
    for i in range(len(x)):
        away = sum(math.exp(similarity[i][j] / 0.2) for j in range(len(y)) if other[j] != labels[i])
        for j in range(len(y)):
            if other[j] == labels[i] and (episode or i != j):
                own = math.exp(similarity[i][j] / 0.2)
                losses.append(-math.log(own / (own + away)))
    got = DenseNTXentLoss(temperature=0.2)(x, labels, None, ref, ref_labels)
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
def test_triplet_loss_is_its_formula(episode: bool) -> None:
    x, labels, ref, ref_labels = items(episode, torch.float64)
    y, other = (x, labels) if ref is None else (ref, ref_labels)
    similarity, losses = cosines(x, y), []
    for i in range(len(x)):
        for j in range(len(y)):
            for k in range(len(y)):
                if other[j] == labels[i] != other[k] and (episode or i != j):
                    losses.append(max(0.0, similarity[i][k] - similarity[i][j] + 0.1))
    above = [loss for loss in losses if loss > 0]
    assert 0 < len(above) < len(losses)
    for reducer, expected in ((None, sum(above) / len(above)), (MeanReducer(), sum(losses) / len(losses))):
        loss = DenseTripletMarginLoss(margin=0.1, distance=CosineSimilarity(), reducer=reducer)
        assert loss(x, labels, None, ref, ref_labels).item() == pytest.approx(expected, rel=1e-10)


def test_a_negative_that_stands_three_times_counts_three_times() -> None:
    batch = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    pairs = tuple(torch.tensor(x) for x in ([0, 0], [1, 1], [0, 0, 0], [2, 2, 2]))
    loss = DenseNTXentLoss(temperature=1)(batch, None, pairs)
    assert loss.item() == pytest.approx(math.log((math.exp(0.6) + 3) / math.exp(0.6)), rel=1e-12)


# --- edge cases -------------------------------------------------------------------------------------------------------

EMPTY = torch.zeros(0, dtype=torch.long)
ONE, TWO = torch.tensor([0]), torch.tensor([0, 1])
EDGES = {
    "one class": (torch.zeros(12, dtype=torch.long), None),
    "no positives": (torch.arange(12), None),
    "empty triplets": (LABELS, (EMPTY,) * 3),
    "empty pairs": (LABELS, (EMPTY,) * 4),
    "no positive pairs": (LABELS, (EMPTY, EMPTY, TWO, torch.tensor([3, 4]))),
    "no negative pairs": (LABELS, (TWO, torch.tensor([2, 4]), EMPTY, EMPTY)),
    "one triplet": (LABELS, (ONE, torch.tensor([2]), torch.tensor([1]))),  # which NTXentLoss of PML takes for none
    "anchors without negatives": (LABELS, (TWO, torch.tensor([2, 4]), ONE, torch.tensor([3]))),
    "no labels": (None, (TWO, torch.tensor([2, 4]), torch.tensor([3, 6]))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("edge", EDGES)
@PAIRS
def test_edge_cases_are_as_in_pml(kinds: tuple[type, type], edge: str, dtype: torch.dtype) -> None:
    labels, found = EDGES[edge]
    for distance in (CosineSimilarity(), LpDistance()):
        results, kept = [], []
        for kind in kinds:
            batch = items(False, dtype)[0].requires_grad_()
            loss = kind(distance=distance)(batch, labels, found)
            loss.backward()
            assert torch.isfinite(batch.grad).all()
            unreduced = kind(distance=distance, reducer=DoNothingReducer())(batch, labels, found)["loss"]
            results.append((loss.detach(), batch.grad))
            kept.append((type(unreduced["losses"]), unreduced["reduction_type"]))
        assert kept[0] == kept[1]
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)


@PAIRS
def test_support_of_one_class_has_zero_loss_even_with_swap(kinds: tuple[type, type]) -> None:
    arguments = (normal(3, 4), torch.zeros(3), None, normal(5, 4, seed=1), torch.zeros(5))
    options = {"swap": True} if kinds is TRIPLET else {}
    assert [kind(**options)(*arguments).item() for kind in kinds] == [0, 0]


@PAIRS
def test_labels_or_a_tuple_are_required(kinds: tuple[type, type]) -> None:
    messages = []
    for kind in kinds:
        with pytest.raises(ValueError, match="labels") as error:
            kind()(normal(4, 3))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("reducer", [None, MeanReducer()], ids=["default", "mean"])
@PAIRS
def test_a_broken_embedding_gives_what_pml_gives(kinds: tuple[type, type], reducer: Any) -> None:
    batch, labels, *_ = items(False, torch.float64)
    batch[3] = math.nan
    values = [kind(distance=CosineSimilarity(), reducer=reducer)(batch, labels) for kind in kinds]
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [20, -3])  # float16 holds neither the sum at 20 nor the number of triplets, 107,520
def test_16_bits_do_not_overflow(margin: int, dtype: torch.dtype) -> None:
    batch, labels = normal(128, 8, seed=4, dtype=dtype), torch.arange(16).repeat(8)
    losses = [kind(margin=margin, smooth_loss=True, distance=CosineSimilarity()) for kind in TRIPLET]
    expected, got = (loss(batch, labels) for loss in losses)
    assert 0 < got < 30
    assert got == expected


# --- as a part of PML's own machinery ---------------------------------------------------------------------------------


def test_statistics_of_the_reducer_are_kept() -> None:
    reducers = []
    for kind in TRIPLET:
        loss = kind(reducer=AvgNonZeroReducer(collect_stats=True))
        loss(*items(False, torch.float64)[:2])
        reducers.append(loss.reducer)
    assert reducers[0].num_past_filter == reducers[1].num_past_filter > 0
    assert reducers[0].losses_size == reducers[1].losses_size > 1


@PAIRS
def test_pickles(kinds: tuple[type, type]) -> None:
    loss = kinds[1](distance=CosineSimilarity())
    arguments = items(False, torch.float64)[:2]
    assert pickle.loads(pickle.dumps(loss))(*arguments) == loss(*arguments)


@PAIRS
def test_inside_a_wrapper_that_knows_pmls_names_only(kinds: tuple[type, type]) -> None:
    with pytest.raises(Exception, match="not supported"):
        CrossBatchMemory(kinds[1](), 6)
    values = []
    for kind in kinds:
        memory = CrossBatchMemory(kinds[0](distance=CosineSimilarity()), 6, memory_size=24)
        memory.loss = kind(distance=CosineSimilarity())
        values.append([memory(normal(12, 6, seed=s), LABELS) for s in range(3)])
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)


def test_trains_inside_multiple_losses() -> None:
    weights = []
    for ntxent, triplet in zip(NTXENT, TRIPLET, strict=True):
        torch.manual_seed(0)
        trunk = torch.nn.Linear(6, 4)
        losses = MultipleLosses([ntxent(), triplet(margin=0.3)], miners=[None, TripletMarginMiner()], weights=[1, 0.5])
        plain = MultipleLosses({"ntxent": ntxent(), "triplet": triplet()})
        optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
        taken = []
        for _ in range(10):
            embeddings = trunk(normal(12, 6, dtype=torch.float32))
            loss = losses(embeddings, LABELS) + plain(embeddings, LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken.append(loss.item())
        assert taken[-1] < taken[0]
        weights.append(trunk.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
