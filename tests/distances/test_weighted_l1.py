"""WeightedL1Similarity against its formula written out, and in every part of PML and of this package that takes it."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from pml_fewshot.distances import weighted_l1
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity, WeightedSum
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    mean_similarity,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
)
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss

DIMS, HIDDEN = 5, 4
DTYPES = [torch.float32, torch.float64]
FORMS = pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["sum", "mlp"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(hidden: int | None, dtype: torch.dtype = torch.float64, dim: int = DIMS) -> WeightedL1Similarity:
    """One with weights of both signs and a bias, as after a training."""
    similarity = WeightedL1Similarity(dim, hidden).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(similarity.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=50 + number))
    first = next(similarity.parameters())
    assert (first > 0).any()
    assert (first < 0).any()
    return similarity


def written_out(similarity: WeightedL1Similarity, query: list[float], reference: list[float]) -> float:
    """The formula in Python's own numbers."""
    state = {name: value.double().tolist() for name, value in similarity.state_dict().items()}
    differences = [abs(q - r) for q, r in zip(query, reference, strict=True)]

    if similarity.hidden is None:
        return sum(w * x for w, x in zip(state["score.weight"], differences, strict=True)) + state["score.bias"]
    rows, biases = state["score.first.weight"], state["score.first.bias"]
    sums = [sum(w * x for w, x in zip(row, differences, strict=True)) for row in rows]
    hidden = [max(total + bias, 0.0) for total, bias in zip(sums, biases, strict=True)]
    return sum(w * x for w, x in zip(state["score.last.weight"], hidden, strict=True)) + state["score.last.bias"]


def matrix_written_out(similarity: WeightedL1Similarity, query: Tensor, reference: Tensor) -> Tensor:
    rows = [[written_out(similarity, q, r) for r in reference.tolist()] for q in query.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


class Written(BaseDistance):
    """The same formula by (B, R, D) differences, on the same weights: a second similarity for PML's losses."""

    def __init__(self, similarity: WeightedL1Similarity) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True)
        self.score = similarity.score

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        differences = (query_emb[:, None, :] - ref_emb[None, :, :]).abs()
        if isinstance(self.score, WeightedSum):
            return (differences * self.score.weight).sum(dim=2) + self.score.bias
        hidden = (differences @ self.score.first.weight.T + self.score.first.bias).clamp(min=0)
        return (hidden * self.score.last.weight).sum(dim=2) + self.score.last.bias


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, DIMS])
@FORMS
def test_each_score_is_the_weighted_sum_or_the_mlp_of_the_absolute_differences(
    hidden: int | None, dim: int, dtype: torch.dtype
) -> None:
    similarity = trained(hidden, dtype, dim) if dim > 1 else WeightedL1Similarity(1, hidden).to(dtype)
    query, reference = normal(6, dim, seed=1, dtype=dtype), normal(4, dim, seed=2, dtype=dtype)
    got = similarity(query, reference)
    assert got.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    expected = matrix_written_out(similarity, query, reference)
    assert got.shape == (6, 4)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol)


def test_hand_computed_values() -> None:
    similarity = WeightedL1Similarity(3).double()
    with torch.no_grad():
        similarity.score.weight.copy_(torch.tensor([-1.0, 2.0, 0.0]))
        similarity.score.bias.fill_(0.5)
    query, reference = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[4.0, 0.0, 9.0], [1.0, 2.0, 7.0]])
    # -3 + 4 + 0.5, and the bias where only the third dimension differs
    torch.testing.assert_close(similarity(query, reference.double()), torch.tensor([[1.5, 0.5]]).double())


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_one_sign_only(sign: int) -> None:
    similarity = trained(None)
    with torch.no_grad():
        similarity.score.weight.abs_().mul_(sign)
    query, reference = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)
    got = similarity(query, reference)
    torch.testing.assert_close(got, matrix_written_out(similarity, query, reference))
    farther = similarity(query, query[0] + 10 * (reference - query[0]))[0]
    assert ((farther > got[0]) == (sign > 0)).all()


@pytest.mark.parametrize("dim", [1, 4, 100])
def test_untrained_it_ranks_as_the_city_block_distance(dim: int) -> None:
    query, reference = normal(6, dim, seed=1), normal(9, dim, seed=2)
    similarity, distance = WeightedL1Similarity(), LpDistance(p=1, normalize_embeddings=False)
    got, blocks = similarity(query, reference), distance(query, reference)
    torch.testing.assert_close(got, -blocks / dim**0.5, rtol=1e-6, atol=1e-7)
    assert torch.equal(got.argsort(dim=1, descending=True), blocks.argsort(dim=1))
    assert similarity.score.bias.item() == 0


def test_untrained_logits_are_of_the_order_of_the_root_of_the_dimensions() -> None:
    for dim in (16, 256):
        logits = WeightedL1Similarity()(normal(50, dim, seed=1), normal(50, dim, seed=2))
        assert -logits.mean().item() / dim**0.5 == pytest.approx(2 / math.pi**0.5, rel=0.05)


