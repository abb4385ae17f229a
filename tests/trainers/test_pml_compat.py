"""What PML does not do by itself, beside what test_base has: distances of losses, NCALoss without pairs."""

import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import nn

from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.pml_compat import distance_of
from tests.trainers import material as m


def test_distance_of_a_loss_is_that_within_a_wrapper_or_of_the_first() -> None:
    distance = CosineSimilarity()
    first, second = pml.ContrastiveLoss(distance=distance), pml.ContrastiveLoss(distance=LpDistance())
    both = pml.MultipleLosses([first, second]), pml.MultipleLosses({"z": first, "a": second})
    for loss in (first, pml.CrossBatchMemory(first, m.DIMS), pml.SelfSupervisedLoss(first), *both):
        assert distance_of(loss) is distance
    assert distance_of(nn.Linear(2, 2)) is None


def test_nca_without_pairs_in_the_batch_learns_from_what_else_there_is() -> None:
    """Its NaN for a batch without pairs is a zero only where there is nothing else to compare with."""
    lone, one_query = m.batch(torch.arange(m.CLASSES)), Episode(m.episode().support, m.episode().query[:, :, :1])
    trainer = MetricTrainer(m.embedder(), pml.NCALoss()).double()
    query, support = (trainer.embedder(images.flatten(0, 2)) for images in (one_query.query, one_query.support))
    expected = pml.NCALoss()(query, m.ways_of(1), None, support, m.ways_of(m.SHOTS))
    assert expected > 0
    torch.testing.assert_close(trainer(one_query), expected)
    assert not trainer(lone).requires_grad
    remembering = MetricTrainer(m.embedder(), pml.CrossBatchMemory(pml.NCALoss(), m.DIMS, 8)).double()
    remembering(m.batch(torch.arange(m.CLASSES), seed=1))
    assert remembering(lone) > 0
    assert MetricTrainer(m.embedder(), pml.ProxyNCALoss(m.CLASSES, m.DIMS)).double()(lone) > 0
