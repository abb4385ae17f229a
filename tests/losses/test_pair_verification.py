"""PairVerificationLoss against loops over pairs, torch's own cross-entropy, and the parts of PML it is used with."""

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
from pytorch_metric_learning.losses import MultipleLosses
from pytorch_metric_learning.miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    HDCMiner,
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
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.losses.pair_verification import PairVerificationLoss

DTYPES = [torch.float32, torch.float64]
LABELS = torch.tensor([4, 9, 4, 0, 9, 4, 7, 0])  # classes of 3, 2, 2 and 1 items: 10 matching pairs, 46 others
REF_LABELS = torch.tensor([9, 4, 4, 7, 0, 5])  # one of a class that no query has
DIMS = 5

# every distance that PML exports, in the forms whose behaviour differs, and why a class of it is left out
DISTANCES: dict[type, list[dict[str, object]]] = {
    LpDistance: [{}, {"p": 1}, {"power": 2}, {"normalize_embeddings": False, "power": 2}],
    SNRDistance: [{}, {"normalize_embeddings": False}],
    CosineSimilarity: [{}, {"power": 3}],
    DotProductSimilarity: [{"normalize_embeddings": False}],
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
    ThresholdReducer: [partial(ThresholdReducer, high=0.7), partial(ThresholdReducer, low=0.7)],
    PerAnchorReducer: [partial(PerAnchorReducer), partial(PerAnchorReducer, reducer=partial(SumReducer))],
    ClassWeightedReducer: [partial(ClassWeightedReducer, weights=torch.linspace(0.1, 2, 10))],
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
ALL_DISTANCES = [partial(kind, **options) for kind, forms in (DISTANCES | OUR_DISTANCES).items() for options in forms]
ALL_REDUCERS = [factory for forms in REDUCERS.values() for factory in forms]
EPISODE = pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])

Pair = tuple[int, int, bool]  # query, reference, whether they are of one class


def assert_close(got: Tensor, expected: Tensor) -> None:
    rtol = 1e-5 if got.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=rtol, atol=rtol)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def name(factory: partial) -> str:
    options = ",".join(f"{k}={v}" for k, v in factory.keywords.items() if k != "weights")
    return f"{factory.func.__name__}({options})"


def exported(module: object, base: type) -> set[type]:
    return {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)} | {base}


def arguments_of(episode: bool, dtype: torch.dtype = torch.float64, mined: Any = None) -> tuple:
    batch = normal(8, DIMS, seed=1, dtype=dtype)
    return (
        (batch, LABELS, mined, normal(6, DIMS, seed=2, dtype=dtype), REF_LABELS)
        if episode
        else (
            batch,
            LABELS,
            mined,
        )
    )


def learned(seed: int = 0, dim: int = DIMS) -> WeightedL1Similarity:
    """A similarity in float64 that has been trained, as it were: weights of both signs, and a bias."""
    similarity = WeightedL1Similarity(dim).double()
    with torch.no_grad():
        similarity.score.weight.copy_(normal(dim, seed=100 + seed))
        similarity.score.bias.fill_(0.3)
    return similarity


# --- the formula, one pair at a time ----------------------------------------------------------------------------------


def logit(distance: BaseDistance, query: Tensor, reference: Tensor) -> Tensor:
    """The similarity of one pair, written from the distances' definitions; that of a distance is its negative."""
    x, y = query.double(), reference.double()
    if isinstance(distance, WeightedL1Similarity):
        weights = distance.score.weight.double()
        return distance.score.bias.double() + sum(w * (a - b).abs() for w, a, b in zip(weights, x, y, strict=True))
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


def all_pairs(labels: Tensor, ref_labels: Tensor | None = None) -> list[Pair]:
    """Matching pairs first; an item is no pair with itself."""
    others = labels if ref_labels is None else ref_labels
    pairs = [
        (i, j, bool(labels[i] == others[j]))
        for i in range(len(labels))
        for j in range(len(others))
        if ref_labels is not None or i != j
    ]
    return sorted(pairs, key=lambda pair: not pair[2])


