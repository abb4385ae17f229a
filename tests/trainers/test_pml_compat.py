"""What PML does not do by itself: refusals by name, classes and distances of losses, NCALoss without pairs."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import nn

from pml_fewshot.checks import UsageError
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.base import EpisodicTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.pml_compat import distance_of
from pml_fewshot.trainers.siamese import SiameseTrainer
from tests.trainers import material as m


def assert_refused(trainer: EpisodicTrainer, spec: Any, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer.check(m.splits(), [spec])
    with pytest.raises(UsageError, match=message):
        trainer(m.floats(given))


@pytest.mark.parametrize(
    ("trainer", "loss", "name"),
    [
        (SiameseTrainer, pml.ArcFaceLoss(9, m.DIMS), "ArcFaceLoss"),
        (SiameseTrainer, pml.CrossBatchMemory(pml.ContrastiveLoss(), m.DIMS, 30), "CrossBatchMemory"),
        (SiameseTrainer, pml.MultipleLosses([pml.NTXentLoss(), pml.MarginLoss(num_classes=9)]), "MarginLoss"),
        (MetricTrainer, pml.MarginLoss(num_classes=9), "MarginLoss"),
    ],
)
def test_what_keeps_something_of_each_class_is_refused_on_episodes(trainer: Any, loss: nn.Module, name: str) -> None:
    message = f"got {name}: it keeps something of each class, and an episode's labels are places in it; train it on"
    assert_refused(trainer(m.embedder(), loss), EpisodeSpec(m.WAYS, m.SHOTS, m.QUERIES), m.episode(), message)


@pytest.mark.parametrize("trainer", [SiameseTrainer, MetricTrainer])
def test_labels_beyond_the_margins_of_a_loss_in_a_memory_are_refused(trainer: Any) -> None:
    def with_classes(count: int) -> EpisodicTrainer:
        return trainer(m.embedder(), pml.CrossBatchMemory(pml.MarginLoss(num_classes=count), m.DIMS, 32))

    message = (
        f"expected labels below {m.CLASSES - 1}, the num_classes of MarginLoss, got label {m.CLASSES - 1}; give it"
    )
    assert_refused(with_classes(m.CLASSES - 1), BatchSpec(4, 2), m.batch(), message)
    with_classes(m.CLASSES).check(m.splits(), [BatchSpec(4, 2)])
    assert with_classes(m.CLASSES)(m.floats(m.batch())).isfinite()


def test_distance_of_a_loss_is_that_within_a_wrapper_or_of_the_first() -> None:
    distance = CosineSimilarity()
    first, second = pml.ContrastiveLoss(distance=distance), pml.ContrastiveLoss(distance=LpDistance())
    both = pml.MultipleLosses([first, second]), pml.MultipleLosses({"z": first, "a": second})
    for loss in (first, pml.CrossBatchMemory(first, m.DIMS), pml.SelfSupervisedLoss(first), *both):
        assert distance_of(loss) is distance
    assert distance_of(nn.Linear(2, 2)) is None


LONE = m.batch(torch.arange(m.CLASSES))


def test_nca_without_pairs_in_the_batch_learns_from_what_else_there_is() -> None:
    """Its NaN for a batch without pairs is a zero only where there is nothing else to compare with (see test_base)."""
    one_query = Episode(m.episode().support, m.episode().query[:, :, :1])
    trainer = MetricTrainer(m.embedder(), pml.NCALoss()).double()
    query, support = (trainer.embedder(images.flatten(0, 2)) for images in (one_query.query, one_query.support))
    labels = torch.arange(m.WAYS)
    expected = pml.NCALoss()(query, labels, None, support, labels.repeat_interleave(m.SHOTS))
    assert expected > 0
    torch.testing.assert_close(trainer(one_query), expected)
    assert not trainer(LONE).requires_grad
    remembering = MetricTrainer(m.embedder(), pml.CrossBatchMemory(pml.NCALoss(), m.DIMS, 8)).double()
    remembering(m.batch(torch.arange(m.CLASSES), seed=1))
    assert remembering(LONE) > 0
    assert MetricTrainer(m.embedder(), pml.ProxyNCALoss(m.CLASSES, m.DIMS)).double()(LONE) > 0