@FORMS
def test_it_is_symmetric_and_each_item_scores_the_same_with_itself(hidden: int | None) -> None:
    similarity = trained(hidden)
    query, reference = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)
    torch.testing.assert_close(similarity(query, reference), similarity(reference, query).T, rtol=1e-13, atol=1e-13)
    own = similarity(query)
    torch.testing.assert_close(own, own.T, rtol=1e-13, atol=1e-13)
    zeros = [0.0] * DIMS
    torch.testing.assert_close(own.diagonal(), torch.full((6,), written_out(similarity, zeros, zeros)).double())


@FORMS
def test_without_references_queries_are_compared_among_themselves(hidden: int | None) -> None:
    similarity, query = trained(hidden), normal(6, DIMS, seed=1)
    torch.testing.assert_close(similarity(query), matrix_written_out(similarity, query, query))


@FORMS
def test_a_shift_of_all_changes_nothing(hidden: int | None) -> None:
    similarity = trained(hidden)
    query, reference, shift = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2), normal(1, DIMS, seed=3)
    torch.testing.assert_close(similarity(query + shift, reference + shift), similarity(query, reference))


@FORMS
def test_pairwise_distance_is_the_matrix_diagonal(hidden: int | None) -> None:
    similarity = trained(hidden)
    query, reference = normal(6, DIMS, seed=1), normal(6, DIMS, seed=2)
    got = similarity.pairwise_distance(query, reference)
    assert got.shape == (6,)
    torch.testing.assert_close(got, similarity(query, reference).diagonal())


def test_it_is_a_similarity_of_embeddings_as_they_are() -> None:
    similarity = trained(None)
    assert similarity.is_inverted
    assert not similarity.normalize_embeddings
    near, far = similarity.smallest_dist(torch.tensor(1.0), torch.tensor(2.0)), torch.tensor(2.0)
    assert near == far  # the larger is the nearer


@FORMS
def test_no_queries_or_no_references_give_an_empty_matrix(hidden: int | None) -> None:
    similarity = trained(hidden)
    some, none = normal(3, DIMS), normal(0, DIMS)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert similarity(none, some).shape == (0, 3)
            assert similarity(some, none).shape == (3, 0)


@FORMS
def test_inputs_and_weights_stay_as_they_are(hidden: int | None) -> None:
    similarity = trained(hidden)
    before = {name: value.clone() for name, value in similarity.state_dict().items()}
    query, reference = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)
    similarity(query, reference)
    assert torch.equal(query, normal(6, DIMS, seed=1))
    assert torch.equal(reference, normal(4, DIMS, seed=2))
    assert all(torch.equal(value, before[name]) for name, value in similarity.state_dict().items())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairwise", [False, True], ids=["matrix", "pairwise"])
