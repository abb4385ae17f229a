"""RelationSimilarity against joining each pair of maps, and easyfsl's module: values, gradients, weights, blocks."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.checks import UsageError
from pml_fewshot.distances import nodes as blocks
from pml_fewshot.distances.relation import RelationSimilarity
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from tests.embedders.formulas import batch_norm, used, weights_of
from tests.losses.formulas import normal

SIDE, CHANNELS = 5, 3
NODES, DIMS = SIDE * SIDE, SIDE * SIDE * CHANNELS
QUERY, REFERENCE = normal(2, 3, DIMS, seed=1), normal(2, 4, DIMS, seed=2)
Weights = dict[str, Tensor]


def relation(nodes: int = NODES, training: bool = False) -> RelationSimilarity:
    """With weights, biases and running statistics as after a training."""
    return used(RelationSimilarity(nodes, channels=4, hidden=5, dim=nodes * CHANNELS)).train(training)


def written_out(weights: Weights, query: Tensor, reference: Tensor, training: bool, side: int = SIDE) -> Tensor:
    """Scores (E, N, R): each pair of maps joined by itself, the reference's first, then layer after layer."""
    joined = [
        torch.cat([r.reshape(-1, side, side), q.reshape(-1, side, side)])
        for queries, references in zip(query, reference, strict=True)
        for q in queries
        for r in references
    ]
    out = torch.stack(joined)
    for name in ("first", "second"):
        out = F.conv2d(out, weights[f"{name}.weight"], padding=1)
        out = F.max_pool2d(F.relu(batch_norm(weights, f"{name}_norm", out, training)), 2)
    units = F.relu(out.flatten(1) @ weights["hidden.weight"].T + weights["hidden.bias"])
    return (units @ weights["weight"] + weights["bias"]).view(*query.shape[:2], reference.shape[1])


