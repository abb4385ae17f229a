"""ProtoNetTrainer: its loss is the explicit one, and any PML loss and miner fit."""

from functools import partial

import pytest
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    CircleLoss,
    ContrastiveLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    SupConLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BaseMiner, MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import SumReducer
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.protonet import ProtoNetTrainer

WAYS, SHOTS, QUERIES, SIZE, DIMS = 3, 2, 4, 5, 6


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def episode(tasks: int = 1, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(tasks, WAYS, SHOTS + QUERIES, 1, SIZE, SIZE, generator=generator)
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])


def explicit_loss(trainer: ProtoNetTrainer, support: Tensor, query: Tensor) -> Tensor:
    """One episode, (W, K, *item) and (W, Q, *item), embedded class by class and labelled in a loop."""
    embedded: dict[str, list[Tensor]] = {"support": [], "query": []}
    labels: dict[str, list[int]] = {"support": [], "query": []}
    for role, images in (("support", support), ("query", query)):
        for way in range(WAYS):
            for image in images[way]:
                embedded[role].append(trainer.embedder(image[None])[0])
                labels[role].append(way)
    q, s = torch.stack(embedded["query"]), torch.stack(embedded["support"])
    ql, sl = torch.tensor(labels["query"]), torch.tensor(labels["support"])
    mined = trainer.miner(q, ql, s, sl) if trainer.miner is not None else None
    return trainer.loss(q, ql, mined, s, sl)


