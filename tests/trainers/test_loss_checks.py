"""Losses that cannot learn from what they are given are refused by name, with what to use instead."""

import pytest
import torch
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MarginLoss,
    MultipleLosses,
    NormalizedSoftmaxLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SoftTripleLoss,
)
from torch import nn
from torch.optim import SGD

from pml_fewshot.batches import Batch
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.loss_checks import num_classes
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer

DIMS = 4


def embedder() -> Embedder:
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(9, DIMS)))


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 1, 3, 3, generator=torch.Generator().manual_seed(0))


def batch(labels: tuple[int, ...] = (0, 0, 1, 1), two_views: bool = False) -> Batch:
    return Batch(images(len(labels)), torch.tensor(labels), images(len(labels)) if two_views else None)


EPISODE = Episode(images(1, 3, 2), images(1, 3, 4))


@pytest.mark.parametrize("trainer", [ProtoNetTrainer, MatchingTrainer])
def test_batches_for_a_trainer_of_episodes_raise(trainer: type) -> None:
    with pytest.raises(ValueError, match=r"expected an Episode, got a Batch; .*MetricTrainer"):
        trainer(embedder())(batch())


def test_matching_networks_take_no_other_loss() -> None:
    with pytest.raises(ValueError, match="expected a MatchingLoss, got a PrototypicalLoss; use ProtoNetTrainer"):
        MatchingTrainer(embedder(), PrototypicalLoss())


@pytest.mark.parametrize(
    "loss",
    [
        ArcFaceLoss(9, DIMS),
        MarginLoss(num_classes=9),
        CrossBatchMemory(ContrastiveLoss(), DIMS, 30),
        MultipleLosses([NTXentLoss(), MarginLoss(num_classes=9)]),
    ],
)
def test_what_keeps_something_of_each_class_is_refused_on_episodes(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match="keeps something of each class, and an episode's labels are places in it"):
        SiameseTrainer(embedder(), loss)(EPISODE)


def test_a_margin_for_each_class_is_refused_on_episodes() -> None:
    with pytest.raises(ValueError, match="got MarginLoss: it keeps something of each class"):
        MetricTrainer(embedder(), MarginLoss(num_classes=9))(EPISODE)
    assert MetricTrainer(embedder(), MarginLoss())(EPISODE).isfinite()


@pytest.mark.parametrize("trainer", [MetricTrainer, SiameseTrainer])
def test_a_memory_that_cannot_hold_a_batch_raises(trainer: type) -> None:
    with pytest.raises(ValueError, match="expected batches of at most 3, the memory_size of CrossBatchMemory, got 4"):
        trainer(embedder(), CrossBatchMemory(ContrastiveLoss(), DIMS, 3))(batch())


@pytest.mark.parametrize("trainer", [MetricTrainer, SiameseTrainer])
def test_too_few_classes_raise(trainer: type) -> None:
    with pytest.raises(ValueError, match="expected labels below 2, the num_classes of ArcFaceLoss, got 5"):
        trainer(embedder(), ArcFaceLoss(2, DIMS))(batch((0, 0, 5, 5)))


def test_the_second_view_is_not_ignored() -> None:
    with pytest.raises(ValueError, match="expected batches of one view, got two"):
        SiameseTrainer(embedder())(batch(two_views=True))


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        (ArcFaceLoss(7, DIMS), 7),
        (NormalizedSoftmaxLoss(7, DIMS), 7),
        (ProxyNCALoss(7, DIMS), 7),
        (ProxyAnchorLoss(7, DIMS), 7),
        (SoftTripleLoss(7, DIMS), 7),
        (MarginLoss(num_classes=7), 7),
        (MarginLoss(), 0),
        (MarginLoss(learn_beta=True), 0),
        (NTXentLoss(), 0),
        (nn.Linear(2, 2), 0),
    ],
)
def test_classes_that_a_loss_has_weights_for(loss: nn.Module, classes: int) -> None:
    assert num_classes(loss) == classes


def test_nothing_to_train_raises() -> None:
    trainer = MetricTrainer(embedder(), NTXentLoss())
    optimizer = SGD(trainer.parameters(), lr=0.1)
    trainer.requires_grad_(False)
    with pytest.raises(ValueError, match="expected at least one parameter to train"):
        fit(trainer, [batch()], optimizer, 1, progress=False)