@FORMS
def test_gradients_of_weights_biases_and_both_embeddings(hidden: int | None, pairwise: bool) -> None:
    similarity = trained(hidden)
    named = [name for name, _ in similarity.named_parameters()]
    assert len(named) == (2 if hidden is None else 4)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.similarity = similarity

        def forward(self, query: Tensor, reference: Tensor) -> Tensor:
            return (self.similarity.pairwise_distance if pairwise else self.similarity)(query, reference)

    def of(query: Tensor, reference: Tensor, *values: Tensor) -> Tensor:
        parameters = {f"similarity.{name}": value for name, value in zip(named, values, strict=True)}
        return torch.func.functional_call(Call(), parameters, (query, reference))

    count = 4 if pairwise else 3
    leaves = [
        normal(4, DIMS, seed=1),
        normal(count, DIMS, seed=2),
        *(p.detach().clone() for p in similarity.parameters()),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(of, leaves)
    gradients = torch.autograd.grad(of(*leaves).sum(), leaves)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


@FORMS
def test_equal_embeddings_have_a_finite_gradient(hidden: int | None) -> None:
    similarity, query = trained(hidden), normal(1, DIMS, seed=1).repeat(3, 1).requires_grad_()
    similarity(query).sum().backward()
    assert torch.isfinite(query.grad).all()
    assert not query.grad.any()


# --- weights that are made on first use -------------------------------------------------------------------------------


@FORMS
def test_the_width_is_taken_from_the_first_embeddings(hidden: int | None) -> None:
    for first_use in (
        lambda similarity: similarity(normal(2, 7, dtype=torch.float32)),
        lambda similarity: similarity.pairwise_distance(*normal(2, 3, 7, dtype=torch.float32)),
        lambda similarity: similarity.initialize(normal(2, 7, dtype=torch.float32)),
    ):
        similarity = WeightedL1Similarity(hidden=hidden)
        first_use(similarity)
        if hidden is None:
            assert torch.equal(similarity.score.weight, torch.full((7,), 7**-0.5).neg())
            assert similarity.score.bias.item() == 0
        else:
            assert type(similarity.score.first) is nn.Linear
            assert similarity.score.first.weight.shape == (hidden, 7)


@FORMS
def test_the_first_embeddings_give_nothing_but_their_width_away(hidden: int | None) -> None:
    states = []
    for embeddings in (normal(2, DIMS, seed=1, dtype=torch.float32), 100 + normal(30, DIMS, seed=2).float()):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            similarity = WeightedL1Similarity(hidden=hidden)
            similarity(embeddings)
        states.append(similarity.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_given_the_width_it_is_as_if_first_used_with_it() -> None:
    given, used = WeightedL1Similarity(DIMS), WeightedL1Similarity()
    used(normal(2, DIMS, dtype=torch.float32))
    for name, value in given.state_dict().items():
        assert torch.equal(value, used.state_dict()[name])


def test_the_mlp_begins_with_torchs_own_layer_and_a_sum_of_its_units() -> None:
    """Its first layer not at zero, where hidden units would stay alike, and no larger than 1 / sqrt(inputs)."""
    first, _, last = WeightedL1Similarity(100, hidden=50).score
    assert first.weight.abs().max() <= 100**-0.5
    assert first.weight.std().item() == pytest.approx(300**-0.5, rel=0.3)
    assert torch.equal(last.weight, torch.full((50,), 50**-0.5).neg())
    assert first.weight.shape == (50, 100)


@FORMS
def test_pmls_record_keeper_can_record_the_weights(hidden: int | None) -> None:
    """It takes a matrix of one row for a number, and makes tables of the names, which must not begin with a digit."""
    for name, parameter in WeightedL1Similarity(DIMS, hidden).named_parameters():
        assert parameter.ndim < 2 or len(parameter) > 1
        assert not any(part[0].isdigit() for part in name.split("."))


@FORMS
def test_what_was_initialized_is_not_initialized_again(hidden: int | None) -> None:
    similarity = trained(hidden)
    before = {name: value.clone() for name, value in similarity.state_dict().items()}
    similarity.initialize(normal(2, DIMS))
    similarity.initialize(normal(9, DIMS))
    assert all(torch.equal(value, before[name]) for name, value in similarity.state_dict().items())


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1), torch.optim.Adam, torch.optim.AdamW])
@FORMS
def test_an_optimizer_made_before_the_first_use_trains_the_weights(
    hidden: int | None, make: Callable[..., Any]
) -> None:
    similarity = WeightedL1Similarity(hidden=hidden)
    optimizer = make(similarity.parameters())
    query, reference = normal(6, DIMS, seed=1, dtype=torch.float32), normal(4, DIMS, seed=2, dtype=torch.float32)
    with torch.no_grad():
        before = similarity(query, reference)
    twin = copy.deepcopy(similarity)
    late = make(twin.parameters())
    for each, its_optimizer in ((similarity, optimizer), (twin, late)):
        for _ in range(3):
            its_optimizer.zero_grad()
            each(query, reference).exp().sum().backward()
            its_optimizer.step()
    assert (similarity(query, reference) != before).all()
    for name, value in similarity.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@FORMS
def test_weights_made_where_no_gradient_is_wanted_still_train(hidden: int | None, context: Any) -> None:
    similarity = WeightedL1Similarity(hidden=hidden)
    with context():
        similarity(normal(3, DIMS, dtype=torch.float32))
    similarity(normal(3, DIMS, dtype=torch.float32)).sum().backward()
    for name, parameter in similarity.named_parameters():
        assert parameter.grad is not None, name
    assert next(similarity.parameters()).grad.any()


@FORMS
def test_a_module_turned_to_float64_before_its_first_use(hidden: int | None) -> None:
    similarity = WeightedL1Similarity(hidden=hidden).double()
    query, reference = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)
    got = similarity(query, reference)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, matrix_written_out(similarity, query, reference))


FIRST_USES: dict[str, Callable[[WeightedL1Similarity, Tensor, Tensor], Tensor]] = {
    "matrix": lambda similarity, query, reference: similarity(query[0], reference[0]),
    "pairwise": lambda similarity, query, reference: similarity.pairwise_distance(query[0, :3], reference[0, :3]),
    "vmap": lambda similarity, query, reference: torch.vmap(similarity)(query, reference),
    "head": lambda similarity, query, reference: nearest_neighbour(reference.unsqueeze(2), query, similarity),
}


