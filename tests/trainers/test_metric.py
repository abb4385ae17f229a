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
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.evaluation.heads import Head, nearest_neighbour, nearest_prototype
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import fit
from tests.trainers import material as m

Rows = list[list[float]]
MARGIN, MINED = 0.2, TripletMarginMiner(margin=0.05)
ABOVE = 0.15  # a triplet that MINED keeps is violated by more than that


def trainer_of(loss: Any = None, miner: Any = None, **options: Any) -> MetricTrainer:
    return MetricTrainer(m.embedder(), loss, miner, **options).double()


def embed_each(trainer: MetricTrainer, images: Tensor) -> Tensor:
    return torch.cat([trainer.embedder(image[None]) for image in images]).detach()


def rows_of(trainer: MetricTrainer, images: Tensor) -> Rows:
    return m.unit_rows(embed_each(trainer, images))


# --- formulas ---------------------------------------------------------------------------------------------------------


def triplets(
    anchors: Rows,
    labels: list[int],
    others: Rows | None = None,
    other_labels: list[int] | None = None,
    own: int | None = 0,
    above: float = 0.0,
) -> float:
    """Mean over the violated triplets of anchors with others, among which the anchors themselves begin at `own`."""
    others, other_labels = others or anchors, other_labels or labels
    losses = [
        m.far(anchor, others[p]) - m.far(anchor, others[n]) + MARGIN
        for a, anchor in enumerate(anchors)
        for p, n in permutations(range(len(others)), 2)
        if labels[a] == other_labels[p] != other_labels[n] and (own is None or p != a + own)
    ]
    return m.mean([loss for loss in losses if loss > above])


def mined_triplets(rows: Rows, labels: list[int]) -> float:
    mined = triplets(rows, labels, above=ABOVE)
    assert mined != triplets(rows, labels), "a miner that keeps all tests nothing"
    return mined


def ntxent(rows: Rows, labels: list[int], temperature: float = 0.07) -> float:
    """Mean over ordered positive pairs: each against all negatives of its anchor."""
    losses = []
    for a, p in permutations(range(len(rows)), 2):
        if labels[a] == labels[p]:
            pair = math.exp(m.dot(rows[a], rows[p]) / temperature)
            negatives = [n for n in range(len(rows)) if labels[n] != labels[a]]
            losses.append(
                -math.log(pair / (pair + sum(math.exp(m.dot(rows[a], rows[n]) / temperature) for n in negatives)))
            )
    return m.mean(losses)


def multi_similarity(rows: Rows, labels: list[int]) -> float:
    losses = []
    for a, row in enumerate(rows):
        similar = [m.dot(row, rows[i]) for i in range(len(rows)) if i != a and labels[i] == labels[a]]
        other = [m.dot(row, rows[i]) for i in range(len(rows)) if labels[i] != labels[a]]
        pull = math.log1p(sum(math.exp(-2 * (s - 0.5)) for s in similar)) / 2
        losses.append(pull + math.log1p(sum(math.exp(50 * (s - 0.5)) for s in other)) / 50)
    return m.mean(losses)


# --- batches and episodes ---------------------------------------------------------------------------------------------