def loss_of_pair(logit: Tensor, match: bool, negative_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy: minus the logarithm of the sigmoid, or of what it leaves of 1."""
    probability = 1 / (1 + (-logit).exp())
    return -probability.log() if match else -negative_weight * (1 - probability).log()


def explicit(
    distance: BaseDistance, pairs: list[Pair], query: Tensor, reference: Tensor, negative_weight: float = 1.0
) -> list[Tensor]:
    return [
        loss_of_pair(logit(distance, query[i], reference[j]), match, negative_weight).detach() for i, j, match in pairs
    ]


def explicit_of(distance: BaseDistance, arguments: tuple, pairs: list[Pair] | None = None) -> list[Tensor]:
    reference = arguments[3] if len(arguments) > 3 else arguments[0]
    return explicit(distance, all_pairs_of(arguments) if pairs is None else pairs, arguments[0], reference)


def all_pairs_of(arguments: tuple) -> list[Pair]:
    return all_pairs(arguments[1], arguments[4] if len(arguments) > 4 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative_weight", [1.0, 0.25, 3.0])
@EPISODE
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_over_all_pairs_it_is_the_mean_binary_cross_entropy(
    distance: partial, episode: bool, negative_weight: float, dtype: torch.dtype
) -> None:
    arguments = arguments_of(episode, dtype)
    got = PairVerificationLoss(distance, balanced=False, negative_weight=negative_weight)(*arguments)
    pairs = all_pairs_of(arguments)
    assert len(pairs) == 48 if episode else 56
    losses = explicit(distance(), pairs, arguments[0], arguments[3 if episode else 0], negative_weight)
    assert got.dtype == dtype
    assert_close(got, torch.stack(losses).mean())


@EPISODE
@pytest.mark.parametrize(
    "distance", [learned(), learned(1), CosineSimilarity(), LpDistance()], ids=lambda d: d._get_name()
)
def test_torchs_own_cross_entropy_agrees_in_value_and_gradient(distance: BaseDistance, episode: bool) -> None:
    outcomes = []
    for ours in (True, False):
        batch, labels, _, *support = arguments_of(episode)
        leaves = [leaf.requires_grad_() for leaf in (batch, *support[:1])]
        if ours:
            loss = PairVerificationLoss(distance, balanced=False, negative_weight=0.4)(batch, labels, None, *support)
        else:
            logits = distance(batch, leaves[-1]) * (1 if distance.is_inverted else -1)
            target = (labels.unsqueeze(1) == (support[1] if episode else labels)).double()
            weight = target + 0.4 * (1 - target)
            kept = torch.ones_like(target) if episode else 1 - torch.eye(8).double()
            each = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")
            loss = (each * kept).sum() / kept.sum()
        outcomes.append((loss, *torch.autograd.grad(loss, [*leaves, *distance.parameters()])))
    assert len(outcomes[0]) == 2 + episode + len(list(distance.parameters()))
    for got, expected in zip(*outcomes, strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(got, expected)


def test_hand_computed_value() -> None:
    # the similarity is 1 - |x - y|; items of class 0 at 0 and 3, of class 1 at 1: logits -2 (matching), 0 and -1
    similarity = WeightedL1Similarity(1).double()
    with torch.no_grad():
        similarity.score.bias.fill_(1)
    batch, labels = torch.tensor([[0.0], [3.0], [1.0]]).double(), torch.tensor([0, 0, 1])
    loss = PairVerificationLoss(similarity, balanced=False, negative_weight=0.5)(batch, labels)
    matching, first, second = math.log1p(math.exp(2)), math.log(2), math.log1p(math.exp(-1))
    assert loss.item() == pytest.approx((matching + 0.5 * (first + second)) / 3, rel=1e-12)


def test_default_is_the_learned_similarity_over_balanced_pairs() -> None:
    loss = PairVerificationLoss()
    assert type(loss.distance) is WeightedL1Similarity
    assert loss.distance.hidden is None
    assert (loss.balanced, loss.negative_weight) == (True, 1.0)
    batch = normal(8, DIMS, seed=1, dtype=torch.float32)
    assert loss(batch, LABELS) == PairVerificationLoss(WeightedL1Similarity(), True, 1.0, 0)(batch, LABELS)


@EPISODE
def test_negative_weight_counts_only_beside_the_others(episode: bool) -> None:
    arguments = arguments_of(episode)
    one, two, three = (
        PairVerificationLoss(learned(), balanced=False, negative_weight=w)(*arguments).item() for w in (1, 2, 3)
    )
    assert three - two == pytest.approx(two - one)
    others = sum(
        explicit(
            learned(), [p for p in all_pairs_of(arguments) if not p[2]], arguments[0], arguments[-2 if episode else 0]
        )
    )
    assert two - one == pytest.approx(others.item() / len(all_pairs_of(arguments)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    similarity = WeightedL1Similarity(1).to(dtype)
    with torch.no_grad():
        similarity.score.weight.fill_(1)
    batch = torch.tensor([[0.0], [5000.0], [-3000.0], [1.0]], dtype=dtype).requires_grad_()
    loss = PairVerificationLoss(similarity, balanced=False, reducer=SumReducer())(batch, torch.tensor([0, 0, 1, 1]))
    # matching pairs at logits 5000 and 3001 cost nothing; others cost their logits: 3000, 1, 8000, 4999, each twice
    expected = 2 * (3000 + math.log1p(math.e) + 8000 + 4999)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert torch.isfinite(batch.grad).all()
    slope = 1 / (1 + math.exp(-1))
    wanted = torch.tensor([[2 * (1 - slope)], [4.0], [-4.0], [2 * (slope - 1)]], dtype=dtype)
    torch.testing.assert_close(batch.grad, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        similarity.score.weight.fill_(-1)
    loss = PairVerificationLoss(similarity, balanced=False, reducer=SumReducer())(batch, torch.tensor([0, 0, 1, 1]))
    assert loss.item() == pytest.approx(2 * (5000 + 3001 + math.log1p(math.exp(-1))), rel=1e-6)


# --- balanced pairs ---------------------------------------------------------------------------------------------------


def drawn(loss: PairVerificationLoss, *arguments: Any) -> list[Pair]:
    """The pairs that a loss with the reducer that does nothing has used, in its order."""
    found = loss(*arguments)["loss"]
    labels, others = arguments[1], arguments[4] if len(arguments) > 4 else arguments[1]
    a, b = (index.tolist() for index in found["indices"])
    assert len(a) == len(b) == len(found["losses"])
    return [(i, j, bool(labels[i] == others[j])) for i, j in zip(a, b, strict=True)]


def listing(**options: Any) -> PairVerificationLoss:
    return PairVerificationLoss(learned(), reducer=DoNothingReducer(), **options)


@EPISODE
@pytest.mark.parametrize("seed", range(4))
def test_as_many_other_pairs_as_matching_ones_are_drawn(seed: int, episode: bool) -> None:
    arguments = arguments_of(episode)
    pairs, everything = drawn(listing(seed=seed), *arguments), all_pairs_of(arguments)
    matching = [pair for pair in everything if pair[2]]
    assert 0 < len(matching) < len(everything) / 3
    assert sum(pair[2] for pair in pairs) == len(matching)
    assert len(pairs) == 2 * len(matching)
    assert len(set(pairs)) == len(pairs)  # none twice
    assert set(pairs) <= set(everything)
    assert set(matching) <= set(pairs)
    assert [match for *_, match in pairs] == [True] * len(matching) + [False] * len(matching)  # matching ones first


@EPISODE
def test_as_many_matching_pairs_as_others_are_drawn_where_those_are_fewer(episode: bool) -> None:
    labels = torch.tensor([2, 2, 2, 2, 2, 1])
    batch, support = normal(6, DIMS, seed=1), (normal(6, DIMS, seed=2), labels.clone())
    arguments = (batch, labels, None, *support) if episode else (batch, labels)
    pairs, everything = drawn(listing(), *arguments), all_pairs_of(arguments)
    others = {pair for pair in everything if not pair[2]}
    assert len(others) == 10
    assert len(set(pairs)) == len(pairs) == 20
    assert others <= set(pairs) <= set(everything)
    assert drawn(listing(seed=1), *arguments) != pairs


@pytest.mark.parametrize("negative_weight", [1.0, 0.3])
@EPISODE
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_balanced_loss_is_the_mean_over_the_drawn_pairs(
    distance: partial, episode: bool, negative_weight: float
) -> None:
    arguments = arguments_of(episode)
    options = {"seed": 3, "negative_weight": negative_weight}
    pairs = drawn(PairVerificationLoss(distance, reducer=DoNothingReducer(), **options), *arguments)
    losses = explicit(distance(), pairs, arguments[0], arguments[3 if episode else 0], negative_weight)
    assert len(losses) == 2 * sum(match for *_, match in all_pairs_of(arguments))
    assert_close(PairVerificationLoss(distance, **options)(*arguments), torch.stack(losses).mean())


@pytest.mark.parametrize("fewer", [True, False], ids=["fewer matching", "fewer others"])
def test_every_pair_is_as_likely_as_any_other(fewer: bool) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2] if fewer else [0, 0, 0, 0, 0, 1])
    batch, loss = normal(6, DIMS), listing()
    counts = dict.fromkeys(all_pairs(labels), 0)
    for _ in range(400):
        for pair in drawn(loss, batch, labels):
            counts[pair] += 1
    assert all(count == 400 for pair, count in counts.items() if pair[2] == fewer)
    chosen = [count for pair, count in counts.items() if pair[2] != fewer]
    # 6 of 24 in each draw, or 10 of 20: 100 or 200 on average, with a standard deviation of 9 or 10
    assert len(chosen) == (24 if fewer else 20)
    average = 100 if fewer else 200
    assert average - 36 < min(chosen) <= max(chosen) < average + 36


def test_the_draws_are_fixed_by_the_seed_and_each_differs_from_the_last() -> None:
    arguments = arguments_of(False)
    sequences = {}
    for seed in (0, 0, 1):
        loss = listing(seed=seed)
        sequence = [drawn(loss, *arguments) for _ in range(5)]
        assert len({tuple(pairs) for pairs in sequence}) == 5
        assert sequences.setdefault(seed, sequence) == sequence
    assert sequences[0] != sequences[1]
    default = listing()
    assert [drawn(default, *arguments) for _ in range(5)] == sequences[0]


def test_the_draws_depend_on_which_items_share_a_class_only() -> None:
    batch, renamed = normal(8, DIMS, seed=1), {4: -1, 9: 2**40, 0: 5, 7: 6}
    others = torch.tensor([renamed[label] for label in LABELS.tolist()])
    assert drawn(listing(), batch, LABELS) == drawn(listing(), normal(8, DIMS, seed=7), others)


def test_drawing_leaves_the_global_generator_alone() -> None:
    arguments, losses = arguments_of(False), [listing(), listing()]
    with torch.random.fork_rng():
        torch.manual_seed(98)
        before = torch.get_rng_state()
        first = drawn(losses[0], *arguments)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert drawn(losses[1], *arguments) == first


def test_nothing_is_drawn_where_the_pairs_are_given() -> None:
    miner = MultiSimilarityMiner()
    for loss, arguments in (
        (listing(balanced=False), arguments_of(False)),
        (listing(), arguments_of(False, mined=miner(*arguments_of(False)[:2]))),
    ):
        before = loss.get_extra_state()
        loss(*arguments)
        assert torch.equal(loss.get_extra_state(), before)
    other = listing()
    other(*arguments_of(False))
    assert not torch.equal(other.get_extra_state(), before)


def test_the_next_draw_is_part_of_the_state() -> None:
    arguments, loss = arguments_of(False), listing(seed=5)
    for _ in range(3):
        loss(*arguments)
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    expected = [drawn(loss, *arguments) for _ in range(4)]
    other = listing(seed=77)
    other(*arguments)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert [drawn(other, *arguments) for _ in range(4)] == expected
    assert expected[0] != drawn(listing(seed=5), *arguments)  # the state was not that of the beginning


def test_a_state_that_was_kept_does_not_move_on_with_the_loss() -> None:
    arguments, loss = arguments_of(False), listing()
    state = loss.state_dict()
    expected = drawn(loss, *arguments)
    loss(*arguments)
    loss.load_state_dict(state)
    assert drawn(loss, *arguments) == expected


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["deepcopy", "pickle"]
)
def test_a_copy_draws_the_same_and_on_its_own(twin: Any) -> None:
    arguments, loss = arguments_of(False), listing()
    loss(*arguments)
    other = twin(loss)
    expected = [drawn(loss, *arguments) for _ in range(3)]
    assert [drawn(other, *arguments) for _ in range(3)] == expected
    with torch.no_grad():
        other.distance.score.bias.fill_(9)
    assert loss.distance.score.bias.item() == pytest.approx(0.3)


def test_the_similarity_is_part_of_the_state() -> None:
    arguments, loss = arguments_of(False, torch.float32), PairVerificationLoss(learned().float())
    other = PairVerificationLoss()  # which has seen no embeddings yet
    other.load_state_dict(loss.state_dict())
    assert other(*arguments) == loss(*arguments)


# --- a miner's pairs and triplets -------------------------------------------------------------------------------------

TRIPLETS = tuple(torch.tensor(x) for x in ([0, 1, 0], [2, 4, 5], [1, 0, 3]))
PAIRS = tuple(torch.tensor(x) for x in ([0, 0, 3], [2, 2, 7], [6, 1], [0, 3]))  # one of the matching ones twice


@pytest.mark.parametrize("balanced", [True, False])
def test_all_pairs_of_a_miner_are_used_as_often_as_it_names_them(balanced: bool) -> None:
    batch = normal(8, DIMS, seed=1)
    pairs = [(0, 2, True), (0, 2, True), (3, 7, True), (6, 0, False), (1, 3, False)]
    assert drawn(listing(balanced=balanced), batch, LABELS, PAIRS) == pairs
    losses = explicit(learned(), pairs, batch, batch, 0.5)
    got = PairVerificationLoss(learned(), balanced=balanced, negative_weight=0.5)(batch, LABELS, PAIRS)
    assert_close(got, torch.stack(losses).mean())


@pytest.mark.parametrize("balanced", [True, False])
def test_a_triplet_is_a_matching_pair_and_another(balanced: bool) -> None:
    batch = normal(8, DIMS, seed=1)
    pairs = [(0, 2, True), (1, 4, True), (0, 5, True), (0, 1, False), (1, 0, False), (0, 3, False)]
    assert drawn(listing(balanced=balanced), batch, LABELS, TRIPLETS) == pairs
    got = PairVerificationLoss(learned(), balanced=balanced)(batch, LABELS, TRIPLETS)
    assert_close(got, torch.stack(explicit(learned(), pairs, batch, batch)).mean())


def test_a_single_triplet_is_used() -> None:
    batch = normal(8, DIMS, seed=1)
    triplet = tuple(torch.tensor([i]) for i in (0, 2, 1))
    losses = explicit(learned(), [(0, 2, True), (0, 1, False)], batch, batch)
    assert_close(PairVerificationLoss(learned())(batch, LABELS, triplet), torch.stack(losses).mean())


@pytest.mark.parametrize("matching", [True, False])
def test_a_single_pair_is_used(matching: bool) -> None:
    batch, empty = normal(8, DIMS, seed=1), torch.zeros(0, dtype=torch.long)
    pair = (torch.tensor([0]), torch.tensor([2 if matching else 1]))
    given = (*pair, empty, empty) if matching else (empty, empty, *pair)
    (expected,) = explicit(learned(), [(0, 2, True) if matching else (0, 1, False)], batch, batch)
    assert_close(PairVerificationLoss(learned())(batch, LABELS, given), expected)


@pytest.mark.parametrize("kept", [0, 2])
def test_pairs_of_one_kind_only(kept: int) -> None:
    batch, empty = normal(8, DIMS, seed=1), torch.zeros(0, dtype=torch.long)
    given = tuple(PAIRS[i] if i in (kept, kept + 1) else empty for i in range(4))
    pairs = [(0, 2, True), (0, 2, True), (3, 7, True)] if kept == 0 else [(6, 0, False), (1, 3, False)]
    got = PairVerificationLoss(learned())(batch, LABELS, given)
    assert_close(got, torch.stack(explicit(learned(), pairs, batch, batch)).mean())


@pytest.mark.parametrize("length", [3, 4])
def test_a_miner_that_found_nothing_gives_zero_loss_and_gradient(length: int) -> None:
    batch = normal(8, DIMS, seed=1).requires_grad_()
    empty = tuple(torch.zeros(0, dtype=torch.long) for _ in range(length))
    loss = PairVerificationLoss(learned())(batch, LABELS, empty)
    loss.backward()
    assert loss.item() == 0
    assert not batch.grad.any()


MINERS = {
    "triplets": partial(TripletMarginMiner, margin=2.0),
    "multi-similarity": partial(MultiSimilarityMiner, epsilon=0.5),
    "batch-hard": BatchHardMiner,
    "easy-hard": BatchEasyHardMiner,
    "pair margin": partial(PairMarginMiner, pos_margin=0.5, neg_margin=-0.5),
    "hardest half": HDCMiner,
}


@EPISODE
@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS.keys())
def test_miners_of_pml_choose_the_pairs(miner: Any, episode: bool) -> None:
    arguments = arguments_of(episode)
    similarity = learned()
    mined = miner(distance=similarity)(*arguments[:2], *arguments[3:])
    a1, p, a2, n = (index.tolist() for index in (mined if len(mined) == 4 else (*mined[:2], mined[0], mined[2])))
    pairs = [*((i, j, True) for i, j in zip(a1, p, strict=True)), *((i, j, False) for i, j in zip(a2, n, strict=True))]
    assert set(pairs) <= set(all_pairs_of(arguments))
    assert len(a1) > 1
    assert len(a2) > 1
    mined_arguments = arguments_of(episode, mined=mined)
    assert drawn(listing(), *mined_arguments) == pairs
    got = PairVerificationLoss(similarity)(*mined_arguments)
    assert_close(got, torch.stack(explicit_of(similarity, arguments, pairs)).mean())


def test_a_miners_pairs_need_no_labels() -> None:
    batch = normal(8, DIMS, seed=1)
    loss = PairVerificationLoss(learned())
    assert loss(batch, None, TRIPLETS) == loss(batch, LABELS, TRIPLETS)


# --- episodes, and batches without pairs of one kind ------------------------------------------------------------------


def test_an_item_among_the_references_is_a_pair_with_itself() -> None:
    """Only where no references are given is an item no pair with itself."""
    batch = normal(3, DIMS, seed=1)
    labels = torch.tensor([1, 2, 3])
    got = PairVerificationLoss(learned(), balanced=False)(batch, labels, None, batch.clone(), labels.clone())
    pairs = all_pairs(labels, labels)
    assert sum(match for *_, match in pairs) == 3
    assert_close(got, torch.stack(explicit(learned(), pairs, batch, batch)).mean())


@pytest.mark.parametrize("balanced", [True, False])
def test_the_smallest_episode_has_a_loss(balanced: bool) -> None:
    """One query, 2 ways, 1 shot: a matching pair and another."""
    query, support = normal(1, DIMS, seed=1), normal(2, DIMS, seed=2)
    losses = explicit(learned(), [(0, 1, True), (0, 0, False)], query, support)
    got = PairVerificationLoss(learned(), balanced)(query, torch.tensor([5]), None, support, torch.tensor([8, 5]))
    assert_close(got, torch.stack(losses).mean())


@EPISODE
@pytest.mark.parametrize("labels", [torch.zeros(8).long(), torch.arange(8)], ids=["one class", "no matching pairs"])
def test_balanced_pairs_of_one_kind_only_are_none(labels: Tensor, episode: bool) -> None:
    batch = normal(8, DIMS, seed=1).requires_grad_()
    support = (None, normal(4, DIMS, seed=2), labels[:4] + (20 if labels[1] else 0)) if episode else ()
    loss = PairVerificationLoss(learned())(batch, labels, *support)
    loss.backward()
    assert loss.item() == 0
    assert not batch.grad.any()


@EPISODE
@pytest.mark.parametrize("labels", [torch.zeros(8).long(), torch.arange(8)], ids=["one class", "no matching pairs"])
def test_all_pairs_of_one_kind_only_have_their_loss(labels: Tensor, episode: bool) -> None:
    batch = normal(8, DIMS, seed=1)
    ref_labels = labels[:4] + (20 if labels[1] else 0)
    support = normal(4, DIMS, seed=2)
    arguments = (batch, labels, None, support, ref_labels) if episode else (batch, labels)
    got = PairVerificationLoss(learned(), balanced=False)(*arguments)
    pairs = all_pairs_of(arguments)
    assert len({match for *_, match in pairs}) == 1
    assert_close(got, torch.stack(explicit_of(learned(), arguments)).mean())


# --- every distance with every reducer and every regularizer ----------------------------------------------------------


def test_every_distance_of_pml_is_covered() -> None:
    assert exported(pml_distances, BaseDistance) == DISTANCES.keys() | NO_DISTANCE_OF_A_LOSS.keys()


def test_every_reducer_of_pml_is_covered() -> None:
    assert exported(pml_reducers, BaseReducer) == REDUCERS.keys() | NO_REDUCER_OF_THIS_LOSS.keys()


def test_every_regularizer_of_pml_is_covered() -> None:
    assert exported(pml_regularizers, BaseRegularizer) == REGULARIZERS.keys() | {BaseRegularizer}


def test_divisor_reducer_cannot_reduce_losses_without_a_divisor() -> None:
    with pytest.raises(KeyError, match="divisor"):
        PairVerificationLoss(learned(), reducer=DivisorReducer())(*arguments_of(False))


def reduce_by_hand(factory: partial, losses: list[Tensor], pairs: list[Pair], labels: Tensor) -> Tensor:
    """What each reducer of PML's manual does to a loss per pair; a pair is of its query's class."""
    if factory.func in (SumReducer, MultipleReducers):  # the latter is made with a sum
        return sum(losses)
    if factory.func is PerAnchorReducer:
        per_anchor = []
        for anchor in range(len(labels)):
            own = [loss for loss, pair in zip(losses, pairs, strict=True) if pair[0] == anchor]
            per_anchor.append(sum(own) / len(own))
        return sum(per_anchor) / (1 if "reducer" in factory.keywords else len(labels))
    if factory.func is ThresholdReducer:
        low, high = factory.keywords.get("low", -math.inf), factory.keywords.get("high", math.inf)
        kept = [x for x in losses if low < x < high]
        assert 0 < len(kept) < len(losses), "a threshold that leaves nothing or everything tests nothing"
        losses = kept
    if factory.func is ClassWeightedReducer:
        weights = factory.keywords["weights"]
        losses = [x * weights[labels[pair[0]]] for x, pair in zip(losses, pairs, strict=True)]
    return sum(losses) / len(losses)


@cache
def grid_losses(number: int, episode: bool) -> list[Tensor]:
    return explicit_of(ALL_DISTANCES[number](), arguments_of(episode))


@EPISODE
@pytest.mark.parametrize("reducer", ALL_REDUCERS, ids=name)
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_every_distance_with_every_reducer_and_regularizer(distance: partial, reducer: partial, episode: bool) -> None:
    """Every pair of the three kinds occurs: the regularizer moves on with the distance and with the reducer."""
    arguments, number = arguments_of(episode), ALL_DISTANCES.index(distance)
    losses, pairs = grid_losses(number, episode), all_pairs_of(arguments)
    regularizers = list(REGULARIZERS.values())
    for regularizer in (None, regularizers[(number + ALL_REDUCERS.index(reducer)) % len(regularizers)]):
        loss = PairVerificationLoss(
            distance, balanced=False, reducer=reducer, embedding_regularizer=regularizer, embedding_reg_weight=0.7
        )
        got = loss(*arguments)
        added = 0.7 * regularizer()(arguments[0]) if regularizer is not None else 0.0
        if reducer.func is DoNothingReducer:
            assert got["loss"]["reduction_type"] == "pos_pair"
            assert list(zip(*(index.tolist() for index in got["loss"]["indices"]), strict=True)) == [
                (i, j) for i, j, _ in pairs
            ]
            assert_close(got["loss"]["losses"], torch.stack(losses))
            assert got.keys() == {"loss", "embedding_reg_loss"} if regularizer else {"loss"}
            if regularizer is not None:
                assert_close(got["embedding_reg_loss"]["losses"], added)
            continue
        expected = reduce_by_hand(reducer, losses, pairs, arguments[1]) + added
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)  # class weights are float32


def test_parts_may_be_objects_classes_or_partials() -> None:
    arguments = arguments_of(False)
    values = [
        PairVerificationLoss(distance, reducer=reducer, embedding_regularizer=regularizer)(*arguments)
        for distance, reducer, regularizer in (
            (LpDistance(), SumReducer(), LpRegularizer()),
            (LpDistance, SumReducer, LpRegularizer),
            (partial(LpDistance, p=2), partial(SumReducer), partial(LpRegularizer)),
        )
    ]
    assert values[0] == values[1] == values[2]
    assert values[0] != PairVerificationLoss(LpDistance)(*arguments)


def test_statistics_are_kept_where_asked_for() -> None:
    loss = PairVerificationLoss(LpDistance(collect_stats=True), collect_stats=True)
    arguments = arguments_of(False)
    loss(*arguments)
    assert loss.collect_stats is True
    assert loss.distance.initial_avg_query_norm == pytest.approx(arguments[0].norm(dim=1).mean().item())
    assert PairVerificationLoss(collect_stats=False).collect_stats is False


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [True, False])
@EPISODE
@pytest.mark.parametrize("distance", ALL_DISTANCES, ids=name)
def test_gradient(distance: partial, episode: bool, balanced: bool) -> None:
    similarity = distance().double()
    batch, labels, _, *support = arguments_of(episode)

    def of(*leaves: Tensor) -> Tensor:
        loss = PairVerificationLoss(similarity, balanced, 0.6, seed=4)  # anew, for the same draw each time
        parameters = {f"distance.{key}": value for (key, _), value in zip(named, leaves, strict=False)}
        data = leaves[len(named) :]
        return torch.func.functional_call(loss, parameters, (data[0], labels, None, *data[1:], *support[1:]))

    named = list(similarity.named_parameters())
    assert len(named) == (2 if distance.func is WeightedL1Similarity else 0)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (*(p for _, p in named), batch, *support[:1])]
    assert torch.autograd.gradcheck(of, leaves, fast_mode=True)


@EPISODE
def test_all_that_is_compared_gets_a_gradient(episode: bool) -> None:
    similarity = learned()
    batch, labels, _, *support = arguments_of(episode)
    leaves = [leaf.requires_grad_() for leaf in (batch, *support[:1])]
    loss = PairVerificationLoss(similarity, balanced=False)(batch, labels, None, *support)
    for gradient in torch.autograd.grad(loss, [*leaves, *similarity.parameters()]):
        assert (gradient != 0).all()


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative_weight", [0, -1.0, float("nan")])
def test_negative_weight_must_be_above_zero(negative_weight: float) -> None:
    with pytest.raises(ValueError, match=rf"expected negative_weight above 0, got {negative_weight}; "):
        PairVerificationLoss(negative_weight=negative_weight)


@pytest.mark.parametrize("balanced", [True, False])
def test_labels_or_a_miners_pairs_are_required(balanced: bool) -> None:
    with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
        PairVerificationLoss(balanced=balanced)(normal(4, 3))


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="reducr"):
        PairVerificationLoss(reducr=MeanReducer())


def test_embeddings_of_another_width_raise() -> None:
    with pytest.raises(ValueError, match="expected embeddings of 5 dimensions"):
        PairVerificationLoss(learned())(normal(8, 4), LABELS)


def test_labels_of_another_length_raise() -> None:
    with pytest.raises(ValueError, match="must equal number of labels"):
        PairVerificationLoss(learned())(normal(8, DIMS), LABELS[:5])


# --- as a part of PML's own machinery ---------------------------------------------------------------------------------


def test_inputs_stay_as_they_are() -> None:
    batch, labels = normal(8, DIMS, seed=1), LABELS.clone()
    pairs = tuple(index.clone() for index in PAIRS)
    PairVerificationLoss(learned())(batch, labels)
    PairVerificationLoss(learned())(batch, labels, pairs)
    assert torch.equal(batch, normal(8, DIMS, seed=1))
    assert torch.equal(labels, LABELS)
    assert all(torch.equal(index, given) for index, given in zip(pairs, PAIRS, strict=True))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # PML's progress bar does
def test_trains_in_the_trainer_of_pml_with_weights_that_are_made_on_the_way() -> None:
    torch.manual_seed(0)
    images, labels = normal(16, 6, dtype=torch.float32), torch.arange(4).repeat(4)
    trunk, loss = nn.Linear(6, 3), PairVerificationLoss(balanced=False)
    before = trunk.weight.detach().clone()
    trainer = MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD([*trunk.parameters(), *loss.parameters()], lr=0.05)},
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
    trainer.train(num_epochs=3)
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert not torch.equal(trunk.weight, before)
    assert (loss.distance.score.weight != -(3**-0.5)).all()
    assert loss.distance.score.bias != 0


def test_training_learns_which_dimension_tells_classes_apart_and_from_where_on() -> None:
    """Class in dimension 0, noise in dimension 1: the first weight falls, the bias rises, and 0 parts the pairs."""
    labels = torch.arange(4).repeat_interleave(6)
    batch = torch.stack([3.0 * labels, normal(24, dtype=torch.float32)], dim=1)
    loss = PairVerificationLoss()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(batch, labels).backward()
        optimizer.step()
    weight, bias = loss.distance.score.weight.tolist(), loss.distance.score.bias.item()
    assert weight[0] < -1.5
    assert weight[1] > -0.5
    assert bias > 1
    logits = loss.distance(batch)
    assert torch.equal(logits > 0, labels.unsqueeze(1) == labels)


def test_counts_among_multiple_losses() -> None:
    batch, labels, _ = arguments_of(False)
    parts = MultipleLosses(
        [PairVerificationLoss(learned()), PairVerificationLoss(CosineSimilarity())], weights=[1, 0.5]
    )
    expected = PairVerificationLoss(learned())(batch, labels)
    expected = expected + 0.5 * PairVerificationLoss(CosineSimilarity())(batch, labels)
    assert_close(parts(batch, labels), expected)