@pytest.mark.parametrize("side", [4, 5, 8])
@pytest.mark.parametrize("training", [True, False])
def test_scores_and_gradients_are_those_of_each_pair_joined(training: bool, side: int) -> None:
    similarity, dims = relation(side * side, training), side * side * CHANNELS
    query, reference = normal(2, 3, dims, seed=1).requires_grad_(), normal(2, 4, dims, seed=2).requires_grad_()
    weights = weights_of(similarity)
    own = {name: weights[name].requires_grad_() for name, _ in similarity.named_parameters()}
    got = similarity.compute_batch(query, reference)
    expected = written_out(weights, query, reference, training, side)
    torch.testing.assert_close(got, expected)
    assert got.std() > 1e-3
    gradients = torch.autograd.grad(got.sin().sum(), [query, reference, *similarity.parameters()])
    slow = torch.autograd.grad(expected.sin().sum(), [query, reference, *own.values()])
    for name, gradient, wanted in zip(["query", "reference", *own], gradients, slow, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")
    if not training:
        torch.testing.assert_close(similarity(query[0], reference[0]), expected[0])
        of_pairs = similarity.pairwise_distance(query[0], reference[0, :3])
        torch.testing.assert_close(of_pairs, expected[0, :, :3].diagonal())
    assert similarity.is_inverted


def test_it_is_easyfsls_module_before_the_sigmoid_where_that_pads_and_pools_as_the_papers_for_omniglot() -> None:
    predesigned = pytest.importorskip("easyfsl.modules.predesigned_modules")
    theirs = used(predesigned.default_relation_module(CHANNELS)).eval()
    theirs[0][3] = theirs[1][3] = nn.MaxPool2d(2)
    theirs[1][0].padding = (1, 1)
    similarity = used(RelationSimilarity(NODES, channels=CHANNELS, dim=DIMS)).eval()
    for ours, their in (
        (similarity.first, theirs[0][0]),
        (similarity.first_norm, theirs[0][1]),
        (similarity.second, theirs[1][0]),
        (similarity.second_norm, theirs[1][1]),
        (similarity.hidden, theirs[3]),
    ):
        if isinstance(their, nn.Conv2d):
            nn.init.zeros_(their.bias)
        ours.load_state_dict({name: value for name, value in their.state_dict().items() if name in ours.state_dict()})
    similarity.weight.data, similarity.bias.data = theirs[5].weight[0].detach(), theirs[5].bias[0].detach()
    with torch.no_grad():
        pairs = [torch.cat([r, q]).view(1, -1, SIDE, SIDE) for q in QUERY[0] for r in REFERENCE[0]]
        expected = theirs(torch.cat(pairs)).view(3, 4)
        torch.testing.assert_close(similarity(QUERY[0], REFERENCE[0]).sigmoid(), expected)


def test_blocks_where_no_gradient_is_wanted_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, whole = relation(), relation().compute_batch(QUERY, REFERENCE)
    seen: list[int] = []
    similarity.first_norm.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(blocks, "BLOCK", 8 * 4 * NODES)
    with torch.no_grad():
        torch.testing.assert_close(similarity.compute_batch(QUERY, REFERENCE), whole)
        assert seen == [8, 4, 8, 4]
        seen.clear()
        similarity.train().compute_batch(QUERY, REFERENCE)  # where batch norm wants all pairs
    similarity.eval().compute_batch(QUERY, REFERENCE)
    assert seen == [24, 24]
    none = QUERY[:, :0]
    with torch.no_grad():
        assert similarity.compute_batch(none, REFERENCE).shape == (2, 0, 4)


FIRST_USES: dict[str, Callable[[RelationSimilarity, Tensor, Tensor], Any]] = {
    "matrix": lambda similarity, query, reference: similarity(query[0], reference[0]),
    "pairwise": lambda similarity, query, reference: similarity.pairwise_distance(query[0], reference[0, :3]),
    "head": lambda similarity, query, reference: nearest_prototype(reference[:, :, None], query, similarity),
    "inference_mode": lambda similarity, query, reference: torch.inference_mode()(similarity)(query[0], reference[0]),
}


@pytest.mark.parametrize("way", FIRST_USES)
def test_the_first_embeddings_give_the_width_and_nothing_else(way: str) -> None:
    """Whichever way they come, an optimizer that was made before trains the weights."""
    states, query, reference = [], QUERY.float(), REFERENCE.float()
    for make in (partial(RelationSimilarity, dim=DIMS), RelationSimilarity):
        torch.manual_seed(6)
        similarity = make(NODES, channels=4).eval()
        optimizer = Adam(similarity.parameters(), lr=0.1)
        torch.manual_seed(7)
        if not states:
            similarity.first.reset_parameters()  # drawn when the width is known
        FIRST_USES[way](similarity, (1 + len(states)) * query, reference)
        states.append({name: value.clone() for name, value in similarity.state_dict().items()})
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    before = similarity(query[0], reference[0])
    before.exp().sum().backward()
    assert all(p.grad.abs().max() > 0 and not p.is_inference() for p in similarity.parameters())  # type: ignore[union-attr]
    optimizer.step()
    assert (similarity(query[0], reference[0]) != before).all()


@pytest.mark.parametrize("stage", ["unused", "used", "loaded"])
def test_copies_and_states_are_equal_and_on_their_own(stage: str) -> None:
    source, query, buffer = relation().float(), QUERY[0].float(), io.BytesIO()
    by_state, similarity = (RelationSimilarity(NODES, channels=4, hidden=5).eval() for _ in range(2))
    if stage == "used":
        similarity = source
    elif stage == "loaded":
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        similarity.load_state_dict(torch.load(buffer, weights_only=True))
    by_state.load_state_dict(similarity.state_dict())
    for twin in (by_state, copy.deepcopy(similarity), pickle.loads(pickle.dumps(similarity))):  # noqa: S301
        if stage == "unused":
            assert twin(query).shape == (3, 3)
        else:
            assert torch.equal(twin(query), source(query))
            twin.first.weight.data.add_(1)
    if stage != "unused":
        assert torch.equal(similarity(query), relation().float()(query))


def test_pmls_record_keeper_can_record_the_weights() -> None:
    """It takes a matrix of one row for a number, and makes tables of the names, which must not begin with a digit."""
    for name, parameter in RelationSimilarity(NODES, dim=DIMS).named_parameters():
        assert parameter.ndim < 2 or len(parameter) > 1
        assert not any(part[0].isdigit() for part in name.split("."))


@pytest.mark.parametrize("kind", ["prototypes", "matching"])
def test_it_is_trained_as_a_losss_distance_and_evaluated_by_its_running_statistics(kind: str) -> None:
    torch.manual_seed(0)
    made, similarity = Embedder(Conv4(1, 4)), RelationSimilarity(16, channels=4)
    if kind == "prototypes":
        trainer: Any = ProtoNetTrainer(made, PrototypicalLoss(similarity))
    else:
        trainer = MatchingTrainer(made, MatchingLoss(similarity))
    draw = torch.Generator().manual_seed(0)
    support, query = torch.rand(2, 1, 3, 2, 1, 64, 64, generator=draw)
    optimizer = Adam(trainer.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = trainer(Episode(support, query))
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.loss.distance.parameters())
        optimizer.step()
        statistics = similarity.first_norm.running_mean.clone()
        accuracy = trainer.accuracy(None)
        assert 0 <= accuracy.item() <= 1
        assert torch.equal(similarity.first_norm.running_mean, statistics)  # asking for it changes no training
        assert similarity.training
    assert losses[0] != losses[1]
    trainer.eval()
    assert not similarity.first_norm.training
    embedded = trainer.embed(support), trainer.embed(query).flatten(1, 2)
    logits = trainer.classify(*embedded)
    torch.testing.assert_close(trainer.classify(embedded[0], embedded[1][:, :1]), logits[:, :1])
    assert trainer.classifier.endswith(" by RelationSimilarity(nodes=16, channels=4, hidden=8)")


@pytest.mark.parametrize("nodes", [2, 4, 9, 15, 24, 1, 0])
def test_maps_that_two_poolings_leave_nothing_of_or_that_are_not_square_are_refused(nodes: int) -> None:
    with pytest.raises(UsageError, match=r"expected (nodes as a square of at least 16, got|at least 2 nodes|nodes to)"):
        RelationSimilarity(nodes)


@pytest.mark.parametrize("name", ["channels", "hidden", "dim"])
def test_sizes_are_integers_of_at_least_one(name: str) -> None:
    with pytest.raises(UsageError, match=f"expected {name} to be an integer of at least 1, got 0"):
        RelationSimilarity(NODES, **{name: 0})


def test_embeddings_of_another_width_are_refused() -> None:
    fresh, similarity = RelationSimilarity(NODES), relation()
    for call in (fresh, fresh.pairwise_distance, partial(RelationSimilarity, NODES, dim=64)):
        with pytest.raises(UsageError, match=r"of a multiple of 25 dimensions, got 64; .*pool=False"):
            call(*([] if isinstance(call, partial) else [normal(2, 64)] * 2))
    for query, reference in ((DIMS + NODES, DIMS + NODES), (64, 64)):
        with pytest.raises(UsageError, match=r"expected embeddings of 75 dimensions, 25 nodes, .* use the embedder"):
            similarity(normal(2, query), normal(2, reference))
    assert similarity(torch.full((1, DIMS), torch.nan).double(), REFERENCE[0]).isnan().all()