@pytest.mark.parametrize("way", FIRST_USES)
@FORMS
def test_a_state_loads_into_one_that_has_seen_no_embeddings(hidden: int | None, way: str) -> None:
    similarity = trained(hidden, torch.float32)
    buffer = io.BytesIO()
    torch.save(similarity.state_dict(), buffer)
    buffer.seek(0)
    fresh = WeightedL1Similarity(hidden=hidden)
    parameters = list(fresh.parameters())  # an optimizer would hold these
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    query, reference = normal(2, 4, DIMS, seed=1, dtype=torch.float32), normal(2, 3, DIMS, seed=2, dtype=torch.float32)
    assert torch.equal(FIRST_USES[way](fresh, query, reference), FIRST_USES[way](similarity, query, reference))
    for name, value in similarity.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    fresh(query[0], reference[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert all(mine is held for mine, held in zip(fresh.parameters(), parameters, strict=True))


@FORMS
def test_states_load_into_any_of_the_same_form_and_width(hidden: int | None) -> None:
    similarity, query = trained(hidden, torch.float32), normal(3, DIMS, dtype=torch.float32)
    for other in (WeightedL1Similarity(DIMS, hidden), trained(hidden, torch.float32)):
        with torch.no_grad():
            next(other.parameters()).add_(1)
        other.load_state_dict(similarity.state_dict())
        assert torch.equal(other(query), similarity(query))
    twice = WeightedL1Similarity(hidden=hidden)
    for _ in range(2):
        twice.load_state_dict(similarity.state_dict())
    assert torch.equal(twice(query), similarity(query))
    empty = WeightedL1Similarity(hidden=hidden)
    empty.load_state_dict(WeightedL1Similarity(hidden=hidden).state_dict())  # neither has seen any
    assert empty(query).shape == (3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        WeightedL1Similarity(DIMS + 1, hidden).load_state_dict(similarity.state_dict())


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("stage", ["unused", "used", "loaded"])
@FORMS
def test_copies_are_equal_and_on_their_own(hidden: int | None, stage: str, twin: Any) -> None:
    source, query = trained(hidden, torch.float32), normal(3, DIMS, dtype=torch.float32)
    similarity = source if stage == "used" else WeightedL1Similarity(hidden=hidden)
    if stage == "loaded":
        similarity.load_state_dict(source.state_dict())
    other = twin(similarity)
    got = other(query)
    if stage == "unused":
        assert any(is_lazy(parameter) for parameter in similarity.parameters())
        assert similarity(normal(2, DIMS + 2, dtype=torch.float32)).shape == (2, 2)  # another width than its copy
        if hidden is None:
            torch.testing.assert_close(got, WeightedL1Similarity(DIMS)(query))
    else:
        assert torch.equal(got, source(query))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(similarity(query), got)


# --- vmap, over episodes ----------------------------------------------------------------------------------------------


@FORMS
def test_vmap_is_a_loop_in_value_and_gradient(hidden: int | None) -> None:
    similarity = trained(hidden)
    query, reference = normal(3, 6, DIMS, seed=1).requires_grad_(), normal(3, 4, DIMS, seed=2).requires_grad_()
    leaves = [query, reference, *similarity.parameters()]
    mapped = torch.vmap(similarity)(query, reference)
    loop = torch.stack([similarity(q, r) for q, r in zip(query, reference, strict=True)])
    torch.testing.assert_close(mapped, loop)
    for got, expected in zip(
        *(torch.autograd.grad(values.sin().sum(), leaves) for values in (mapped, loop)), strict=True
    ):
        torch.testing.assert_close(got, expected)
    shared = torch.vmap(similarity, in_dims=(0, None))(query, reference[0])
    torch.testing.assert_close(shared, torch.stack([similarity(q, reference[0]) for q in query]))


@FORMS
def test_first_use_within_vmap(hidden: int | None) -> None:
    """The heads compare all episodes at once by vmap, which allows nothing random unless told to."""
    similarity = WeightedL1Similarity(hidden=hidden)
    query, support = normal(3, 6, DIMS, seed=1, dtype=torch.float32), normal(3, 4, 2, DIMS, seed=2).float()
    logits = nearest_neighbour(support, query, similarity)
    each = [matrix_written_out(similarity, q, s.flatten(0, 1)) for q, s in zip(query, support, strict=True)]
    expected = torch.stack(each).unflatten(2, (4, 2)).amax(dim=3)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    similarity(query[0]).sum().backward()  # and the weights are ordinary ones
    assert next(similarity.parameters()).grad is not None


@FORMS
def test_first_use_within_a_vmap_that_allows_what_is_random(hidden: int | None) -> None:
    similarity = WeightedL1Similarity(hidden=hidden)
    query, reference = normal(3, 6, DIMS, seed=1, dtype=torch.float32), normal(3, 4, DIMS, seed=2).float()
    mapped = torch.vmap(similarity, randomness="same")(query, reference)
    torch.testing.assert_close(mapped, torch.stack([similarity(q, r) for q, r in zip(query, reference, strict=True)]))


@FORMS
def test_initialized_by_hand_it_can_be_mapped(hidden: int | None) -> None:
    similarity = WeightedL1Similarity(hidden=hidden)
    query, reference = normal(3, 6, DIMS, seed=1, dtype=torch.float32), normal(3, 4, DIMS, seed=2).float()
    similarity.initialize(query[0])
    mapped = torch.vmap(similarity)(query, reference)
    torch.testing.assert_close(mapped, torch.stack([similarity(q, r) for q, r in zip(query, reference, strict=True)]))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "rows"),
    [(1, 1), (4 * DIMS, 1), (8 * DIMS, 2), (13 * DIMS, 3), (4 * DIMS * 7, 7), (10**6, 7)],
)
def test_blocks_of_the_mlp_give_what_one_gives(block: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, query, reference = trained(HIDDEN), normal(7, DIMS, seed=1), normal(4, DIMS, seed=2)
    expected = similarity(query, reference).detach()
    monkeypatch.setattr(weighted_l1, "BLOCK", block)
    seen: list[int] = []
    similarity.score.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(similarity(query, reference), expected, rtol=1e-12, atol=1e-12)
    assert seen == [min(rows, 7 - start) for start in range(0, 7, rows)]
    with torch.no_grad():
        batched = torch.vmap(similarity)(query.repeat(2, 1, 1), reference.repeat(2, 1, 1))
    torch.testing.assert_close(batched, expected.repeat(2, 1, 1), rtol=1e-12, atol=1e-12)


def test_blocks_count_the_wider_of_embeddings_and_hidden_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = WeightedL1Similarity(DIMS, hidden=20)
    monkeypatch.setattr(weighted_l1, "BLOCK", 3 * 4 * 20)
    seen: list[int] = []
    wide.score.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        wide(normal(7, DIMS, dtype=torch.float32), normal(4, DIMS, seed=1, dtype=torch.float32))
    assert seen == [3, 3, 1]


def test_where_a_gradient_is_wanted_the_mlp_takes_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = trained(HIDDEN)
    monkeypatch.setattr(weighted_l1, "BLOCK", 1)
    seen: list[int] = []
    similarity.score.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    similarity(normal(7, DIMS), normal(4, DIMS))
    assert seen == [7]


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def test_the_weighted_sum_never_holds_all_differences() -> None:
    similarity, query, reference = trained(None, dim=16), normal(20, 16, seed=1), normal(30, 16, seed=2)
    query.requires_grad_()
    with Largest() as largest:
        similarity(query, reference).sum().backward()
    assert 20 * 30 <= largest.elements < 20 * 30 * 16 / 4
    with Largest() as largest, torch.no_grad():
        Written(similarity)(query, reference)
    assert largest.elements == 20 * 30 * 16  # which this way of counting would have seen


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -3, True, 2.0])
@pytest.mark.parametrize("name", ["dim", "hidden"])
def test_sizes_are_integers_of_at_least_one(name: str, size: object) -> None:
    with pytest.raises(ValueError, match=f"expected {name} to be an integer of at least 1, got {size}"):
        WeightedL1Similarity(**{name: size})


