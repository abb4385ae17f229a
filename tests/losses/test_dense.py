"""The dense losses against PML's own, in value and gradient; loops are in test_loss_contract.py."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from tests.losses.formulas import SQUARED_EUCLID, each_input, each_precision, leaves_of, normal

NTXENT, TRIPLET = (NTXentLoss, DenseNTXentLoss), (TripletMarginLoss, DenseTripletMarginLoss)
each_loss = pytest.mark.parametrize("kinds", [NTXENT, TRIPLET], ids=["ntxent", "triplet"])
LABELS = torch.tensor([2, 0, 2, 5, 0, 2, 7, 5, 0, 2, 5, 5])  # classes of 4, 3, 4 and 1 items, in no order
REF_LABELS = torch.tensor([5, 5, 0, 2, 9, 2, 0])  # none of class 7, one of an own class 9


def items(episode: bool, dtype: torch.dtype = torch.float64, mined: Any = None) -> tuple[Any, ...]:
    """Embeddings and labels of a batch, or of queries and a support set."""
    support = (0.5 * normal(7, 6, seed=2, dtype=dtype), REF_LABELS) if episode else ()
    return 0.5 * normal(12, 6, seed=1, dtype=dtype), LABELS, mined, *support


def outcome(loss: Any, given: tuple[Any, ...]) -> list[Tensor]:
    """Value and gradients; of losses that were not reduced themselves, where they belong, and a sum's gradients."""
    leaves = leaves_of(given)
    value = loss(*given)
    found = [value] if isinstance(value, Tensor) else [value["loss"]["losses"], *value["loss"]["indices"]]
    total = (torch.linspace(0.5, 1, found[0].numel(), dtype=found[0].dtype) * found[0]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*found, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]


def assert_same(kinds: tuple[type, type], given: tuple[Any, ...], **options: Any) -> Tensor:
    """The dense loss is PML's; returns the value."""
    expected, got = (outcome(kind(**options), given) for kind in kinds)
    rtol = 1e-6 if given[0].dtype == torch.float32 else 1e-12
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        scale = max(theirs.abs().max().item(), 1.0) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * scale)
    return got[0]


def mined(kind: str, given: tuple[Any, ...]) -> Any:
    """What a miner may hand to a loss: repeated and shuffled."""
    _, labels, _, *support = given
    ref_labels = support[1] if support else labels
    if kind == "pairs":  # some negatives twice or three times; anchor 1 has no negative, others no positive
        a1, p, a2, n = lmu.convert_to_pairs(None, labels, ref_labels)
        choice = torch.tensor([3, 0, 5, 3, 1, 11, 3, 20, 22, 19])
        choice = choice[a2[choice] != 1]
        return a1[:9], p[:9], a2[choice], n[choice]
    choice = torch.tensor([4, 4, 0, 9, 30, 31, 4, 12, 2, 9, 17])
    return tuple(index[choice] for index in lmu.get_all_triplets_indices(labels, ref_labels))


@each_precision
@each_input
@pytest.mark.parametrize("tuples", ["triplets", "pairs"])
@each_loss
def test_mined_tuples(kinds: tuple[type, type], tuples: str, episode: bool, dtype: torch.dtype) -> None:
    given = items(episode, dtype)
    found = mined(tuples, given)
    assert all(len(index) > 1 for index in found)
    for distance in (CosineSimilarity(), SQUARED_EUCLID()):
        assert assert_same(kinds, items(episode, dtype, found), distance=distance) > 0


FORMS: dict[str, tuple[tuple[type, type], dict[str, Any]]] = {
    **{f"temperature {t}": (NTXENT, {"temperature": t}) for t in (0.0091, 0.07, 50.0)},
    **{f"margin {m}": (TRIPLET, {"margin": m}) for m in (0.05, 0.7, -3.0)},  # at the last no triplet is beyond it
    "swapped": (TRIPLET, {"swap": True}),
    "smooth": (TRIPLET, {"smooth_loss": True}),
    "smooth and swapped, by cosine": (TRIPLET, {"smooth_loss": True, "swap": True, "distance": CosineSimilarity()}),
    "mean": (TRIPLET, {"reducer": MeanReducer()}),
    "not reduced": (TRIPLET, {"reducer": DoNothingReducer(), "swap": True}),
    "those above zero and below 0.4": (TRIPLET, {"reducer": AvgNonZeroReducer(high=0.4), "margin": 0.7}),
}


