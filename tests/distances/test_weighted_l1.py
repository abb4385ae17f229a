"""WeightedL1Similarity against its formula written out: values, gradients, weights made on first use, states, memory.

In the losses it is tested by test_loss_contract.py, in PML's losses and miners by test_pml_parts.py.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pml_fewshot.checks import UsageError
from pml_fewshot.distances import weighted_l1
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.evaluation.heads import nearest_neighbour
from tests.losses.formulas import normal

DIMS, HIDDEN = 5, 4
each_form = pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["sum", "mlp"])


QUERY, REFERENCE = normal(6, DIMS, seed=1), normal(4, DIMS, seed=2)


def trained(hidden: int | None, dtype: torch.dtype = torch.float64, dim: int = DIMS) -> WeightedL1Similarity:
    """One with weights of both signs and a bias, as after a training."""
    similarity = WeightedL1Similarity(dim, hidden).to(dtype)
    for number, parameter in enumerate(similarity.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=50 + number))
    return similarity


def written_out(similarity: WeightedL1Similarity, query: Tensor, reference: Tensor) -> Tensor:
    """The matrix of scores, one pair after the other in Python's own numbers."""
    state = {name: value.double().tolist() for name, value in similarity.state_dict().items()}

    def score(q: list[float], r: list[float]) -> float:
        values, last = [abs(a - b) for a, b in zip(q, r, strict=True)], "score"
        if similarity.hidden is not None:
            units, last = zip(state["score.first.weight"], state["score.first.bias"], strict=True), "score.last"
            sums = [sum(w * x for w, x in zip(row, values, strict=True)) + bias for row, bias in units]
            values = [max(total, 0.0) for total in sums]
        return sum(w * x for w, x in zip(state[f"{last}.weight"], values, strict=True)) + state[f"{last}.bias"]

    return torch.tensor([[score(q, r) for r in reference.tolist()] for q in query.tolist()]).double()


def assert_close(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-7
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, DIMS])
@each_form
def test_each_score_is_the_weighted_sum_or_the_mlp_of_the_absolute_differences(
    hidden: int | None, dim: int, dtype: torch.dtype
) -> None:
    similarity = trained(hidden, dtype, dim)
    query, reference = normal(6, dim, seed=1, dtype=dtype), normal(4, dim, seed=2, dtype=dtype)
    expected, got = written_out(similarity, query, reference), similarity(query, reference)
    assert got.dtype == dtype
    assert_close(got, expected)
    assert_close(similarity(reference, query), expected.T)
    assert_close(similarity(query), written_out(similarity, query, query))
    assert_close(similarity.pairwise_distance(query[:4], reference), expected.diagonal())
    none = query[:0]
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert (similarity(none, reference).shape, similarity(query, none).shape) == ((0, 4), (6, 0))


def test_untrained_it_is_the_city_block_distance_over_the_root_of_the_dimensions() -> None:
    for dim in (1, 100):
        query, reference = normal(50, dim, seed=1), normal(50, dim, seed=2)
        similarity, blocks = WeightedL1Similarity(), LpDistance(p=1, normalize_embeddings=False)
        assert_close(similarity(query, reference).float(), -blocks(query, reference) / dim**0.5)
    assert -similarity(query, reference).mean().item() / dim**0.5 == pytest.approx(2 / math.pi**0.5, rel=0.05)


