"""What holds for all our losses, one factor at a time: distance, reducer, regularizer, miner, trainer, copies.

A loss is held against loops (tests/losses/formulas.py). What is peculiar to one loss is in that loss's own file.
"""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_metric_learning import miners, reducers, regularizers
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

import pml_fewshot
from tests.losses.formulas import (
    DISTANCES,
    LOSSES,
    SQUARED_EUCLID,
    arguments,
    each_input,
    learned,
    leaves_of,
    losses_by_hand,
    mean_by_hand,
    outcome,
)

each_loss = pytest.mark.parametrize("name", LOSSES)
EPISODIC = ["prototypical", "matching"]


def make(name: str, distance: nn.Module | None = None, **options: Any) -> Any:
    """The loss, by squared Euclid where no other distance is given."""
    return LOSSES[name](distance=SQUARED_EUCLID() if distance is None else distance, **options)


def assert_close(got: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """The scale of the losses is the exponential of a float32, good to 1e-7."""
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=rtol, atol=rtol)


@each_input
@pytest.mark.parametrize("distance", DISTANCES)
@each_loss
def test_value_and_gradient_by_each_distance(name: str, distance: str, episode: bool) -> None:
    given, loss = arguments(episode), make(name, DISTANCES[distance]())
    expected = mean_by_hand(name, losses_by_hand(name, loss.distance, given))
    assert expected > 1e-3
    assert_close(loss(*given), expected)

    def value(*leaves: Tensor) -> Tensor:
        return loss(leaves[0], given[1], None, *leaves[1:], *given[4:])

    assert torch.autograd.gradcheck(value, leaves_of(given), fast_mode=True)


@each_input
@each_loss
def test_losses_before_a_reducer_name_their_items(name: str, episode: bool) -> None:
    given = arguments(episode)
    elements = losses_by_hand(name, SQUARED_EUCLID(), given)
    got = make(name, reducer=reducers.DoNothingReducer())(*given)
    assert got.keys() == {"loss"}
    indices = got["loss"]["indices"]
    reduced_as = {1: "element", 2: "pos_pair", 3: "triplet"}  # by which PML's reducers go (test_pml_parts.py)
    assert got["loss"]["reduction_type"] == reduced_as[len(elements[0][1])]
    numbers = list(zip(*(index.tolist() for index in (indices if len(elements[0][1]) > 1 else [indices])), strict=True))
    assert len(numbers) == len(elements)
    found = dict(zip(numbers, got["loss"]["losses"], strict=True))
    assert_close(torch.stack([found[number] for _, number in elements]), torch.stack([loss for loss, _ in elements]))


@each_loss
def test_a_regularizer_adds_its_value_of_the_queries(name: str) -> None:
    given, made = arguments(True), regularizers.LpRegularizer(p=1, power=2)
    added = 0.7 * made(given[0])
    assert added.abs() > 1e-3
    loss = make(name, embedding_regularizer=made, embedding_reg_weight=0.7)
    assert_close(loss(*given), make(name)(*given) + added)


MINERS = {
    "triplets": partial(miners.TripletMarginMiner, margin=0.5),
    "multi-similarity": partial(miners.MultiSimilarityMiner, epsilon=0.5),
    "batch hard": miners.BatchHardMiner,
    "pair margin": partial(miners.PairMarginMiner, pos_margin=0.5, neg_margin=1.5),
}


@each_input
@pytest.mark.parametrize("miner", MINERS)
@each_loss
def test_each_miner_chooses_what_is_learned_from(name: str, miner: str, episode: bool) -> None:
    items, labels, _, *support = arguments(episode)
    mined = MINERS[miner]()(items, labels, *support)
    assert all(len(index) > 1 for index in mined)
    loss = make(name, reducer=reducers.MeanReducer())
    got = loss(items, labels, mined, *support)
    elements = losses_by_hand(name, SQUARED_EUCLID(), (items, labels, mined, *support))
    assert_close(got, torch.stack([loss for loss, _ in elements]).mean())
    if name not in EPISODIC:  # where a miner that names all queries equally often weighs them alike
        assert got.item() != pytest.approx(loss(items, labels, None, *support).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_input
@each_loss
def test_each_dtype_gives_nearly_the_same(name: str, episode: bool, dtype: torch.dtype) -> None:
    got = make(name, DISTANCES["cosine"]())(*arguments(episode, dtype))
    assert got.dtype == torch.float32
    expected = make(name, DISTANCES["cosine"]())(*arguments(episode)).item()
    assert got.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 0.05)


