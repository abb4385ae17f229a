"""MetricTrainer: its loss is that of PML written out in loops; what the loss keeps is trained, saved and resumed."""

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.evaluation.heads import Head, mean_similarity, nearest_neighbour, nearest_prototype
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

MINED = TripletMarginMiner(margin=0.05)
ABOVE = 0.15  # a triplet that MINED keeps is violated by more than that


def trainer_of(loss: Any = None, miner: Any = None, **options: Any) -> MetricTrainer:
    return MetricTrainer(m.embedder(), loss, miner, **options).double()


def rows_of(trainer: MetricTrainer, images: Tensor) -> m.Rows:
    return m.unit_rows(torch.cat([trainer.embedder(image[None]) for image in images]).detach())


def mined_triplets(rows: m.Rows, labels: list[int], **options: Any) -> float:
    mined = m.triplets(rows, labels, **(options or {"above": ABOVE}))
    assert mined != m.triplets(rows, labels), "a miner that keeps all tests nothing"
    return mined


def ntxent(rows: m.Rows, labels: list[int], temperature: float = 0.07) -> float:
    """Mean over ordered positive pairs: each against all negatives of its anchor."""
    losses = []
    for a, p in permutations(range(len(rows)), 2):
        if labels[a] == labels[p]:
            pair = math.exp(m.dot(rows[a], rows[p]) / temperature)
            others = [m.dot(rows[a], rows[n]) for n in range(len(rows)) if labels[n] != labels[a]]
            losses.append(-math.log(pair / (pair + sum(math.exp(other / temperature) for other in others))))
    return m.mean(losses)


def multi_similarity(rows: m.Rows, labels: list[int]) -> float:
    losses = []
    for a, row in enumerate(rows):
        similar = [m.dot(row, rows[i]) for i in range(len(rows)) if i != a and labels[i] == labels[a]]
        other = [m.dot(row, rows[i]) for i in range(len(rows)) if labels[i] != labels[a]]
        pull = math.log1p(sum(math.exp(-2 * (s - 0.5)) for s in similar)) / 2
        losses.append(pull + math.log1p(sum(math.exp(50 * (s - 0.5)) for s in other)) / 50)
    return m.mean(losses)