@pytest.mark.parametrize("dim", [1, DIMS])  # a single weight is of one sign: there is nothing of the other
@each_form
def test_gradients_of_weights_biases_and_both_embeddings(hidden: int | None, dim: int) -> None:
    similarity = trained(hidden, dim=dim)
    names = [name for name, _ in similarity.named_parameters()]
    assert len(names) == (2 if hidden is None else 4)

    def matrix(query: Tensor, reference: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(similarity, dict(zip(names, weights, strict=True)), (query, reference))

    leaves = [x.detach().clone() for x in (QUERY[:, :dim], REFERENCE[:, :dim], *similarity.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(matrix, leaves)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(matrix(*leaves).sum(), leaves))
    assert torch.autograd.gradcheck(similarity.pairwise_distance, (leaves[0][:4].detach().requires_grad_(), leaves[1]))
    equal = QUERY[:1, :dim].repeat(3, 1).requires_grad_()
    assert not torch.autograd.grad(similarity(equal).sum(), equal)[0].any()  # nor NaN


@each_form
def test_vmap_is_a_loop_in_value_and_gradient(hidden: int | None) -> None:
    similarity = trained(hidden)
    query, reference = normal(3, 6, DIMS, seed=1).requires_grad_(), normal(3, 4, DIMS, seed=2).requires_grad_()
    loop = torch.stack([similarity(q, r) for q, r in zip(query, reference, strict=True)])
    mapped = torch.vmap(similarity)(query, reference)
    leaves = [query, reference, *similarity.parameters()]
    got, expected = ((values, *torch.autograd.grad(values.sin().sum(), leaves)) for values in (mapped, loop))
    torch.testing.assert_close(got, expected)


FIRST_USES: dict[str, Callable[[WeightedL1Similarity, Tensor, Tensor], Any]] = {
    "matrix": lambda similarity, query, reference: similarity(query, reference),
    "pairwise": lambda similarity, query, reference: similarity.pairwise_distance(query[:4], reference),
    "head": lambda similarity, query, reference: nearest_neighbour(reference[None, :, None], query[None], similarity),
    "no_grad": lambda similarity, query, reference: torch.no_grad()(similarity)(query, reference),  # as in a miner
    "inference_mode": lambda similarity, query, reference: torch.inference_mode()(similarity)(query, reference),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
@pytest.mark.parametrize("way", FIRST_USES)
@each_form
def test_the_first_embeddings_give_their_width_and_nothing_else(hidden: int | None, way: str, loaded: bool) -> None:
    """Whichever way they come, an optimizer that was made before trains the weights."""
    states = []
    for make in (partial(WeightedL1Similarity, DIMS), *2 * [WeightedL1Similarity]):
        torch.manual_seed(6)
        similarity, scale = make(hidden=hidden), 10.0 ** len(states)
        optimizer = torch.optim.Adam(similarity.parameters(), lr=0.1)
        if loaded:
            similarity.load_state_dict(trained(hidden, torch.float32).state_dict())
        FIRST_USES[way](similarity, scale * QUERY.float(), scale * REFERENCE.float())
        FIRST_USES[way](similarity, QUERY.float(), REFERENCE.float())  # what has weights keeps them
        states.append({name: value.clone() for name, value in similarity.state_dict().items()})
    torch.testing.assert_close(states[1:], 2 * states[:1], rtol=0, atol=0)
    before = similarity(QUERY.float(), REFERENCE.float())
    before.exp().sum().backward()
    optimizer.step()
    assert (similarity(QUERY.float(), REFERENCE.float()) != before).all()


def test_the_mlp_begins_with_torchs_own_layer_and_a_sum_of_its_units() -> None:
    first, _, last = WeightedL1Similarity(100, hidden=50).score
    assert first.weight.abs().max() <= 100**-0.5
    assert first.weight.std().item() == pytest.approx(300**-0.5, rel=0.3)
    assert torch.equal(last.weight, torch.full((50,), 50**-0.5).neg())


@each_form
def test_pmls_record_keeper_can_record_the_weights(hidden: int | None) -> None:
    """It takes a matrix of one row for a number, and makes tables of the names, which must not begin with a digit."""
    for name, parameter in WeightedL1Similarity(DIMS, hidden).named_parameters():
        assert parameter.ndim < 2 or len(parameter) > 1
        assert not any(part[0].isdigit() for part in name.split("."))


@pytest.mark.parametrize("stage", ["unused", "used", "loaded"])
@each_form
def test_copies_and_states_are_equal_and_on_their_own(hidden: int | None, stage: str) -> None:
    source, buffer, query = trained(hidden, torch.float32), io.BytesIO(), QUERY.float()
    by_state, similarity = WeightedL1Similarity(hidden=hidden), WeightedL1Similarity(hidden=hidden)
    if stage == "used":
        similarity = source
    elif stage == "loaded":
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        similarity.load_state_dict(torch.load(buffer, weights_only=True))
    by_state.load_state_dict(similarity.state_dict())
    for twin in (by_state, copy.deepcopy(similarity), pickle.loads(pickle.dumps(similarity))):  # noqa: S301
        if stage == "unused":
            assert twin(query).shape == (6, 6)
        else:
            assert torch.equal(twin(query), source(query))
            with torch.no_grad():
                next(twin.parameters()).add_(1)
    if stage == "unused":
        assert similarity(normal(2, DIMS + 2).float()).shape == (2, 2)  # of another width than its copies
    else:
        assert torch.equal(similarity(query), trained(hidden, torch.float32)(query))
    with pytest.raises(RuntimeError, match="size mismatch"):
        WeightedL1Similarity(DIMS + 1, hidden).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("hidden", "block", "rows"),  # a block counts the wider of embeddings and hidden layer, times 4 references
    [(4, 1, 1), (4, 8 * DIMS, 2), (4, 13 * DIMS, 3), (20, 3 * 4 * 20, 3), (20, 10**6, 7)],
)
def test_blocks_of_the_mlp_give_what_one_gives(
    hidden: int, block: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity, query = trained(hidden), normal(7, DIMS, seed=1)
    monkeypatch.setattr(weighted_l1, "BLOCK", block)
    seen: list[int] = []
    similarity.score.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    expected = similarity(query, REFERENCE)
    assert seen == [7]  # all at once where a gradient is wanted
    with torch.no_grad():
        torch.testing.assert_close(similarity(query, REFERENCE), expected, rtol=1e-12, atol=1e-12)
        assert seen[1:] == [min(rows, 7 - start) for start in range(0, 7, rows)]
        batched = torch.vmap(similarity)(query.repeat(2, 1, 1), REFERENCE.repeat(2, 1, 1))
    torch.testing.assert_close(batched, expected.repeat(2, 1, 1), rtol=1e-12, atol=1e-12)


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
    query, reference = normal(20, 16, seed=1).requires_grad_(), normal(30, 16, seed=2)
    with Largest() as largest:
        trained(None, dim=16)(query, reference).sum().backward()
    assert 20 * 30 <= largest.elements < 20 * 30 * 16 / 4
    with Largest() as largest:
        trained(HIDDEN, dim=16)(query, reference)
    assert largest.elements == 20 * 30 * 16  # which this way of counting sees


@pytest.mark.parametrize("size", [0, True, 2.0])
@pytest.mark.parametrize("name", ["dim", "hidden"])
def test_sizes_are_integers_of_at_least_one(name: str, size: object) -> None:
    with pytest.raises(UsageError, match=f"expected {name} to be an integer of at least 1, got {size}"):
        WeightedL1Similarity(**{name: size})


@pytest.mark.parametrize("width", [1, 6])  # a width of 1 would be compared with every dimension
@pytest.mark.parametrize("loaded", [False, True])
@each_form
def test_embeddings_of_another_width_are_refused(hidden: int | None, loaded: bool, width: int) -> None:
    similarity, other = trained(hidden), normal(6, width)
    if loaded:
        similarity = WeightedL1Similarity(hidden=hidden).double()
        similarity.load_state_dict(trained(hidden).state_dict())
    for call in (similarity, similarity.pairwise_distance):
        for query, reference in ((other, other), (QUERY, other), (other, QUERY)):
            with pytest.raises(UsageError, match=rf"^expected embeddings of 5 dimensions, .* got {width}; use the emb"):
                call(query, reference)
    with pytest.raises(ValueError, match="2D tensor"):
        similarity(normal(2, 3, DIMS))
    assert_close(similarity(QUERY), trained(hidden)(QUERY))  # it has taken no harm