WRONG = r"expected embeddings of 5 dimensions, as this similarity has weights for, got {}; use the embedder"


@pytest.mark.parametrize("way", ["made", "used", "loaded", "loaded and used"])
@FORMS
def test_embeddings_of_another_width_are_refused(hidden: int | None, way: str) -> None:
    similarity = WeightedL1Similarity(DIMS if way == "made" else None, hidden)
    if "loaded" in way:
        similarity.load_state_dict(trained(hidden, torch.float32).state_dict())
    if "used" in way:
        similarity(normal(2, DIMS, dtype=torch.float32))
    for width in (1, 4, 6):
        other = normal(3, width, dtype=torch.float32)
        for call in (similarity, similarity.pairwise_distance):
            with pytest.raises(ValueError, match=WRONG.format(width)):
                call(other, other)
    assert similarity(normal(2, DIMS, dtype=torch.float32)).shape == (2, 2)  # it has taken no harm


@pytest.mark.parametrize("width", [1, 4, 6])  # a width of 1 would be compared with every dimension
@FORMS
def test_references_of_another_width_are_refused(hidden: int | None, width: int) -> None:
    similarity = trained(hidden)
    with pytest.raises(ValueError, match=WRONG.format(width)):
        similarity(normal(3, DIMS), normal(3, width))
    with pytest.raises(ValueError, match=WRONG.format(width)):
        similarity.pairwise_distance(normal(3, DIMS), normal(3, width))


def test_embeddings_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="2D tensor"):
        trained(None)(normal(2, 3, DIMS))


# --- in the losses and miners of PML ----------------------------------------------------------------------------------

LABELS = torch.tensor([1, 0, 1, 2, 2, 0, 1, 2])
REF_LABELS = torch.tensor([0, 1, 2, 2, 1, 0])

