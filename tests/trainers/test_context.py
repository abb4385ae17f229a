"""A trainer's context: what it gives is what loss, logits and accuracy are of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.embedders.set_to_set import SetToSet
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

Revise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Context(nn.Module):
    def __init__(self, revise: Revise) -> None:
        super().__init__()
        self.revise = revise

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.revise(support, query)


def prototypes_alone(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    return support.mean(dim=2, keepdim=True), query


def scaled(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Items by the mean length of their episode's support, and one dimension less: no two episodes alike."""
    lengths = support.norm(dim=3).mean(dim=(1, 2))
    return support[..., 1:] / lengths.view(-1, 1, 1, 1), query[..., 1:] / lengths.view(-1, 1, 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["scaled", "SetToSet"])
def test_loss_logits_and_accuracy_are_those_of_the_revised_embeddings(kind: str, count: int) -> None:
    torch.manual_seed(1)
    context = Context(scaled) if kind == "scaled" else SetToSet(m.DIMS, dropout=0.0, attention_dropout=0.0)
    trainer = ProtoNetTrainer(m.embedder(), support_rotations=count, context=context).double()
    given, losses, correct = m.episode(2), [], []
    for support, query in m.rotations(trainer, given, count):
        revised, queries = (part[0] for part in context(support[None], query.flatten(0, 1)[None]))
        far = torch.cdist(queries, revised.mean(dim=1)).square()
        labels = m.ways_of(m.QUERIES)
        losses.append(nn.functional.cross_entropy(-far, labels).item())
        correct += (far.argmin(dim=1) == labels).tolist()
    assert trainer(given).item() == pytest.approx(m.mean(losses))
    accuracy: Any = trainer.accuracy(given)
    assert accuracy.item() == pytest.approx(m.mean(correct[-m.WAYS * m.QUERIES * 2 :]))
    support, query = m.embedded()
    expected = nearest_prototype(*context(support, query))
    torch.testing.assert_close(trainer.classify(support, query), expected)
    assert not torch.allclose(expected, nearest_prototype(support, query))


@pytest.mark.parametrize("kind", [ProtoNetTrainer, MatchingTrainer])
def test_prototypes_in_the_place_of_several_shots(kind: Any) -> None:
    loss = PrototypicalLoss() if kind is ProtoNetTrainer else MatchingLoss(PrototypicalLoss().distance)
    plain = ProtoNetTrainer(m.embedder()).double()
    trainer = kind(m.embedder(), loss, context=Context(prototypes_alone)).double()
    torch.testing.assert_close(trainer(m.episode(2)), plain(m.episode(2)))
    logits, expected = (each.classify(*m.embedded()).log_softmax(dim=2) for each in (trainer, plain))
    torch.testing.assert_close(logits, expected)


def test_accuracy_draws_no_dropout_and_training_does() -> None:
    torch.manual_seed(0)
    trainer, given = ProtoNetTrainer(m.embedder(), context=SetToSet(m.DIMS)), m.floats(m.episode(2))
    assert trainer(given) != trainer(given)
    state = torch.get_rng_state()
    first, second = trainer.accuracy(given), trainer.accuracy(given)
    assert torch.equal(first, second)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.context.training
    assert trainer.context.dropout.training


def test_it_is_trained_stored_moved_and_given_a_rate_as_a_part_of_the_trainer() -> None:
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(m.embedder(), context=SetToSet(m.DIMS))
    rest, own = trainer.parameter_groups({"context": 0.01})
    assert {id(p) for p in own["params"]} == {id(p) for p in trainer.context.parameters()}
    before = copy.deepcopy(trainer.state_dict())
    assert {name.split(".")[0] for name in before} == {"embedder", "context", "loss"}
    fit(trainer, [m.floats(m.episode())] * 2, SGD([rest, own], lr=0.1), 2, progress=False)
    assert all(not torch.equal(w, before[name]) for name, w in trainer.named_parameters() if w.requires_grad)
    assert set(trainer.exports()) == {"embedder.safetensors"}
    names = list(MatchingTrainer(m.embedder(), context=FullContext(m.DIMS)).state_dict())
    lstm = [f"support_lstm.{kind}_l0{way}" for way in ("", "_reverse") for kind in ("weight_ih", "weight_hh")]
    assert {f"context.{name}" for name in lstm} < set(names)


def test_evaluation_in_threads_gives_what_one_thread_gives_and_tables_name_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(m.embedder(), head=nearest_neighbour, context=SetToSet(m.DIMS))
    assert trainer.thread_safe
    spec = EpisodeSpec(m.WAYS, m.SHOTS, m.QUERIES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("pml_fewshot.evaluation.episodic.CPU_CHUNK", 200)
    many = EpisodicEvaluator(spec, 60).evaluate(trainer, m.tiny_set())
    one = EpisodicEvaluator(spec, 60, chunk=7).evaluate(trainer, m.tiny_set())
    assert torch.equal(many.per_episode, one.per_episode)
    assert many.classifier == "nearest_neighbour by LpDistance(p=2, power=2) in context of SetToSet"
    assert trainer.training
    matching = MatchingTrainer(m.embedder(), context=FullContext(m.DIMS))
    assert matching.classifier == "attention by CosineSimilarity(p=2, power=1, normalized) in context of FullContext"
    assert MatchingTrainer(m.embedder()).classifier == "attention by CosineSimilarity(p=2, power=1, normalized)"

    class Own(FewShotTrainer):
        def classify(self, support: Tensor, query: Tensor) -> Tensor:
            return nearest_prototype(*self.in_context(support, query))

    assert (
        Own(m.embedder(), PrototypicalLoss(), context=Context(scaled)).classifier == "Own's own in context of Context"
    )


WRONG: dict[str, Revise] = {
    "no classes": lambda support, query: (support.flatten(1, 2), query),
    "fewer classes": lambda support, query: (support[:, 1:], query),
    "fewer queries": lambda support, query: (support, query[:, 1:]),
    "another width": lambda support, query: (support[..., 1:], query),
    "queries first": lambda support, query: (query, support),  # type: ignore[return-value]
    "one episode less": lambda support, query: (support[:-1], query[:-1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_context_must_not_give_is_refused(wrong: str) -> None:
    trainer = ProtoNetTrainer(m.embedder(), context=Context(WRONG[wrong]))
    match = r"expected support \(E, W, K, D\) and queries \(E, N, D\) from Context for shapes .*, got shapes .*; return"
    with pytest.raises(UsageError, match=match):
        trainer.classify(*m.embedded(torch.float32))
    with pytest.raises(UsageError, match=match):
        trainer(m.floats(m.episode()))