def two_steps(trainer: ProtoNetTrainer, batch: Episode) -> list[float]:
    """Loss before the first step and after the second."""
    optimizer = torch.optim.SGD(trainer.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = trainer(batch)
        assert loss.shape == ()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [losses[0], losses[2]]


# --- the loss is the explicit one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("miner", [None, TripletMarginMiner(margin=0.2)], ids=["no miner", "miner"])
def test_loss_of_one_episode(miner: BaseMiner | None) -> None:
    trainer, batch = ProtoNetTrainer(embedder(), miner=miner), episode()
    torch.testing.assert_close(trainer(batch), explicit_loss(trainer, batch.support[0], batch.query[0]))


def test_several_episodes_give_the_mean_of_their_losses() -> None:
    trainer, batch = ProtoNetTrainer(embedder()), episode(tasks=3)
    each = [explicit_loss(trainer, s, q) for s, q in zip(batch.support, batch.query, strict=True)]
    torch.testing.assert_close(trainer(batch), torch.stack(each).mean())


@pytest.mark.parametrize("turns", [2, 3])
def test_turns_give_the_mean_of_explicit_episodes(turns: int) -> None:
    trainer, batch = ProtoNetTrainer(embedder(), turns=turns), episode()
    images = torch.cat([batch.support, batch.query], dim=2)[0]  # (W, K+Q, *item)
    each = []
    for turn in range(turns):
        in_support = range(turn * SHOTS, (turn + 1) * SHOTS)
        rest = [i for i in range(SHOTS + QUERIES) if i not in in_support]
        each.append(explicit_loss(trainer, images[:, list(in_support)], images[:, rest]))
    torch.testing.assert_close(trainer(batch), torch.stack(each).mean())


def test_turns_of_several_episodes() -> None:
    trainer, batch = ProtoNetTrainer(embedder(), turns=3), episode(tasks=2)
    each = [trainer(Episode(batch.support[i : i + 1], batch.query[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(trainer(batch), torch.stack(each).mean())


def test_support_and_query_share_batch_norm_statistics() -> None:
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(Conv4(channels=4)))
    images = torch.rand(1, WAYS, SHOTS + QUERIES, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    joint = trainer.embedder(images.flatten(0, 2)).unflatten(0, images.shape[:3])[0]
    support, query = joint[:, :SHOTS].flatten(0, 1), joint[:, SHOTS:].flatten(0, 1)
    classes = torch.arange(WAYS)
    expected = trainer.loss(query, classes.repeat_interleave(QUERIES), None, support, classes.repeat_interleave(SHOTS))
    torch.testing.assert_close(trainer(Episode(images[:, :, :SHOTS], images[:, :, SHOTS:])), expected)


@pytest.mark.parametrize("turns", [1, 3])
def test_batch_accuracy_is_the_fraction_of_queries_near_their_own_prototype(turns: int) -> None:
    trainer, batch = ProtoNetTrainer(embedder(), turns=turns), episode(tasks=2)
    assert trainer.batch_accuracy is None
    trainer(batch)
    correct = []
    for images in torch.cat([batch.support, batch.query], dim=2):
        embedded = torch.stack([trainer.embedder(way) for way in images])
        for turn in [turns - 1]:  # of the last turn alone
            inside = list(range(turn * SHOTS, (turn + 1) * SHOTS))
            outside = [i for i in range(SHOTS + QUERIES) if i not in inside]
            prototypes = embedded[:, inside].mean(1)
            for way in range(WAYS):
                for i in outside:
                    correct.append(int((embedded[way, i] - prototypes).square().sum(1).argmin()) == way)
    assert trainer.batch_accuracy is not None
    assert not trainer.batch_accuracy.requires_grad
    assert trainer.batch_accuracy.item() == pytest.approx(sum(correct) / len(correct))


def test_permuting_classes_changes_nothing() -> None:
    trainer, batch = ProtoNetTrainer(embedder(), turns=3), episode()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(trainer(Episode(batch.support[:, order], batch.query[:, order])), trainer(batch))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_factories_and_instances_are_both_accepted() -> None:
    instances = ProtoNetTrainer(
        embedder(),
        loss=PrototypicalLoss(LpDistance(p=1), reducer=SumReducer()),
        miner=TripletMarginMiner(margin=0.3, distance=LpDistance(p=1)),
    )
    torch.manual_seed(0)
    factories = ProtoNetTrainer(
        partial(Embedder, trunk=partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))),
        loss=partial(PrototypicalLoss, distance=partial(LpDistance, p=1), reducer=partial(SumReducer)),
        miner=partial(TripletMarginMiner, margin=0.3, distance=partial(LpDistance, p=1)),
    )
    assert torch.equal(instances(episode()), factories(episode()))


def test_two_trainers_of_one_factory_share_nothing() -> None:
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    loss = partial(PrototypicalLoss, learn_scale=True)
    first, second = (ProtoNetTrainer(partial(Embedder, trunk), loss=loss) for _ in range(2))
    assert len(list(first.parameters())) == 3
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


@pytest.mark.parametrize(
    "miner",
    [None, partial(MultiSimilarityMiner, epsilon=0.5), partial(TripletMarginMiner, margin=0.5)],
    ids=["no miner", "ms miner", "triplet miner"],
)
@pytest.mark.parametrize(
    "loss",
    [
        PrototypicalLoss,
        partial(PrototypicalLoss, CosineSimilarity(), scale=10, learn_scale=True),
        TripletMarginLoss,
        NTXentLoss,
        ContrastiveLoss,
        MultiSimilarityLoss,
        CircleLoss,
        SupConLoss,
    ],
    ids=lambda part: getattr(part, "__name__", "cosine"),
)
def test_losses_of_pml_train(loss: type[BaseMetricLossFunction] | partial, miner: partial | None) -> None:
    trainer = ProtoNetTrainer(embedder(), loss=loss(), miner=miner)
    before, after = two_steps(trainer, episode())
    assert after < before
    assert trainer.batch_accuracy is not None


def test_learned_scale_is_among_the_trainers_parameters() -> None:
    trainer = ProtoNetTrainer(embedder(), loss=PrototypicalLoss(scale=0.5, learn_scale=True))
    two_steps(trainer, episode())
    assert isinstance(trainer.loss, PrototypicalLoss)
    assert trainer.loss.log_scale.exp().item() != pytest.approx(0.5)


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance",
    [LpDistance(normalize_embeddings=False, power=2), LpDistance(p=1), CosineSimilarity(), SNRDistance()],
    ids=["euclid", "l1", "cosine", "snr"],
)
@pytest.mark.parametrize("loss", [PrototypicalLoss, TripletMarginLoss], ids=["prototypical", "triplet"])
def test_classify_ranks_by_the_distance_of_the_loss(distance: BaseDistance, loss: type[BaseMetricLossFunction]) -> None:
    trainer = ProtoNetTrainer(embedder(), loss=loss(distance=distance))
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(2, WAYS, SHOTS, DIMS, generator=generator)
    query = torch.randn(2, 7, DIMS, generator=generator)
    logits = trainer.classify(support, query)
    assert logits.shape == (2, 7, WAYS)
    for e in range(2):
        prototypes = torch.stack([support[e, way].mean(0) for way in range(WAYS)])
        values = distance(query[e], prototypes)
        torch.testing.assert_close(logits[e], values if distance.is_inverted else -values)


def test_default_loss_classifies_by_squared_euclid() -> None:
    trainer = ProtoNetTrainer(embedder())
    generator = torch.Generator().manual_seed(3)
    support, query = (torch.randn(1, WAYS, SHOTS, DIMS, generator=generator) for _ in range(2))
    logits = trainer.classify(support, query.flatten(1, 2))
    expected = -(query.flatten(1, 2).unsqueeze(2) - support.mean(2).unsqueeze(1)).square().sum(3)
    torch.testing.assert_close(logits, expected)


def test_logits_are_those_that_the_loss_takes_the_cross_entropy_of() -> None:
    trainer, batch = ProtoNetTrainer(embedder()), episode()
    support = trainer.embedder(batch.support.flatten(0, 2)).unflatten(0, (1, WAYS, SHOTS))
    query = trainer.embedder(batch.query.flatten(0, 2)).unsqueeze(0)
    logits = trainer.classify(support, query)[0]
    truth = torch.arange(WAYS).repeat_interleave(QUERIES)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, truth), trainer(batch))