# every loss that PML exports: those that take this similarity, and why the others do not
LOSSES: dict[type, list[dict[str, Any]]] = {
    pml_losses.ContrastiveLoss: [{"pos_margin": 1, "neg_margin": -2}],
    pml_losses.GeneralizedLiftedStructureLoss: [{}],
    pml_losses.IntraPairVarianceLoss: [{}],
    pml_losses.LiftedStructureLoss: [{}],
    pml_losses.MarginLoss: [{"beta": 0.0}, {"beta": -1.0, "nu": 0.1, "learn_beta": True}],
    pml_losses.MultiSimilarityLoss: [{"beta": 5}],
    pml_losses.NCALoss: [{}, {"softmax_scale": 0.3}],
    pml_losses.NPairsLoss: [{}],
    pml_losses.NTXentLoss: [{"temperature": 2.0}],
    pml_losses.SupConLoss: [{"temperature": 2.0}],
    pml_losses.TripletMarginLoss: [{"margin": 1.0}, {"swap": True, "margin": 1.0}, {"smooth_loss": True}],
}
OWN_COSINE = "insists on cosine similarity"
OWN_EUCLID = "insists on normalised Euclid"
OWN_WEIGHTS = "compares embeddings with weights of its own, one for each class: no pairs"
NO_DISTANCE = "a base class, a mixin or a wrapper, or takes no distance"
OTHER_LOSSES: dict[type, str] = {
    pml_losses.AngularLoss: OWN_EUCLID,
    pml_losses.CircleLoss: OWN_COSINE,
    pml_losses.DynamicSoftMarginLoss: OWN_EUCLID,
    pml_losses.FastAPLoss: OWN_EUCLID,
    pml_losses.InstanceLoss: OWN_COSINE,
    pml_losses.PNPLoss: OWN_COSINE,
    pml_losses.SignalToNoiseRatioContrastiveLoss: "insists on the SNR distance",
    pml_losses.SmoothAPLoss: OWN_COSINE,
    pml_losses.ThresholdConsistentMarginLoss: OWN_COSINE,
    pml_losses.TupletMarginLoss: OWN_COSINE,
    pml_losses.RankedListLoss: "takes a smaller value for nearer, also of a similarity",
    pml_losses.HistogramLoss: "bins similarities between -1 and 1",
    **dict.fromkeys(
        (
            pml_losses.ArcFaceLoss,
            pml_losses.CosFaceLoss,
            pml_losses.LargeMarginSoftmaxLoss,
            pml_losses.ManifoldLoss,
            pml_losses.NormalizedSoftmaxLoss,
            pml_losses.P2SGradLoss,
            pml_losses.ProxyAnchorLoss,
            pml_losses.ProxyNCALoss,
            pml_losses.SoftTripleLoss,
            pml_losses.SphereFaceLoss,
            pml_losses.SubCenterArcFaceLoss,
        ),
        OWN_WEIGHTS,
    ),
    **dict.fromkeys(
        (
            pml_losses.BaseLossWrapper,
            pml_losses.BaseMetricLossFunction,
            pml_losses.CrossBatchMemory,
            pml_losses.EmbeddingRegularizerMixin,
            pml_losses.GenericPairLoss,
            pml_losses.MultipleLosses,
            pml_losses.SelfSupervisedLoss,
            pml_losses.VICRegLoss,
            pml_losses.WeightRegularizerMixin,
        ),
        NO_DISTANCE,
    ),
}
OUR_LOSSES: dict[type, list[dict[str, Any]]] = {
    DenseNTXentLoss: [{"temperature": 2.0}],
    DenseTripletMarginLoss: [{"margin": 1.0}],
    MatchingLoss: [{}],
    PairVerificationLoss: [{}, {"balanced": False}],
    PrototypicalLoss: [{}],
}
ALL_LOSSES = [partial(kind, **options) for kind, forms in (LOSSES | OUR_LOSSES).items() for options in forms]


def classes_of(module: object) -> set[type]:
    return {kind for kind in vars(module).values() if inspect.isclass(kind)}


def test_every_loss_of_pml_is_covered() -> None:
    assert classes_of(pml_losses) == LOSSES.keys() | OTHER_LOSSES.keys()


@pytest.mark.parametrize(
    "kind", [k for k, why in OTHER_LOSSES.items() if why.startswith("insists")], ids=lambda k: k.__name__
)
def test_losses_that_insist_on_a_distance_refuse_this_one(kind: type) -> None:
    with pytest.raises(AssertionError, match="requires"):
        kind(distance=WeightedL1Similarity())


def outcome(factory: partial, distance: BaseDistance, episode: bool, mined: Any = None) -> list[Tensor]:
    """Value of a loss with a similarity, and its gradients to all that the similarity is made of."""
    leaves = [normal(8, DIMS, seed=1).requires_grad_()]
    support = ()
    if episode:
        leaves.append(normal(6, DIMS, seed=2).requires_grad_())
        support = (leaves[1], REF_LABELS)
    loss = factory(distance=distance)
    value = loss(leaves[0], LABELS, mined, *support)
    parameters = [parameter for parameter in distance.parameters() if parameter.requires_grad]
    return [value, *torch.autograd.grad(value, [*leaves, *parameters])]


def name(factory: partial) -> str:
    return f"{factory.func.__name__}({','.join(f'{k}={v}' for k, v in factory.keywords.items())})"


@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
@FORMS
@pytest.mark.parametrize("factory", ALL_LOSSES, ids=name)
def test_losses_are_those_of_the_formula_in_value_and_gradient(
    factory: partial, hidden: int | None, episode: bool
) -> None:
    similarity = trained(hidden)
    if episode and factory.func is pml_losses.NPairsLoss:  # PML gives it none
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            outcome(factory, similarity, episode)
        return
    got, expected = (outcome(factory, distance, episode) for distance in (similarity, Written(similarity)))
    assert len(got) == 2 + episode + len(list(similarity.parameters()))
    assert all(torch.isfinite(value).all() for value in got)
    assert sum(value.abs().max() > 1e-6 for value in got) >= 3  # a bias may cancel, a hidden unit be off
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_memory_of_batches_takes_it() -> None:
    similarity, outcomes = trained(None), []
    for distance in (similarity, Written(similarity)):
        memory = pml_losses.CrossBatchMemory(
            pml_losses.ContrastiveLoss(pos_margin=1, neg_margin=-2, distance=distance), DIMS, memory_size=20
        )
        outcomes.append(torch.stack([memory(normal(8, DIMS, seed=s), LABELS) for s in range(4)]))
    assert (outcomes[0] > 0.1).all()
    torch.testing.assert_close(*outcomes)


