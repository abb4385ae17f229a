"""SiameseTrainer: its loss is that of all pairs of a batch or an episode, written in loops; the similarity learns."""

import copy
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor
from torch.optim import Adam

from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import Head, mean_similarity, nearest_neighbour
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

LABELS = torch.tensor([7, 0, 7, 2**40, 0, 7, -3, 0])  # -3 and 2**40 stand alone


def similarity(seed: int = 5) -> WeightedL1Similarity:
    """One that has learned something already: weights of both signs and a threshold."""
    made = WeightedL1Similarity(m.DIMS)
    with torch.no_grad():
        made.score.weight.copy_(torch.randn(m.DIMS, generator=torch.Generator().manual_seed(seed)))
        made.score.bias.fill_(0.3)
    return made


def all_pairs() -> SiameseTrainer:
    return SiameseTrainer(m.embedder(), PairVerificationLoss(similarity(), balanced=False)).double()


def score(trainer: SiameseTrainer, first: Tensor, second: Tensor) -> float:
    """The weighted sum of |q - r|, dimension by dimension."""
    assert isinstance(trainer.distance, WeightedL1Similarity)
    weight, bias = trainer.distance.score.weight.tolist(), trainer.distance.score.bias.item()
    differences = [abs(a - b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return bias + sum(w * d for w, d in zip(weight, differences, strict=True))


def cross_entropy(logit: float, same: bool) -> float:
    return math.log1p(math.exp(-logit if same else logit))


def sets(trainer: SiameseTrainer, given: Batch | Episode) -> list[tuple[list[Tensor], list[int]]]:
    """Embeddings and labels of a batch, or of each episode class by class, embedded image by image."""
    if isinstance(given, Batch):
        return [([trainer.embedder(image[None])[0].detach() for image in given.images], given.labels.tolist())]
    found = []
    for support, query in zip(given.support, given.query, strict=True):
        items = [(way, image) for way in range(m.WAYS) for image in [*support[way], *query[way]]]
        found.append(([trainer.embedder(image[None])[0].detach() for _, image in items], [way for way, _ in items]))
    return found


def pairs(trainer: SiameseTrainer, given: Batch | Episode) -> list[list[tuple[float, bool]]]:
    """Score, and whether it is of one class, of each ordered pair of each set."""
    return [
        [(score(trainer, rows[i], rows[j]), labels[i] == labels[j]) for i, j in permutations(range(len(rows)), 2)]
        for rows, labels in sets(trainer, given)
    ]


GIVEN = pytest.mark.parametrize("given", [m.batch(LABELS), m.episode(3)], ids=["batch", "episodes"])

# --- the loss ---------------------------------------------------------------------------------------------------------


@GIVEN
def test_loss_is_the_mean_over_all_pairs_of_a_batch_or_of_each_episode(given: Any) -> None:
    trainer = all_pairs()
    expected = m.mean([m.mean([cross_entropy(*pair) for pair in each]) for each in pairs(trainer, given)])
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


def test_default_loss_draws_as_many_pairs_of_either_kind() -> None:
    trainer, given = SiameseTrainer(m.embedder()), m.floats(m.episode())
    assert trainer.loss.balanced
    assert isinstance(trainer.distance, WeightedL1Similarity)
    drawn_the_same_way = copy.deepcopy(trainer.loss)
    ((rows, labels),) = sets(trainer, given)
    torch.testing.assert_close(trainer(given), drawn_the_same_way(torch.stack(rows), torch.tensor(labels)))


# --- learning ---------------------------------------------------------------------------------------------------------


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
    groups = trainer.parameter_groups(loss_lr=0.1)
    assert [len(group["params"]) for group in groups] == [2, 2]
    history = fit(trainer, [m.batch(), m.batch(seed=1)], Adam(groups, lr=0.0), 2, progress=False)
    assert history.skipped == 0
    assert isinstance(trainer.distance, WeightedL1Similarity)
    weight = trainer.distance.score.weight
    assert (weight.shape, weight.dtype) == ((m.DIMS,), torch.float64)
    assert not torch.isclose(weight, torch.full_like(weight, -(m.DIMS**-0.5))).any()
    assert torch.equal(trainer.embedder.trunk[1].weight, m.embedder().double().trunk[1].weight)
    again = SiameseTrainer(m.embedder(1)).double()
    again.load_state_dict(trainer.state_dict())
    support, query = torch.rand(1, m.WAYS, m.SHOTS, m.DIMS).double(), torch.rand(1, 4, m.DIMS).double()
    assert torch.equal(again.classify(support, query), trainer.classify(support, query))


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
    trainer = SiameseTrainer(m.embedder(), PairVerificationLoss(similarity())).double()
    m.assert_skipped(trainer, m.batch(labels), m.batch(torch.arange(3).repeat_interleave(3), seed=4))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, mean_similarity, nearest_neighbour])
def test_classify_scores_a_class_by_its_items(head: Head | None) -> None:
    options: dict[str, Any] = {} if head is None else {"head": head}
    trainer = SiameseTrainer(m.embedder(), PairVerificationLoss(similarity()), **options).double()
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(2, m.WAYS, m.SHOTS, m.DIMS, generator=generator, dtype=torch.float64)
    query = torch.randn(2, 5, m.DIMS, generator=generator, dtype=torch.float64)
    logits = trainer.classify(support, query)
    assert logits.shape == (2, 5, m.WAYS)
    for e in range(2):
        for n in range(5):
            for way in range(m.WAYS):
                scores = [score(trainer, query[e, n], item) for item in support[e, way]]
                expected = max(scores) if head is nearest_neighbour else m.mean(scores)
                assert logits[e, n, way].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_accuracy_of_episodes_is_that_of_the_head() -> None:
    trainer, given = all_pairs(), m.episode(3)
    trainer(given)
    correct = []
    for rows, _ in sets(trainer, given):
        ways = [rows[start : start + m.SHOTS + m.QUERIES] for start in range(0, len(rows), m.SHOTS + m.QUERIES)]
        for own, items in enumerate(ways):
            for query in items[m.SHOTS :]:
                scores = [sum(score(trainer, query, item) for item in way[: m.SHOTS]) for way in ways]
                correct.append(scores.index(max(scores)) == own)
    assert 0 < sum(correct) < len(correct) == 3 * m.WAYS * m.QUERIES
    accuracy = trainer.accuracy(given)
    assert accuracy is not None
    assert accuracy.item() == pytest.approx(m.mean(correct))