TRIPLET = pml.TripletMarginLoss(m.MARGIN)
BATCHES: dict[str, tuple[nn.Module | None, nn.Module | None, Callable[[m.Rows, list[int]], float]]] = {
    "default": (None, None, multi_similarity),
    "triplets": (TRIPLET, None, m.triplets),
    "mined triplets": (TRIPLET, MINED, mined_triplets),
    "hardest triplets": (TRIPLET, BatchHardMiner(), partial(mined_triplets, hardest=True)),
    "weighted": (
        pml.MultipleLosses([pml.NTXentLoss(), TRIPLET], weights=[1.0, 0.3]),
        None,
        lambda rows, labels: ntxent(rows, labels) + 0.3 * m.triplets(rows, labels),
    ),
    "a miner of its own": (
        pml.MultipleLosses({"a": pml.NTXentLoss(), "b": TRIPLET}, miners={"b": MINED}),
        None,
        lambda rows, labels: ntxent(rows, labels) + mined_triplets(rows, labels),
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_loss_of_a_batch_is_the_formula(name: str) -> None:
    loss, miner, by_hand = BATCHES[name]
    trainer, given = trainer_of(loss, miner), m.batch()
    expected = by_hand(rows_of(trainer, given.images), m.LABELS.tolist())
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("miner", "options"), [(None, {}), (MINED, {"above": ABOVE}), (BatchHardMiner(), {"hardest": True})]
)
def test_queries_are_compared_with_the_support_of_their_episode(miner: Any, options: dict[str, Any]) -> None:
    trainer, given = trainer_of(TRIPLET, miner, support_rotations=3), m.episode(2)
    labels, support_labels = m.ways_of(m.QUERIES).tolist(), m.ways_of(m.SHOTS).tolist()
    each = []
    for support, query in m.rotations(trainer, given, 3):
        rows, others = m.unit_rows(query.flatten(0, 1)), m.unit_rows(support.flatten(0, 1))
        each.append(m.triplets(rows, labels, others, support_labels, own=None, **options))
    assert trainer(given).item() == pytest.approx(m.mean(each), rel=1e-9)


def test_self_supervised_loss_tells_the_views_of_an_image_from_all_others() -> None:
    """The labels of the classes count for nothing."""
    given, own = m.batch(views=2), list(range(len(m.LABELS)))
    assert given.other_view is not None
    trainer = trainer_of(pml.SelfSupervisedLoss(pml.NTXentLoss()))
    first, second = rows_of(trainer, given.images), rows_of(trainer, given.other_view)
    assert trainer(given).item() == pytest.approx(ntxent(first + second, own + own), rel=1e-9)
    one_direction = trainer_of(pml.SelfSupervisedLoss(TRIPLET, symmetric=False))
    assert one_direction(given).item() == pytest.approx(m.triplets(first, own, second, own, own=None), rel=1e-9)


def test_memory_compares_a_batch_with_those_before() -> None:
    trainer = trainer_of(pml.CrossBatchMemory(TRIPLET, m.DIMS, 12))
    rows: m.Rows = []
    labels: list[int] = []
    for step in range(4):  # 5 + 5 + 5 + 5 items in 12 places
        given = m.batch(torch.tensor([0, 1, 0, 2, 1]), seed=step)
        new, own = rows_of(trainer, given.images), given.labels.tolist()
        rows, labels = (rows + new)[-12:], (labels + own)[-12:]
        expected = m.triplets(new, own, rows, labels, own=len(rows) - len(new))
        assert trainer(given).item() == pytest.approx(expected, rel=1e-6)


def memory(size: int) -> Any:
    return partial(pml.CrossBatchMemory, partial(pml.ContrastiveLoss), m.DIMS, size)


@pytest.mark.parametrize(
    ("loss", "cut"),
    [
        (memory(64), 3),  # not filled within 6 steps of 6 items
        (memory(14), 1),  # overwritten in the middle of a batch
        (memory(14), 5),
        (memory(6), 3),  # one batch large
        (partial(pml.DynamicSoftMarginLoss), 3),  # a running histogram
        (partial(PairVerificationLoss), 3),  # draws its pairs
    ],
)
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(loss: Any, cut: int, tmp_path: Path) -> None:
    def session(steps: int, name: str, seed: int = 0, resume: bool = False) -> dict[str, Any]:
        trainer = MetricTrainer(m.embedder(seed), loss)
        stream = BatchStream(m.tiny_set(), BatchSpec(3, 2), seed, RandomAffine())
        optimizer = Adam(trainer.parameters(), lr=0.05)
        fit(trainer, stream, optimizer, steps, checkpoint=tmp_path / name, resume=resume, progress=False)
        return trainer.state_dict()

    expected = session(6, "whole.pt")
    session(cut, "cut.pt")
    resumed = session(6, "cut.pt", seed=99, resume=True)
    assert resumed.keys() == expected.keys()
    assert {"loss.remembered", "loss._extra_state"} & expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def l1(first: list[float], second: list[float]) -> float:
    lengths = [sum(map(abs, row)) for row in (first, second)]  # PML scales by the norm of the distance
    return -sum(abs(a / lengths[0] - b / lengths[1]) for a, b in zip(first, second, strict=True))


def square(first: list[float], second: list[float]) -> float:
    return -(m.far(first, second) ** 2)


def cosine(first: list[float], second: list[float]) -> float:
    return m.dot(first, second) / math.sqrt(m.dot(first, first) * m.dot(second, second))


def snr(query: list[float], item: list[float]) -> float:
    """Not symmetric: minus the variance of the difference over that of the query, both of length 1."""
    first, second = (torch.tensor(row) / torch.tensor(row).norm() for row in (query, item))
    return -float((first - second).var() / first.var())


L1, COSINE = pml.ContrastiveLoss(distance=LpDistance(p=1)), pml.ContrastiveLoss(distance=CosineSimilarity())


@pytest.mark.parametrize(
    ("trainer", "loss", "head", "similarity"),
    [
        (ProtoNetTrainer, None, nearest_prototype, square),
        (ProtoNetTrainer, PrototypicalLoss(SNRDistance(), scale=2), nearest_neighbour, snr),  # logits are unscaled
        (MetricTrainer, L1, nearest_neighbour, l1),
        (MetricTrainer, pml.CrossBatchMemory(COSINE, m.DIMS), nearest_prototype, cosine),
        (MetricTrainer, pml.MultipleLosses([COSINE, L1]), nearest_prototype, cosine),
        (SiameseTrainer, COSINE, mean_similarity, cosine),
        (SiameseTrainer, L1, nearest_neighbour, l1),
    ],
)
def test_classify_is_by_the_distance_of_the_loss(
    trainer: Any, loss: Any, head: Head, similarity: Callable[..., float]
) -> None:
    made = trainer(m.embedder(), loss, **({"head": head} if head is nearest_neighbour else {}))  # the others by default
    support, query = m.embedded(torch.float32)
    logits = made.classify(support, query)
    assert logits.shape == (2, 7, m.WAYS)
    combined = m.mean if head is mean_similarity else max
    for (e, n, way), logit in zip(product(range(2), range(7), range(m.WAYS)), logits.flatten().tolist(), strict=True):
        items = support[e, way].mean(0, keepdim=True) if head is nearest_prototype else support[e, way]
        expected = combined([similarity(query[e, n].tolist(), item) for item in items.tolist()])
        assert logit == pytest.approx(expected, rel=1e-4, abs=1e-5)