MINERS: dict[type, list[dict[str, Any]]] = {
    pml_miners.BatchEasyHardMiner: [
        {},
        {"pos_strategy": "hard", "neg_strategy": "easy"},
        {"pos_strategy": "semihard", "neg_strategy": "hard"},
    ],
    pml_miners.BatchHardMiner: [{}],
    pml_miners.HDCMiner: [{}],
    pml_miners.MultiSimilarityMiner: [{"epsilon": 0.5}],
    pml_miners.PairMarginMiner: [{"pos_margin": 0.5, "neg_margin": -0.5}],
    pml_miners.TripletMarginMiner: [
        {"margin": 1.0, "type_of_triplets": t} for t in ("all", "hard", "semihard", "easy")
    ],
    pml_miners.UniformHistogramMiner: [{"num_bins": 4, "pos_per_bin": 2, "neg_per_bin": 3}],
}
OTHER_MINERS = {
    pml_miners.AngularMiner: OWN_EUCLID,
    pml_miners.DistanceWeightedMiner: OWN_EUCLID,
    pml_miners.BaseMiner: NO_DISTANCE,
    pml_miners.EmbeddingsAlreadyPackagedAsTriplets: NO_DISTANCE,
}
ALL_MINERS = [partial(kind, **options) for kind, forms in MINERS.items() for options in forms]


def test_every_miner_of_pml_is_covered() -> None:
    assert classes_of(pml_miners) == MINERS.keys() | OTHER_MINERS.keys()


@pytest.mark.parametrize("kind", [k for k, why in OTHER_MINERS.items() if why.startswith("insists")])
def test_miners_that_insist_on_a_distance_refuse_this_one(kind: type) -> None:
    with pytest.raises(AssertionError, match="requires"):
        kind(distance=WeightedL1Similarity())


@pytest.mark.parametrize("episode", [False, True], ids=["batch", "episode"])
@FORMS
@pytest.mark.parametrize("factory", ALL_MINERS, ids=name)
def test_miners_find_what_they_find_by_the_formula(factory: partial, hidden: int | None, episode: bool) -> None:
    similarity, found = trained(hidden), []
    batch = (normal(8, DIMS, seed=1), LABELS)
    support = (normal(6, DIMS, seed=2), REF_LABELS) if episode else ()
    for distance in (similarity, Written(similarity)):
        with torch.random.fork_rng():  # one of them draws
            torch.manual_seed(3)
            found.append(factory(distance=distance)(*batch, *support))
    assert sum(len(index) for index in found[0]) > 0
    assert [index.tolist() for index in found[0]] == [index.tolist() for index in found[1]]


@FORMS
def test_a_miner_may_be_the_first_to_use_it(hidden: int | None) -> None:
    """A miner compares without gradients; the loss that shares its similarity trains the weights all the same."""
    similarity = WeightedL1Similarity(hidden=hidden)
    miner = pml_miners.TripletMarginMiner(margin=50.0, distance=similarity)
    loss = pml_losses.TripletMarginLoss(margin=50.0, distance=similarity)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    batch, values = normal(8, DIMS, seed=1, dtype=torch.float32), []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(batch, LABELS, miner(batch, LABELS))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_statistics_are_the_lengths_by_city_blocks() -> None:
    similarity = WeightedL1Similarity(DIMS, collect_stats=True).double()
    assert not WeightedL1Similarity(DIMS, collect_stats=False).collect_stats
    query, reference = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)
    similarity(query, reference)
    assert similarity.initial_avg_query_norm == pytest.approx(query.abs().sum(dim=1).mean().item())
    assert similarity.final_avg_ref_norm == pytest.approx(reference.abs().sum(dim=1).mean().item())


# --- in the evaluators ------------------------------------------------------------------------------------------------