@pytest.mark.parametrize("kind", [LpDistance, CosineSimilarity, SNRDistance])
def test_distance_that_collects_statistics_trains_and_judges(kind: type[BaseDistance]) -> None:
    plain, noting = (
        ProtoNetTrainer(embedder(), loss=PrototypicalLoss(kind(collect_stats=collect))) for collect in (False, True)
    )
    assert torch.equal(noting(episode(tasks=2)), plain(episode(tasks=2)))
    assert noting.loss.distance.initial_avg_query_norm > 0


def test_bank_is_the_embedding_of_the_set_in_eval_mode() -> None:
    torch.manual_seed(0)
    trainer = ProtoNetTrainer(Embedder(Conv4(channels=4)))
    trainer.train()
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (6, 1, 16, 16), generator=generator, dtype=torch.uint8)
    bank = trainer.bank(FewShotDataset(images, torch.arange(6) // 2, ["a", "b", "c"]))
    assert trainer.embedder.training
    trainer.eval()
    torch.testing.assert_close(bank, trainer.embedder(images / 255).detach(), rtol=1e-4, atol=1e-6)
    assert not bank.requires_grad


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_too_many_turns_raise() -> None:
    with pytest.raises(ValueError, match=r"expected at most 3 turns of 2 shots and 4 queries, got 4; lower turns"):
        ProtoNetTrainer(embedder(), turns=4)(episode())


@pytest.mark.parametrize("turns", [0, -1, 1.5, True])
def test_turns_must_be_a_count(turns: object) -> None:
    with pytest.raises(ValueError, match="turns"):
        ProtoNetTrainer(embedder(), turns=turns)  # type: ignore[arg-type]


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="mner"):
        ProtoNetTrainer(embedder(), mner=None)  # type: ignore[call-arg]
