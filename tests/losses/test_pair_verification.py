"""PairVerificationLoss against torch's own cross-entropy, and its draws; loops are in test_loss_contract.py."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import DoNothingReducer, SumReducer
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from tests.losses.formulas import all_pairs, arguments, learned, leaves_of, normal

each_input = pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
Pair = tuple[int, int]


def listing(**options: Any) -> PairVerificationLoss:
    return PairVerificationLoss(learned(), reducer=DoNothingReducer(), **options)


def drawn(loss: PairVerificationLoss, given: tuple[Any, ...]) -> list[Pair]:
    """The pairs that a loss with the reducer that does nothing has used, in its order."""
    found = loss(*given)["loss"]
    a, b = (index.tolist() for index in found["indices"])
    assert len(a) == len(b) == len(found["losses"])
    return list(zip(a, b, strict=True))


def labels_of(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return given[1::3]


# --- the formula ------------------------------------------------------------------------------------------------------


@each_input
@pytest.mark.parametrize("distance", [learned(), CosineSimilarity(), LpDistance()], ids=["ours", "cosine", "Lp"])
def test_torchs_own_cross_entropy_agrees_in_value_and_gradient(distance: BaseDistance, episode: bool) -> None:
    outcomes = []
    for ours in (True, False):
        given = arguments(episode)
        leaves = leaves_of(given)
        if ours:
            loss = PairVerificationLoss(distance, balanced=False, negative_weight=0.4)(*given)
        else:
            logits = distance(leaves[0], leaves[-1]) * (1 if distance.is_inverted else -1)
            labels = labels_of(given)
            target = (labels[0].unsqueeze(1) == labels[-1]).double()
            kept = torch.ones_like(target) if episode else 1 - torch.eye(8).double()
            weight = kept * (target + 0.4 * (1 - target))
            loss = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / kept.sum()
        outcomes.append((loss, *torch.autograd.grad(loss, [*leaves, *distance.parameters()])))
    for got, expected in zip(*outcomes, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_default_is_the_learned_similarity_over_balanced_pairs_of_equal_weight() -> None:
    loss, given = PairVerificationLoss(), arguments(False, torch.float32)
    assert type(loss.distance) is WeightedL1Similarity
    assert loss.distance.hidden is None
    assert loss(*given) == PairVerificationLoss(WeightedL1Similarity(5), True, 1.0, torch.initial_seed())(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    similarity = WeightedL1Similarity(1).to(dtype)
    batch, labels = torch.tensor([[0.0], [5000.0], [-3000.0], [1.0]], dtype=dtype), torch.tensor([0, 0, 1, 1])
    loss = PairVerificationLoss(similarity, balanced=False, reducer=SumReducer())
    with torch.no_grad():
        similarity.score.weight.fill_(1)
    # matching pairs at logits 5000 and 3001 cost nothing; others cost their logits: 3000, 1, 8000, 4999, each twice
    value = loss(batch.requires_grad_(), labels)
    assert value.item() == pytest.approx(2 * (3000 + math.log1p(math.e) + 8000 + 4999), rel=1e-6)
    value.backward()
    slope = 1 / (1 + math.exp(-1))
    wanted = torch.tensor([[2 * (1 - slope)], [4.0], [-4.0], [2 * (slope - 1)]], dtype=dtype)
    torch.testing.assert_close(batch.grad, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        similarity.score.weight.fill_(-1)
    assert loss(batch, labels).item() == pytest.approx(2 * (5000 + 3001 + math.log1p(math.exp(-1))), rel=1e-6)


# --- balanced pairs ---------------------------------------------------------------------------------------------------


@each_input
@pytest.mark.parametrize("fewer", ["matching", "others"])
def test_as_many_of_each_kind_are_drawn_as_there_are_of_the_rarer(fewer: str, episode: bool) -> None:
    given = arguments(episode)
    if fewer == "others":
        labels = torch.tensor([2, 2, 2, 2, 2, 2, 2, 1])
        given = (given[0], labels, None, *((given[3], labels[1:]) if episode else ()))
    matching, others = all_pairs(*labels_of(given))
    rare, many = (matching, others) if fewer == "matching" else (others, matching)
    assert 0 < 2 * len(rare) < len(many)
    pairs = drawn(listing(seed=1), given)
    assert len(set(pairs)) == len(pairs) == 2 * len(rare)
    half = len(rare)
    assert set(pairs[:half]) <= set(matching)  # matching ones first
    assert set(pairs[half:]) <= set(others)
    assert set(rare) <= set(pairs)
    assert set(drawn(listing(seed=2), given)) != set(pairs)


@pytest.mark.parametrize("fewer", [True, False], ids=["fewer matching", "fewer others"])
def test_every_pair_is_as_likely_as_any_other(fewer: bool) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2] if fewer else [0, 0, 0, 0, 0, 1])
    given, loss = (normal(6, 5), labels), listing(seed=0)
    matching, others = all_pairs(labels)
    counts = dict.fromkeys(matching + others, 0)
    for _ in range(400):
        for pair in drawn(loss, given):
            counts[pair] += 1
    rare, many = (matching, others) if fewer else (others, matching)
    assert all(counts[pair] == 400 for pair in rare)
    # 6 of 24 in each draw, or 10 of 20: 100 or 200 on average, with a standard deviation of 9 or 10
    average = 100 if fewer else 200
    assert len(many) == (24 if fewer else 20)
    assert all(average - 36 < counts[pair] < average + 36 for pair in many)


@each_input
def test_the_balanced_loss_is_the_mean_over_what_was_drawn(episode: bool) -> None:
    given = arguments(episode)
    pairs = drawn(listing(seed=3), given)
    half = len(pairs) // 2
    index = [torch.tensor(numbers) for part in (pairs[:half], pairs[half:]) for numbers in zip(*part, strict=True)]
    expected = PairVerificationLoss(learned(), negative_weight=0.3)(*given[:2], tuple(index), *given[3:])
    torch.testing.assert_close(PairVerificationLoss(learned(), negative_weight=0.3, seed=3)(*given), expected)


def test_the_draws_are_fixed_by_the_seed_and_the_seed_by_torchs() -> None:
    """Experiments of other seeds draw other pairs; making the loss draws no number of theirs."""
    given = arguments(False)
    sequences: dict[Any, Any] = {}
    with torch.random.fork_rng():
        for torchs, seed in ((0, None), (0, None), (1, None), (2, None), (2, 0), (3, 0)):
            torch.manual_seed(torchs)
            before = torch.get_rng_state()
            loss = listing(seed=seed)
            sequence = [drawn(loss, given) for _ in range(5)]
            assert torch.equal(torch.get_rng_state(), before)
            assert len({tuple(pairs) for pairs in sequence}) == 5
            assert sequences.setdefault(torchs if seed is None else f"given {seed}", sequence) == sequence
    assert sequences.pop("given 0") == sequences[0]
    assert len({str(sequence) for sequence in sequences.values()}) == 3


def test_nothing_is_drawn_where_the_pairs_are_given() -> None:
    given = arguments(False)
    mined = MultiSimilarityMiner()(*given[:2])
    for loss, call in ((listing(balanced=False), given), (listing(), arguments(False, mined=mined))):
        before = loss.get_extra_state()
        loss(*call)
        assert torch.equal(loss.get_extra_state(), before)


def test_the_next_draw_is_part_of_the_state_and_of_copies() -> None:
    given, loss = arguments(False), listing(seed=5)
    for _ in range(3):
        loss(*given)
    state, twin, buffer = loss.state_dict(), copy.deepcopy(loss), io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    expected = [drawn(loss, given) for _ in range(4)]
    assert expected[0] != drawn(listing(seed=5), given)  # the state was not that of the beginning
    assert [drawn(twin, given) for _ in range(4)] == expected
    for kept in (state, torch.load(buffer, weights_only=True)):  # a state that was kept has not moved
        other = listing(seed=77)
        other(*given)
        other.load_state_dict(kept)
        assert [drawn(other, given) for _ in range(4)] == expected


# --- a miner's pairs and triplets -------------------------------------------------------------------------------------

EMPTY = ([], [])
PAIRS = {
    "pairs, one twice": (([0, 0, 3], [1, 1, 5]), ([6, 1], [0, 3])),
    "a single matching pair": (([0], [1]), EMPTY),
    "a single other pair": (EMPTY, ([0], [2])),
    "matching ones only": (([0, 3], [1, 5]), EMPTY),
    "others only": (EMPTY, ([6, 1], [0, 3])),
}


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=list(PAIRS))
def test_all_pairs_of_a_miner_are_used_as_often_as_it_names_them(pairs: Any, balanced: bool) -> None:
    batch, labels, _ = arguments(False)
    mined = tuple(torch.tensor(index).long() for pair in pairs for index in pair)
    expected = [pair for part in pairs for pair in zip(*part, strict=True)]
    assert drawn(listing(balanced=balanced), (batch, labels, mined)) == expected
    logits = learned()(batch)
    losses = [F.softplus(-logits[i, j]) for i, j in zip(*pairs[0], strict=True)]
    losses += [0.5 * F.softplus(logits[i, j]) for i, j in zip(*pairs[1], strict=True)]
    got = PairVerificationLoss(learned(), balanced, negative_weight=0.5)(batch, labels, mined)
    torch.testing.assert_close(got, torch.stack(losses).mean())


@pytest.mark.parametrize("count", [3, 1])
def test_a_triplet_is_a_matching_pair_and_another_and_needs_no_labels(count: int) -> None:
    batch = arguments(False)[0]
    triplets = tuple(torch.tensor(index[:count]) for index in ([0, 1, 0], [1, 4, 4], [3, 0, 5]))
    expected = [(0, 1), (1, 4), (0, 4)][:count] + [(0, 3), (1, 0), (0, 5)][:count]
    assert drawn(listing(), (batch, None, triplets)) == expected


@pytest.mark.parametrize("length", [3, 4])
def test_a_miner_that_found_nothing_gives_zero_loss_and_gradient(length: int) -> None:
    batch, labels, _ = arguments(False)
    empty = tuple(torch.zeros(0, dtype=torch.long) for _ in range(length))
    loss = PairVerificationLoss(learned())(batch.requires_grad_(), labels, empty)
    loss.backward()
    assert loss.item() == 0
    assert not batch.grad.any()


# --- episodes, and batches without pairs of one kind ------------------------------------------------------------------


def test_an_item_among_the_references_is_a_pair_with_itself() -> None:
    """Only where no references are given is an item no pair with itself. This is the smallest episode, too."""
    batch, labels = normal(2, 5, seed=1), torch.tensor([8, 5])
    assert drawn(listing(balanced=False), (batch[:1], labels[:1], None, batch, labels)) == [(0, 0), (0, 1)]
    assert set(drawn(listing(), (batch, labels, None, batch.clone(), labels.clone()))) == {
        (0, 0),
        (1, 1),
        (0, 1),
        (1, 0),
    }


# --- learning and exceptions ------------------------------------------------------------------------------------------


def test_training_learns_which_dimension_tells_classes_apart_and_from_where_on() -> None:
    """Class in dimension 0, noise in dimension 1: the first weight falls, the bias rises, and 0 parts the pairs."""
    labels = torch.arange(4).repeat_interleave(6)
    batch = torch.stack([3.0 * labels, normal(24, dtype=torch.float32)], dim=1)
    loss = PairVerificationLoss(seed=0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.2)  # of weights that are made on the way
    for _ in range(100):
        optimizer.zero_grad()
        loss(batch, labels).backward()
        optimizer.step()
    weight, bias = loss.distance.score.weight.tolist(), loss.distance.score.bias.item()
    assert weight[0] < -1.5
    assert weight[1] > -0.5
    assert bias > 1
    assert torch.equal(loss.distance(batch) > 0, labels.unsqueeze(1) == labels)


@pytest.mark.parametrize("negative_weight", [0, -1.0, float("nan")])
def test_negative_weight_must_be_above_zero(negative_weight: float) -> None:
    with pytest.raises(UsageError, match=rf"expected negative_weight above 0, got {negative_weight}; "):
        PairVerificationLoss(negative_weight=negative_weight)