@each_precision
@each_input
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, episode: bool, dtype: torch.dtype) -> None:
    kinds, options = FORMS[form]
    if kinds is TRIPLET and episode and options.get("swap"):  # PML looks numbers of the support up among the queries
        assert_same(kinds, (*items(False, dtype)[:3], *items(False, dtype)[:2]), **options)
    else:
        assert torch.isfinite(assert_same(kinds, items(episode, dtype), **options)).all()


def test_random_triplets_and_statistics_of_the_reducer_are_those_of_pml() -> None:
    seen = []
    for kind in TRIPLET:
        torch.manual_seed(3)
        loss = kind(reducer=AvgNonZeroReducer(collect_stats=True))
        loss(*items(False))
        random = kind(triplets_per_anchor=5)(*items(False))
        seen.append((loss.reducer.num_past_filter, loss.reducer.losses_size, random.item()))
    assert seen[0] == seen[1]
    assert seen[0][0] > 0


EMPTY, ONE, TWO = torch.zeros(0, dtype=torch.long), torch.tensor([0]), torch.tensor([0, 1])
EDGES = {
    "empty triplets": (LABELS, (EMPTY,) * 3),
    "empty pairs": (LABELS, (EMPTY,) * 4),
    "no positive pairs": (LABELS, (EMPTY, EMPTY, TWO, torch.tensor([3, 4]))),
    "no negative pairs": (LABELS, (TWO, torch.tensor([2, 4]), EMPTY, EMPTY)),
    "one triplet": (LABELS, (ONE, torch.tensor([2]), torch.tensor([1]))),  # which NTXentLoss of PML takes for none
    "anchors without negatives": (LABELS, (TWO, torch.tensor([2, 4]), ONE, torch.tensor([3]))),
    "no labels": (None, (TWO, torch.tensor([2, 4]), torch.tensor([3, 6]))),
}


@pytest.mark.parametrize("distance", [CosineSimilarity(), LpDistance()])
@pytest.mark.parametrize("edge", EDGES)
@each_loss
def test_edge_cases(kinds: tuple[type, type], edge: str, distance: Any) -> None:
    given = (items(False)[0], *EDGES[edge])
    assert_same(kinds, given, distance=distance)
    assert torch.isfinite(outcome(kinds[1](distance=distance), given)[1]).all()


@pytest.mark.parametrize("reducer", [None, MeanReducer()], ids=["default", "mean"])
@each_loss
def test_a_broken_embedding_gives_what_pml_gives(kinds: tuple[type, type], reducer: Any) -> None:
    batch, labels, _ = items(False)
    batch[3] = math.nan
    expected, got = (kind(distance=CosineSimilarity(), reducer=reducer)(batch, labels) for kind in kinds)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "margin", "seed"), [(torch.float16, 20, 4), (torch.float16, -3, 6), (torch.bfloat16, 2, 8)]
)
def test_16_bits_are_computed_in_32(dtype: torch.dtype, margin: int, seed: int) -> None:
    """float16 holds neither the sum at 20 nor the number of triplets, 107,520."""
    batch, labels = normal(128, 8, seed=seed, dtype=dtype), torch.arange(16).repeat(8)
    options = {"margin": margin, "smooth_loss": True, "distance": CosineSimilarity()}
    expected, got = TRIPLET[0](**options)(batch.float(), labels), TRIPLET[1](**options)(batch, labels)
    assert 0 < got < 30
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_learned_temperature_has_the_value_and_the_slope_of_the_given_one() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(4).repeat(3)

    def fixed(temperature: float) -> float:
        return NTXentLoss(temperature=temperature)(embeddings, labels).item()

    loss = DenseNTXentLoss(temperature=0.2, learn_temperature=True).double()
    value = loss(embeddings, labels)
    value.backward()
    assert loss.log_temperature is not None
    assert value.item() == pytest.approx(fixed(0.2))
    slope = (fixed(0.2 * math.exp(1e-4)) - fixed(0.2 * math.exp(-1e-4))) / 2e-4
    assert loss.log_temperature.grad is not None
    assert loss.log_temperature.grad.item() == pytest.approx(slope, rel=1e-5)
    assert not list(DenseNTXentLoss().parameters())
    with pytest.raises(UsageError, match="expected temperature above 0"):
        DenseNTXentLoss(temperature=0)


@each_loss
def test_inside_a_wrapper_that_knows_pmls_names_only(kinds: tuple[type, type]) -> None:
    with pytest.raises(Exception, match="not supported"):
        CrossBatchMemory(kinds[1](), 6)
    values = []
    for kind in kinds:
        memory = CrossBatchMemory(kinds[0](distance=CosineSimilarity()), 6, memory_size=24)
        memory.loss = kind(distance=CosineSimilarity())
        values.append([memory(normal(12, 6, seed=s), LABELS) for s in range(3)])
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)