@each_input
@each_loss
def test_neither_order_nor_names_of_classes_matter_and_inputs_and_global_generator_stay(
    name: str, episode: bool
) -> None:
    """Some of the names are beyond the integers that a float32 or float64 tells apart."""
    given, generator, state = arguments(episode), torch.Generator().manual_seed(5), torch.get_rng_state()
    expected = make(name)(*given)
    assert all(mine is same or torch.equal(mine, same) for mine, same in zip(given, arguments(episode), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    names = torch.tensor([-5, 2**62 + 1, 3, 2**62, 100, 5, 2**24 + 1, 2**24, 9_000_000_000, 0, 1, 2])
    changed = []
    for items, labels in zip(given[::3], given[1::3], strict=True):
        order = torch.randperm(len(items), generator=generator)
        view = torch.stack([names[labels[order]]] * 2, dim=1)[:, 0]  # labels need not be contiguous
        assert not view.is_contiguous()
        changed += [items[order], view]
    assert_close(make(name)(*changed[:2], None, *changed[2:]), expected)


@each_loss
def test_statistics_are_kept_where_asked_for_and_change_nothing(name: str) -> None:
    given = arguments(True)
    loss = make(name, LpDistance(collect_stats=True, power=2), collect_stats=True)
    assert loss(*given) == make(name, LpDistance(power=2), collect_stats=False)(*given)
    assert loss.collect_stats is True
    assert make(name, collect_stats=False).collect_stats is False
    assert loss.distance.initial_avg_query_norm == pytest.approx(given[0].norm(dim=1).mean().item())


@each_loss
def test_copies_and_loaded_states_give_the_same_loss(name: str) -> None:
    given, loss = arguments(True), make(name, learned())
    other = make(name, learned(seed=1))
    assert other(*given) != loss(*given)
    other.load_state_dict(loss.state_dict())
    for twin in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):  # noqa: S301
        assert twin(*given) == loss(*given)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in loss.parameters()}


@pytest.mark.parametrize("labels", [torch.arange(8), torch.zeros(8).long()], ids=["all alone", "one class"])
@each_loss
def test_a_batch_with_nothing_to_learn_from_has_zero_loss_and_gradient(name: str, labels: Tensor) -> None:
    batch = arguments(False)[0].requires_grad_()
    loss = (LOSSES[name] if name != "pairs" else partial(LOSSES[name], balanced=True))(distance=SQUARED_EUCLID())
    value = loss(batch, labels)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert batch.grad.abs().max() < 1e-12


@each_loss
def test_labels_are_required(name: str) -> None:
    with pytest.raises(ValueError, match="labels"):
        make(name)(arguments(False)[0])


@pytest.mark.parametrize("distance", [None, learned], ids=["own distance", "weighted L1"])
@pytest.mark.parametrize("name", EPISODIC)
def test_a_step_on_an_episode_asks_for_no_value(name: str, distance: Any) -> None:
    """Tensors on the device "meta" have no values: whatever would wait for a GPU to know one raises there."""
    loss = LOSSES[name](distance=distance and distance(), learn_scale=True).double().to("meta")
    given = tuple(x if x is None else x.to("meta") for x in arguments(True))
    assert outcome(loss, given, *loss.parameters())[0].shape == ()
    with pytest.raises(NotImplementedError, match=r"meta|Meta"):  # as the list of a batch's lone items would
        loss(*given[:2])


@each_input
@pytest.mark.parametrize("name", EPISODIC)
def test_the_way_without_waits_gives_the_same(name: str, episode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And NaN, where it cannot look for it, to a query whose class has no support item."""
    outcomes, columns = [], []
    for is_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
        given, loss = arguments(episode), make(name, learned())
        scores = loss.class_scores
        loss.class_scores = lambda *args, scores=scores: [columns.append(args[2].shape[1]), scores(*args)][1]
        outcomes.append(outcome(loss, given, *loss.distance.parameters()))
    assert columns == ([5, 7] if episode else [3, 8])
    for got, expected in zip(*outcomes, strict=True):
        assert_close(got, expected, rtol=1e-12)
    query, _, _, *support = arguments(True)
    given = (query, torch.tensor([7, 0, 6, 7, 99, 3, 3, -1]), None, *support)
    losses = make(name, reducer=reducers.DoNothingReducer())(*given)["loss"]["losses"]
    assert losses.isnan().nonzero().flatten().tolist() == [2, 4, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_loss
def test_a_gpu_gives_the_same_and_episodic_losses_do_not_wait_for_it(name: str) -> None:
    outcomes = []
    for device in ("cpu", "cuda"):
        loss = make(name, learned()).to(device)
        given = tuple(x if x is None else x.to(device) for x in arguments(True))
        torch.cuda.set_sync_debug_mode("error" if name in EPISODIC else "default")
        leaves = leaves_of(given)
        try:
            value = loss(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        outcomes.append([value, *torch.autograd.grad(value, leaves)])
    for expected, got in zip(*outcomes, strict=True):
        assert_close(got.cpu(), expected)


def test_all_our_losses_are_held_to_this() -> None:
    ours = {name for name in pml_fewshot.__all__ if name.endswith("Loss")}
    ours -= {"ReconstructionLoss"}  # of feature maps and without a distance: tests/trainers/test_frn.py
    assert ours == {getattr(factory, "func", factory).__name__ for factory in LOSSES.values()}
