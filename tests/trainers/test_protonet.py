"""ProtoNetTrainer and MatchingTrainer: loss, logits and accuracy are the papers' formulas written out."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor
from torch.optim import SGD

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

Rows = list[list[float]]


def embedded(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(2, m.WAYS, m.SHOTS, m.DIMS, generator=generator, dtype=torch.float64)
    return support, torch.randn(2, 7, m.DIMS, generator=generator, dtype=torch.float64)


# --- prototypical networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_loss_is_the_cross_entropy_of_squared_distances_to_prototypes(count: int) -> None:
    trainer, given = ProtoNetTrainer(m.embedder(), support_rotations=count).double(), m.episode(2)
    losses = []
    for support, query in m.rotations(trainer, given, count):
        prototypes = [way.mean(0).tolist() for way in support]
        for way in range(m.WAYS):
            for row in query[way].tolist():
                exponentials = [math.exp(-(m.far(row, prototype) ** 2)) for prototype in prototypes]
                losses.append(-math.log(exponentials[way] / sum(exponentials)))
    assert trainer(given).item() == pytest.approx(m.mean(losses), rel=1e-9)


def test_learned_scale_is_trained_at_the_rate_of_the_loss() -> None:
    for loss_lr, moves in ((None, True), (0.1, True), (0.0, False)):
        trainer = ProtoNetTrainer(m.embedder(), PrototypicalLoss(scale=0.5, learn_scale=True))
        optimizer = SGD(trainer.parameter_groups(loss_lr), lr=0.1)
        fit(trainer, [m.floats(m.episode())], optimizer, 1, progress=False)
        assert (trainer.loss.log_scale.exp().item() != pytest.approx(0.5)) == moves
        assert not torch.equal(trainer.embedder.trunk[1].weight, m.embedder().trunk[1].weight)


def test_loss_that_takes_no_support_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"got ArcFaceLoss: it takes no ref_emb; train it on .*MetricTrainer"):
        ProtoNetTrainer(m.embedder(), ArcFaceLoss(m.CLASSES, m.DIMS))


# --- matching networks ------------------------------------------------------------------------------------------------


@torch.no_grad()
def shares(trainer: MatchingTrainer, support: Tensor, query: Tensor) -> Rows:
    """Of one episode, (W, K, D) and (N, D): the classes' shares of each query's attention."""
    if trainer.context is not None:
        support, query = (part[0].detach() for part in trainer.context(support[None], query[None]))
    cosine, scale = isinstance(trainer.distance, CosineSimilarity), float(trainer.loss.scale)
    items = [m.unit_rows(way) if cosine else way.tolist() for way in support]
    found = []
    for row in m.unit_rows(query) if cosine else query.tolist():
        weights = [
            sum(math.exp(scale * (m.dot(row, item) if cosine else -(m.far(row, item) ** 2))) for item in way)
            for way in items
        ]
        found.append([weight / sum(weights) for weight in weights])
    return found


EUCLID = MatchingLoss(LpDistance(normalize_embeddings=False, power=2))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["default", "euclid", "context"])
def test_loss_logits_and_accuracy_are_of_the_classes_shares_of_attention(kind: str, count: int) -> None:
    made = m.embedder()
    context = FullContext(m.DIMS, read_steps=2) if kind == "context" else None
    loss = EUCLID if kind == "euclid" else None
    trainer, given = MatchingTrainer(made, loss, support_rotations=count, context=context).double(), m.episode(2)
    losses, correct = [], []
    for support, query in m.rotations(trainer, given, count):
        found = shares(trainer, support, query.flatten(0, 1))
        losses += [-math.log(row[n // m.QUERIES]) for n, row in enumerate(found)]
        correct += [row.index(max(row)) == n // m.QUERIES for n, row in enumerate(found)]
    assert trainer(given).item() == pytest.approx(m.mean(losses), rel=1e-9)
    accuracy = trainer.accuracy(given)
    assert accuracy is not None
    assert accuracy.item() == pytest.approx(m.mean(correct[-m.WAYS * m.QUERIES * 2 :])), "of the last rotation"
    support, query = embedded()
    expected = torch.tensor([shares(trainer, s, q) for s, q in zip(support, query, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(trainer.classify(support, query).softmax(dim=2), expected)


def test_scale_begins_at_10_and_is_learned_and_so_is_the_context() -> None:
    trainer = MatchingTrainer(m.embedder(), context=FullContext(m.DIMS))
    assert isinstance(trainer.distance, CosineSimilarity)
    assert trainer.loss.scale.item() == pytest.approx(10)
    rest, own = trainer.parameter_groups(loss_lr=0.1)
    assert len(own["params"]) == 1
    assert {id(p) for p in trainer.context.parameters()} <= {id(p) for p in rest["params"]}  # type: ignore[union-attr]
    before = {name: weight.detach().clone() for name, weight in trainer.named_parameters()}
    fit(trainer, [m.floats(m.episode())] * 2, SGD([rest, own], lr=0.1), 2, progress=False)
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.named_parameters())


def test_matching_networks_take_no_other_loss() -> None:
    with pytest.raises(UsageError, match="expected a MatchingLoss, got a PrototypicalLoss; use MetricTrainer"):
        MatchingTrainer(m.embedder(), PrototypicalLoss())  # type: ignore[arg-type]
