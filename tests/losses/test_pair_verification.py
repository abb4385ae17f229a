"""PairVerificationLoss: its draws, pairs of miners, logits of any size; loops are in test_loss_contract.py."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import DoNothingReducer, SumReducer

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from tests.losses.formulas import LOSSES, all_pairs, arguments, each_input, each_precision, learned, losses_by_hand

Pair = tuple[int, int]


def listing(**options: Any) -> PairVerificationLoss:
    return PairVerificationLoss(learned(), reducer=DoNothingReducer(), **options)


def drawn(loss: PairVerificationLoss, given: tuple[Any, ...]) -> list[Pair]:
    """The pairs that a loss with the reducer that does nothing has used, in its order."""
    found = loss(*given)["loss"]
    pairs = list(zip(*(index.tolist() for index in found["indices"]), strict=True))
    assert len(pairs) == len(found["losses"])
    return pairs


def test_default_is_the_learned_similarity_over_balanced_pairs_of_equal_weight() -> None:
    loss, given = PairVerificationLoss(), arguments(False, torch.float32)
    assert type(loss.distance) is WeightedL1Similarity
    assert loss.distance.hidden is None
    assert loss(*given) == PairVerificationLoss(WeightedL1Similarity(5), True, 1.0, torch.initial_seed())(*given)


@each_precision
def test_logits_of_any_size_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    similarity = WeightedL1Similarity(1).to(dtype)
    batch, labels = torch.tensor([[0.0], [5000.0], [-3000.0], [1.0]], dtype=dtype), torch.tensor([0, 0, 1, 1])
    loss = PairVerificationLoss(similarity, balanced=False, reducer=SumReducer())
    similarity.score.weight.data.fill_(1)
    # matching pairs at logits 5000 and 3001 cost nothing; others cost their logits: 3000, 1, 8000, 4999, each twice
    value = loss(batch.requires_grad_(), labels)
    assert value.item() == pytest.approx(2 * (3000 + math.log1p(math.e) + 8000 + 4999), rel=1e-6)
    value.backward()
    slope = 1 / (1 + math.exp(-1))
    wanted = torch.tensor([[2 * (1 - slope)], [4.0], [-4.0], [2 * (slope - 1)]], dtype=dtype)
    torch.testing.assert_close(batch.grad, wanted, rtol=1e-5, atol=1e-5)
    similarity.score.weight.data.fill_(-1)
    assert loss(batch, labels).item() == pytest.approx(2 * (5000 + 3001 + math.log1p(math.exp(-1))), rel=1e-6)


@each_input
@pytest.mark.parametrize("fewer", ["matching", "others"])
def test_as_many_of_each_kind_are_drawn_as_there_are_of_the_rarer(fewer: str, episode: bool) -> None:
    given = arguments(episode)
    if fewer == "others":
        labels = torch.tensor([2, 2, 2, 2, 2, 2, 2, 1])
        given = (given[0], labels, None, *((given[3], labels[1:]) if episode else ()))
    matching, others = all_pairs(*given[1::3])
    rare, many = (matching, others) if fewer == "matching" else (others, matching)
    half = len(rare)
    assert 0 < 2 * half < len(many)
    pairs = drawn(listing(seed=1), given)
    assert len(set(pairs)) == len(pairs) == 2 * half
    assert set(pairs[:half]) <= set(matching)  # matching ones first
    assert set(pairs[half:]) <= set(others)
    assert set(rare) <= set(pairs)
    assert set(drawn(listing(seed=2), given)) != set(pairs)


@pytest.mark.parametrize(  # 6 of 24 others in each draw, or 10 of 20 matching ones
    ("labels", "average"), [([0, 0, 1, 1, 2, 2], 100), ([0, 0, 0, 0, 0, 1], 200)], ids=["others", "matching"]
)
def test_every_pair_is_as_likely_as_any_other(labels: list[int], average: int) -> None:
    given, loss = (arguments(False)[0][:6], torch.tensor(labels)), listing(seed=0)
    rare, many = sorted(all_pairs(given[1]), key=len)
    draws = [pair for _ in range(400) for pair in drawn(loss, given)]
    assert all(draws.count(pair) == 400 for pair in rare)
    assert all(average - 36 < draws.count(pair) < average + 36 for pair in many)  # standard deviations are 9 and 10


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


def test_the_next_draw_is_part_of_the_state_and_of_copies_and_nothing_is_drawn_where_pairs_are_given() -> None:
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
        other(*arguments(False, mined=MultiSimilarityMiner()(*given[:2])))
        other.balanced = False
        other(*given)
        other.balanced = True
        assert [drawn(other, given) for _ in range(4)] == expected


MINED: dict[str, tuple[list[int], ...]] = {
    "pairs, one twice": ([0, 0, 3], [1, 1, 5], [6, 1], [0, 3]),
    "a single matching pair": ([0], [1], [], []),
    "others only": ([], [], [6, 1], [0, 3]),
    "triplets": ([0, 1, 0], [1, 4, 4], [3, 0, 5]),
    "a single triplet": ([0], [1], [3]),
}


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("mined", MINED)
def test_all_pairs_of_a_miner_are_used_as_often_as_it_names_them_and_need_no_labels(mined: str, balanced: bool) -> None:
    given = (arguments(False)[0], None, tuple(torch.tensor(index).long() for index in MINED[mined]))
    losses, numbers = zip(*losses_by_hand("pairs", learned(), given), strict=True)
    assert drawn(listing(balanced=balanced), given) == list(numbers)
    torch.testing.assert_close(LOSSES["pairs"](learned(), balanced=balanced)(*given), torch.stack(losses).mean())


@pytest.mark.parametrize("length", [3, 4])
def test_a_miner_that_found_nothing_gives_zero_loss_and_gradient(length: int) -> None:
    batch, labels, _ = arguments(False)
    loss = PairVerificationLoss(learned())(batch.requires_grad_(), labels, (torch.zeros(0).long(),) * length)
    loss.backward()
    assert loss.item() == 0
    assert not batch.grad.any()


def test_an_item_among_the_references_is_a_pair_with_itself() -> None:
    """Only where no references are given is an item no pair with itself. This is the smallest episode, too."""
    batch, labels = arguments(False)[0][:2], torch.tensor([8, 5])
    assert drawn(listing(balanced=False), (batch[:1], labels[:1], None, batch, labels)) == [(0, 0), (0, 1)]
    pairs = drawn(listing(), (batch, labels, None, batch.clone(), labels.clone()))
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("negative_weight", [0, -1.0, float("nan")])
def test_negative_weight_must_be_above_zero(negative_weight: float) -> None:
    with pytest.raises(UsageError, match=rf"expected negative_weight above 0, got {negative_weight}; "):
        PairVerificationLoss(negative_weight=negative_weight)
