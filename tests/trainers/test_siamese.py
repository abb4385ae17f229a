"""SiameseTrainer: its loss is that of all pairs of a batch or an episode, written in loops; the similarity learns."""

import copy
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from torch import Tensor
from torch.optim import Adam

from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

LABELS = torch.tensor([7, 0, 7, 2**40, 0, 7, -3, 0])  # -3 and 2**40 stand alone
GIVEN = pytest.mark.parametrize("given", [m.batch(LABELS), m.episode(3)], ids=["batch", "episodes"])


def of_pairs(balanced: bool = False) -> SiameseTrainer:
    """Its similarity has learned something already: weights of both signs and a threshold."""
    similarity = WeightedL1Similarity(m.DIMS)
    with torch.no_grad():
        similarity.score.weight.copy_(torch.randn(m.DIMS, generator=torch.Generator().manual_seed(5)))
        similarity.score.bias.fill_(0.3)
    return SiameseTrainer(m.embedder(), PairVerificationLoss(similarity, balanced=balanced)).double()


def score(trainer: SiameseTrainer, first: Tensor, second: Tensor) -> float:
    """The weighted sum of |q - r|, dimension by dimension."""
    assert isinstance(trainer.distance, WeightedL1Similarity)
    differences = [abs(a - b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return trainer.distance.score.bias.item() + m.dot(trainer.distance.score.weight.tolist(), differences)


def sets(trainer: SiameseTrainer, given: Batch | Episode) -> list[tuple[Tensor, list[int]]]:
    """Embeddings and labels of a batch, or of each episode class by class, embedded image by image."""
    if isinstance(given, Batch):
        found = [(list(given.images), given.labels.tolist())]
    else:
        every = torch.cat([given.support, given.query], dim=2)
        found = [(list(one.flatten(0, 1)), m.ways_of(m.SHOTS + m.QUERIES).tolist()) for one in every]
    return [(torch.cat([trainer.embedder(image[None]) for image in items]).detach(), own) for items, own in found]


@GIVEN
def test_loss_is_the_mean_over_all_pairs_of_a_batch_or_of_each_episode(given: Any) -> None:
    trainer, each = of_pairs(), []
    for rows, labels in sets(trainer, given):
        pairs = [
            (score(trainer, rows[i], rows[j]), labels[i] == labels[j]) for i, j in permutations(range(len(rows)), 2)
        ]
        each.append(m.mean([math.log1p(math.exp(-logit if same else logit)) for logit, same in pairs]))
    assert trainer(given).item() == pytest.approx(m.mean(each), rel=1e-9)


@GIVEN
@pytest.mark.parametrize(
    ("miner", "options"), [(BatchHardMiner(), {"hardest": True}), (TripletMarginMiner(0.05), {"above": 0.15})]
)
def test_a_miner_chooses_among_all_triplets_of_a_batch_or_of_each_episode(
    given: Any, miner: Any, options: dict[str, Any]
) -> None:
    trainer = SiameseTrainer(m.embedder(), TripletMarginLoss(m.MARGIN), miner).double()
    each = [m.triplets(m.unit_rows(rows), labels, **options) for rows, labels in sets(trainer, given)]
    assert trainer(given).item() == pytest.approx(m.mean(each), rel=1e-9)


def test_default_loss_draws_as_many_pairs_of_either_kind() -> None:
    trainer, given = SiameseTrainer(m.embedder()), m.floats(m.episode())
    assert trainer.loss.balanced
    assert isinstance(trainer.distance, WeightedL1Similarity)
    drawn_the_same_way = copy.deepcopy(trainer.loss)
    ((rows, labels),) = sets(trainer, given)
    torch.testing.assert_close(trainer(given), drawn_the_same_way(rows, torch.tensor(labels)))


def test_it_learns_from_batches() -> None:
    trainer, data = SiameseTrainer(m.embedder()), m.tiny_set(8)
    evaluator, stream = EpisodicEvaluator(EpisodeSpec(5, 1, 5), 100), BatchStream(data, BatchSpec(4, 4), 0)
    before = evaluator.evaluate(trainer, data).mean
    history = fit(trainer, stream, Adam(trainer.parameters(), lr=0.02), 60, progress=False)
    assert history.losses[-1][1] < 0.8 * history.losses[0][1]
    assert evaluator.evaluate(trainer, data).mean > before + 0.1


def test_similarity_that_takes_its_width_from_the_first_batch_is_trained_and_saved() -> None:
    """The optimizer is made before the weights have a shape, with a group of their own."""
    trainer = SiameseTrainer(m.embedder()).double()
    groups = trainer.parameter_groups({"loss": 0.1})
    assert [len(group["params"]) for group in groups] == [2, 2]
    history = fit(trainer, [m.batch(), m.batch(seed=1)], Adam(groups, lr=0.0), 2, progress=False)
    assert history.skipped == 0
    weight = trainer.distance.score.weight  # type: ignore[union-attr]
    assert (weight.shape, weight.dtype) == ((m.DIMS,), torch.float64)
    assert not torch.isclose(weight, torch.full_like(weight, -(m.DIMS**-0.5))).any()
    assert torch.equal(trainer.embedder.trunk[1].weight, m.embedder().double().trunk[1].weight)
    again = SiameseTrainer(m.embedder(1)).double()
    again.load_state_dict(trainer.state_dict())
    assert torch.equal(again.classify(*m.embedded()), trainer.classify(*m.embedded()))


def test_training_whose_first_step_is_skipped_can_be_resumed(tmp_path: Path) -> None:
    """The similarity that takes its width from the first batch has seen none when the first checkpoint is written."""
    for steps, margin in ((1, -1e6), (3, 1e6)):
        trainer = SiameseTrainer(m.embedder(), miner=TripletMarginMiner(margin))
        optimizer, checkpoint = Adam(trainer.parameters(), lr=0.05), tmp_path / "last.pt"
        given = [m.floats(m.batch(LABELS))] * 3
        history = fit(trainer, given, optimizer, steps, checkpoint=checkpoint, resume=True, progress=False)
    assert (history.steps, history.skipped) == (3, 1)


@pytest.mark.parametrize("labels", [torch.full((6,), 3), torch.arange(6)], ids=["one class", "without a matching pair"])
def test_batch_without_pairs_of_both_kinds_is_skipped_where_the_loss_draws_both(labels: Tensor) -> None:
    m.assert_skipped(of_pairs(True), m.batch(labels), m.batch(torch.arange(3).repeat_interleave(3), seed=4))


def test_classes_are_scored_by_their_mean_similarity() -> None:
    trainer, given = of_pairs(), m.episode()
    (logits,) = trainer.classify(*(trainer.embed(part) for part in (given.support, given.query.flatten(1, 2))))
    for row, image in zip(logits, given.query[0].flatten(0, 1), strict=True):
        (query,) = trainer.embedder(image[None]).detach()
        each = [[score(trainer, query, item) for item in trainer.embedder(own).detach()] for own in given.support[0]]
        assert row.tolist() == pytest.approx([sum(scores) / m.SHOTS for scores in each])