def bank(seed: int = 4, count: int = 60) -> EmbeddingBank:
    """Classes that overlap, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(6).repeat(4), torch.randint(6, (count - 24,), generator=generator)])
    rows = 1.5 * normal(6, DIMS, seed=9).float()[labels] + torch.randn(count, DIMS, generator=generator)
    return EmbeddingBank(rows, labels)


def judge(hidden: int | None) -> WeightedL1Similarity:
    """One by which most items are near their class, but not every item is its own nearest."""
    similarity = trained(hidden, torch.float32)
    if hidden is None:
        with torch.no_grad():
            similarity.score.weight.copy_(torch.tensor([-1.0, -0.7, 0.6, -0.2, -0.9]))
    return similarity


def precision_by_hand(ranked: list[bool], relevant: int) -> dict[str, float]:
    ranks = [rank for rank, match in enumerate(ranked, 1) if match]
    within = [rank for rank in ranks if rank <= relevant]
    return {
        "precision_at_1": float(ranked[0]),
        "r_precision": len(within) / relevant,
        "mean_average_precision_at_r": sum(n / rank for n, rank in enumerate(within, 1)) / relevant,
        "mean_average_precision": sum(n / rank for n, rank in enumerate(ranks, 1)) / relevant,
        "recall_at_4": float(any(ranked[:4])),
    }


@pytest.mark.parametrize("with_gallery", [False, True], ids=["leave-one-out", "gallery"])
@FORMS
def test_it_ranks_retrieval_as_a_loop_over_all_pairs(hidden: int | None, with_gallery: bool) -> None:
    similarity, query = judge(hidden), bank()
    reference = bank(seed=5, count=40) if with_gallery else query
    scores = matrix_written_out(similarity, query.embeddings, reference.embeddings)
    if not with_gallery:
        assert (scores.argmax(dim=1) != torch.arange(len(query))).any()
    sums = dict.fromkeys(precision_by_hand([True], 1), 0.0)
    for i, row in enumerate(scores.tolist()):
        others = [j for j in range(len(reference)) if with_gallery or j != i]
        others.sort(key=lambda j: -row[j])
        ranked = [bool(reference.labels[j] == query.labels[i]) for j in others]
        for metric, value in precision_by_hand(ranked, sum(ranked)).items():
            sums[metric] += value / len(query)
    assert 0.2 < sums["precision_at_1"] < 0.95
    tester = RetrievalTester(tuple(sums), distance=similarity)
    got = tester.test(query, reference) if with_gallery else tester.test(query)
    for metric, value in sums.items():
        assert got[metric] == pytest.approx(value, abs=1e-9), metric


def test_an_approximate_index_refuses_it() -> None:
    with pytest.raises(ValueError, match="expected Euclid, cosine or dot product for index 'ivf'"):
        Gallery(bank(), "ivf", distance=trained(None, torch.float32))


def slow_head(head: Callable[..., Tensor], similarity: WeightedL1Similarity, support: Tensor, query: Tensor) -> Tensor:
    """Logits (N, W) of one episode, by the definition of each head."""
    ways, shots = support.shape[:2]
    if head is nearest_prototype:
        return matrix_written_out(similarity, query, sum(support[:, k] for k in range(shots)) / shots)
    each = matrix_written_out(similarity, query, support.flatten(0, 1)).tolist()
    rows = []
    for scores in each:
        of_way = [scores[w * shots : (w + 1) * shots] for w in range(ways)]
        if head is nearest_neighbour:
            rows.append([max(own) for own in of_way])
        elif head is mean_similarity:
            rows.append([sum(own) / shots for own in of_way])
        elif head is soft_nearest_neighbour:
            rows.append([sum(math.exp(score) for score in own) for own in of_way])
        else:
            nearest = sorted(range(len(scores)), key=lambda j: -scores[j])[:3]
            votes = [sum(j // shots == w for j in nearest) for w in range(ways)]
            first = [min([nearest.index(j) for j in nearest if j // shots == w], default=9) for w in range(ways)]
            rows.append([vote - rank / 10 for vote, rank in zip(votes, first, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "head", [nearest_prototype, nearest_neighbour, mean_similarity, soft_nearest_neighbour, k_nearest_neighbours]
)
@FORMS
def test_it_classifies_episodes_as_a_loop_over_all_pairs(hidden: int | None, head: Callable[..., Tensor]) -> None:
    similarity, data, spec = judge(hidden), bank(), EpisodeSpec(4, 2, 2)
    got = EpisodicEvaluator(spec, 12, seed=7, head=partial(head, distance=similarity)).evaluate(data)
    drawn = EpisodeSampler(data.labels, spec, torch.Generator().manual_seed(7)).sample(12)
    accuracies = []
    for s, q in zip(drawn.support, drawn.query, strict=True):
        logits = slow_head(head, similarity, data.embeddings[s], data.embeddings[q].flatten(0, 1))
        right = [int(row.argmax()) == number // 2 for number, row in enumerate(logits)]
        accuracies.append(sum(right) / len(right))
    assert len(set(accuracies)) > 3
    assert got.per_episode.tolist() == pytest.approx(accuracies)


@FORMS
def test_a_loaded_one_judges_without_having_been_used(hidden: int | None) -> None:
    similarity, fresh = judge(hidden), WeightedL1Similarity(hidden=hidden)
    fresh.load_state_dict(similarity.state_dict())
    evaluated, tested = [], []
    for each in (fresh, similarity):
        evaluator = EpisodicEvaluator(EpisodeSpec(4, 2, 2), 20, head=partial(mean_similarity, distance=each))
        evaluated.append(evaluator.evaluate(bank()).per_episode.tolist())
    fresh = WeightedL1Similarity(hidden=hidden)
    fresh.load_state_dict(similarity.state_dict())
    for each in (fresh, similarity):
        tested.append(RetrievalTester(distance=each).test(bank())["precision_at_1"])
    assert evaluated[0] == evaluated[1]
    assert tested[0] == tested[1]


def test_embeddings_of_another_width_are_refused_by_the_evaluators() -> None:
    similarity = trained(None, torch.float32)
    wide = EmbeddingBank(normal(60, DIMS + 1).float(), bank().labels)
    with pytest.raises(ValueError, match=WRONG.format(6)):
        RetrievalTester(distance=similarity).test(wide)
    with pytest.raises(ValueError, match=WRONG.format(6)):
        EpisodicEvaluator(EpisodeSpec(4, 2, 2), 5, head=partial(mean_similarity, distance=similarity)).evaluate(wide)
