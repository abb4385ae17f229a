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


def test_losses_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"got ArcFaceLoss: it takes no ref_emb; train it on .*MetricTrainer"):
        ProtoNetTrainer(m.embedder(), ArcFaceLoss(m.CLASSES, m.DIMS))
    with pytest.raises(UsageError, match="expected a MatchingLoss, got a PrototypicalLoss; use MetricTrainer"):
        MatchingTrainer(m.embedder(), PrototypicalLoss())


@torch.no_grad()
def shares(trainer: MatchingTrainer, support: Tensor, query: Tensor) -> m.Rows:
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
    made, loss = m.embedder(), EUCLID if kind == "euclid" else None
    context = FullContext(m.DIMS, read_steps=2) if kind == "context" else None
    trainer, given = MatchingTrainer(made, loss, support_rotations=count, context=context).double(), m.episode(2)
    losses, correct = [], []
    for support, query in m.rotations(trainer, given, count):
        found = shares(trainer, support, query.flatten(0, 1))
        losses += [-math.log(row[n // m.QUERIES]) for n, row in enumerate(found)]
        correct += [row.index(max(row)) == n // m.QUERIES for n, row in enumerate(found)]
    assert trainer(given).item() == pytest.approx(m.mean(losses), rel=1e-9)
    accuracy = trainer.accuracy(given)
    assert accuracy.item() == pytest.approx(m.mean(correct[-m.WAYS * m.QUERIES * 2 :]))  # type: ignore[union-attr]
    support, query = m.embedded()
    expected = torch.tensor([shares(trainer, s, q) for s, q in zip(support, query, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(trainer.classify(support, query).softmax(dim=2), expected)


def test_scale_begins_at_10_and_is_learned_and_so_is_the_context() -> None:
    trainer = MatchingTrainer(m.embedder(), context=FullContext(m.DIMS))
    assert isinstance(trainer.distance, CosineSimilarity)
    assert trainer.loss.scale.item() == pytest.approx(10)
    rest, own = trainer.parameter_groups({"loss": 0.1})
    assert len(own["params"]) == 1
    assert {id(p) for p in trainer.context.parameters()} <= {id(p) for p in rest["params"]}
    before = {name: weight.detach().clone() for name, weight in trainer.named_parameters()}
    fit(trainer, [m.floats(m.episode())] * 2, SGD([rest, own], lr=0.1), 2, progress=False)
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.named_parameters())