TRIPLET = pml.TripletMarginLoss(MARGIN)
BATCHES: dict[str, tuple[nn.Module | None, nn.Module | None, Callable[[Rows, list[int]], float]]] = {
    "default": (None, None, multi_similarity),
    "triplets": (TRIPLET, None, triplets),
    "mined triplets": (TRIPLET, MINED, mined_triplets),
    "weighted": (
        pml.MultipleLosses([pml.NTXentLoss(), TRIPLET], weights=[1.0, 0.3]),
        None,
        lambda rows, labels: ntxent(rows, labels) + 0.3 * triplets(rows, labels),
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


@pytest.mark.parametrize("miner", [None, MINED])
def test_queries_are_compared_with_the_support_of_their_episode(miner: TripletMarginMiner | None) -> None:
    trainer, given = trainer_of(TRIPLET, miner, support_rotations=3), m.episode(2)
    labels, support_labels = ([way for way in range(m.WAYS) for _ in range(count)] for count in (m.QUERIES, m.SHOTS))
    each = [
        triplets(
            m.unit_rows(query.flatten(0, 1)),
            labels,
            m.unit_rows(support.flatten(0, 1)),
            support_labels,
            own=None,
            above=ABOVE if miner else 0.0,
        )
        for support, query in m.rotations(trainer, given, 3)
    ]
    assert trainer(given).item() == pytest.approx(m.mean(each), rel=1e-9)


# --- two views --------------------------------------------------------------------------------------------------------


def test_self_supervised_loss_tells_the_views_of_an_image_from_all_others() -> None:
    """The labels of the classes count for nothing."""
    given, own = m.batch(views=2), list(range(len(m.LABELS)))
    assert given.other_view is not None
    trainer = trainer_of(pml.SelfSupervisedLoss(pml.NTXentLoss()))
    first, second = rows_of(trainer, given.images), rows_of(trainer, given.other_view)
    assert trainer(given).item() == pytest.approx(ntxent(first + second, own + own), rel=1e-9)
    one_direction = trainer_of(pml.SelfSupervisedLoss(TRIPLET, symmetric=False))
    assert one_direction(given).item() == pytest.approx(triplets(first, own, second, own, own=None), rel=1e-9)


# --- what a loss remembers --------------------------------------------------------------------------------------------


def test_memory_compares_a_batch_with_those_before() -> None:
    trainer = trainer_of(pml.CrossBatchMemory(TRIPLET, m.DIMS, 12))
    rows: Rows = []
    labels: list[int] = []
    for step in range(4):  # 5 + 5 + 5 + 5 items in 12 places
        given = m.batch(torch.tensor([0, 1, 0, 2, 1]), seed=step)
        new, own = rows_of(trainer, given.images), given.labels.tolist()
        rows, labels = (rows + new)[-12:], (labels + own)[-12:]
        expected = triplets(new, own, rows, labels, own=len(rows) - len(new))
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
    def session(steps: int, name: str, seed: int = 0, resume: bool = False) -> MetricTrainer:
        trainer = MetricTrainer(m.embedder(seed), loss)
        stream = BatchStream(m.tiny_set(), BatchSpec(3, 2), seed, RandomAffine())
        optimizer = Adam(trainer.parameters(), lr=0.05)
        fit(trainer, stream, optimizer, steps, checkpoint=tmp_path / name, resume=resume, progress=False)
        return trainer

    expected = session(6, "whole.pt").state_dict()
    session(cut, "cut.pt")
    resumed = session(6, "cut.pt", seed=99, resume=True).state_dict()
    assert resumed.keys() == expected.keys()
    assert {"loss.remembered", "loss._extra_state"} & expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


# --- evaluation -------------------------------------------------------------------------------------------------------


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
    ],
)
def test_classify_is_by_the_distance_of_the_loss(
    trainer: Any, loss: Any, head: Head, similarity: Callable[..., float]
) -> None:
    made = trainer(m.embedder(), loss, **({} if head is nearest_prototype else {"head": head}))  # that is the default
    generator = torch.Generator().manual_seed(3)
    support, query = (torch.randn(2, *shape, m.DIMS, generator=generator) for shape in [(m.WAYS, m.SHOTS), (5,)])
    logits = made.classify(support, query)
    assert logits.shape == (2, 5, m.WAYS)
    for (e, n, way), logit in zip(product(range(2), range(5), range(m.WAYS)), logits.flatten().tolist(), strict=True):
        items = support[e, way] if head is nearest_neighbour else support[e, way].mean(0, keepdim=True)
        expected = max(similarity(query[e, n].tolist(), item) for item in items.tolist())
        assert logit == pytest.approx(expected, rel=1e-4, abs=1e-5)
