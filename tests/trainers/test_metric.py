"""MetricTrainer: its loss is that of PML written out in loops, what the loss keeps is trained, saved and resumed."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MarginLoss,
    MultipleLosses,
    MultiSimilarityLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
    TripletMarginLoss,
    VICRegLoss,
)
from pytorch_metric_learning.miners import BaseMiner, BatchHardMiner, MultiSimilarityMiner, TripletMarginMiner
from torch import Tensor, nn
from torch.optim import Adam

from pml_fewshot.batches import Batch, BatchSpec
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import Episode
from pml_fewshot.evaluation.heads import nearest_neighbour
from pml_fewshot.trainers.fit import History, fit
from pml_fewshot.trainers.metric import MetricTrainer

WAYS, SHOTS, QUERIES, SIZE, DIMS, CLASSES = 3, 2, 4, 5, 6, 4
LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 2, 0])  # 1 and 2 stand alone


def embedder(seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, DIMS)))


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)


def batch(labels: Tensor = LABELS, seed: int = 0, views: int = 1) -> Batch:
    return Batch(images(len(labels), seed), labels, images(len(labels), seed + 100) if views == 2 else None)


def episode(tasks: int = 1, seed: int = 0) -> Episode:
    every = images(tasks * WAYS * (SHOTS + QUERIES), seed).unflatten(0, (tasks, WAYS, SHOTS + QUERIES))
    return Episode(every[:, :, :SHOTS], every[:, :, SHOTS:])


def tiny_set(classes: int = CLASSES, items: int = 10) -> FewShotDataset:
    """Each class is a pattern of its own with noise upon it."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(40, 216, (classes, 1, 1, SIZE, SIZE), generator=generator)
    noisy = (pattern + torch.randint(-60, 61, (classes, items, 1, SIZE, SIZE), generator=generator)).clamp(0, 255)
    names = [str(c) for c in range(classes)]
    return FewShotDataset(noisy.byte().flatten(0, 1), torch.arange(classes).repeat_interleave(items), names)


def trainer_of(loss: Any = None, miner: Any = None, **options: Any) -> MetricTrainer:
    torch.manual_seed(1)  # of the loss, where it is a factory
    return MetricTrainer(embedder(), loss, miner, **options).double()


def unit_rows(trainer: MetricTrainer, some: Tensor) -> list[list[float]]:
    """Embeddings of images, each by itself and of length 1."""
    rows = [trainer.embedder(image[None])[0].tolist() for image in some]
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def far(first: Sequence[float], second: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def triplet_loss(
    anchors: list[list[float]],
    anchor_labels: list[int],
    others: list[list[float]],
    other_labels: list[int],
    margin: float,
    same_items: bool,
    at_least: float = 0.0,
) -> float:
    """Mean over the violated triplets (PML averages those above zero), of Euclid between vectors of length 1.

    A miner with the margin `at_least` less keeps only the triplets violated by more than that.
    """
    losses = []
    for a, anchor in enumerate(anchors):
        for p, positive in enumerate(others):
            for n, negative in enumerate(others):
                if anchor_labels[a] != other_labels[p] or anchor_labels[a] == other_labels[n]:
                    continue
                if not (same_items and a == p):
                    loss = far(anchor, positive) - far(anchor, negative) + margin
                    losses += [loss] if loss > at_least else []
    assert losses, "no triplet is violated: nothing is tested"
    return mean(losses)


def ntxent(rows: list[list[float]], labels: list[int], temperature: float = 0.07) -> float:
    """Mean over ordered positive pairs: each against all negatives of its anchor."""
    losses = []
    for a, p in permutations(range(len(rows)), 2):
        if labels[a] == labels[p]:
            pair = math.exp(dot(rows[a], rows[p]) / temperature)
            negatives = [
                math.exp(dot(rows[a], rows[n]) / temperature) for n in range(len(rows)) if labels[n] != labels[a]
            ]
            losses.append(-math.log(pair / (pair + sum(negatives))))
    return mean(losses)


# --- batches: the loss is the explicit one ----------------------------------------------------------------------------


def test_default_loss_is_multi_similarity_over_all_pairs() -> None:
    trainer, given = trainer_of(), batch()
    assert isinstance(trainer.loss, MultiSimilarityLoss)
    assert trainer.miner is None
    rows, labels = unit_rows(trainer, given.images), LABELS.tolist()
    losses = []
    for a, row in enumerate(rows):
        similar = [dot(row, rows[i]) for i in range(len(rows)) if i != a and labels[i] == labels[a]]
        other = [dot(row, rows[i]) for i in range(len(rows)) if labels[i] != labels[a]]
        losses.append(
            math.log1p(sum(math.exp(-2 * (s - 0.5)) for s in similar)) / 2
            + math.log1p(sum(math.exp(50 * (s - 0.5)) for s in other)) / 50
        )
    assert trainer(given).item() == pytest.approx(mean(losses), rel=1e-9)


def test_ntxent_of_a_batch() -> None:
    trainer, given = trainer_of(NTXentLoss()), batch()
    expected = ntxent(unit_rows(trainer, given.images), LABELS.tolist())
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mined", [False, True])
def test_triplets_of_a_batch(mined: bool) -> None:
    miner = TripletMarginMiner(margin=0.05) if mined else None
    trainer, given = trainer_of(TripletMarginLoss(margin=0.2), miner), batch()
    rows, labels = unit_rows(trainer, given.images), LABELS.tolist()
    # a triplet's margin of at most 0.05 is a loss of at least 0.15
    by_hand = [triplet_loss(rows, labels, rows, labels, 0.2, True, 0.15 if m else 0.0) for m in (False, True)]
    assert by_hand[0] != by_hand[1], "a miner that keeps all tests nothing"
    assert trainer(given).item() == pytest.approx(by_hand[mined], rel=1e-9)


def test_hardest_pairs_of_each_anchor() -> None:
    trainer, given = trainer_of(TripletMarginLoss(margin=1.0), BatchHardMiner()), batch()
    rows, labels = unit_rows(trainer, given.images), LABELS.tolist()
    losses = []
    for a, row in enumerate(rows):
        similar = [far(row, rows[i]) for i in range(len(rows)) if i != a and labels[i] == labels[a]]
        other = [far(row, rows[i]) for i in range(len(rows)) if labels[i] != labels[a]]
        losses += [max(similar) - min(other) + 1.0] if similar else []
    assert trainer(given).item() == pytest.approx(mean([loss for loss in losses if loss > 0]), rel=1e-9)


def test_permuting_the_items_changes_nothing() -> None:
    trainer, given = trainer_of(miner=MultiSimilarityMiner()), batch()
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(trainer(Batch(given.images[order], LABELS[order])), trainer(given))


def test_batch_norm_sees_the_whole_batch_and_both_views_together() -> None:
    torch.manual_seed(0)
    trainer = MetricTrainer(Embedder(Conv4(channels=4)), SelfSupervisedLoss(NTXentLoss()))
    seen: list[Tensor] = []
    trainer.embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 6, 1, 16, 16, generator=generator)
    trainer(Batch(first, torch.arange(6), second))
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat([first, second]))


def test_loss_is_computed_in_float32_under_autocast() -> None:
    given = batch(views=2)
    two_views = Batch(given.images.float(), LABELS, given.other_view.float())  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        for loss, some in ((None, Batch(given.images.float(), LABELS)), (VICRegLoss(), two_views)):
            assert MetricTrainer(embedder(), loss)(some).dtype == torch.float32


# --- episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(("tasks", "turns"), [(1, 1), (3, 1), (2, 3)])
def test_queries_are_compared_with_the_support_of_their_episode(tasks: int, turns: int, mined: bool) -> None:
    miner = TripletMarginMiner(margin=0.05) if mined else None
    trainer, given = trainer_of(TripletMarginLoss(margin=0.2), miner, turns=turns), episode(tasks)
    each = []
    for every in torch.cat([given.support, given.query], dim=2):
        for turn in range(turns):
            inside = list(range(turn * SHOTS, (turn + 1) * SHOTS))
            outside = [i for i in range(SHOTS + QUERIES) if i not in inside]
            query, support = (unit_rows(trainer, every[:, part].flatten(0, 1)) for part in (outside, inside))
            labels = [[way for way in range(WAYS) for _ in part] for part in (outside, inside)]
            at_least = 0.15 if mined else 0.0
            each.append(triplet_loss(query, labels[0], support, labels[1], 0.2, False, at_least))
    assert trainer(given).item() == pytest.approx(mean(each), rel=1e-9)


def test_batch_accuracy_of_episodes_is_that_of_the_nearest_prototype() -> None:
    trainer, given = trainer_of(TripletMarginLoss(distance=LpDistance(normalize_embeddings=False))), episode(tasks=2)
    trainer(given)
    correct = []
    for support, query in zip(given.support, given.query, strict=True):
        prototypes = [trainer.embedder(way).mean(0).tolist() for way in support]
        for way in range(WAYS):
            for q in trainer.embedder(query[way]).tolist():
                distances = [far(q, prototype) for prototype in prototypes]
                correct.append(distances.index(min(distances)) == way)
    assert 0 < sum(correct) < len(correct)
    assert trainer.batch_accuracy is not None
    assert trainer.batch_accuracy.item() == pytest.approx(mean(correct))


def test_batches_and_episodes_train_one_and_the_same_trainer() -> None:
    trainer = trainer_of()
    history = fit(trainer, [batch(), episode()], Adam(trainer.parameters()), 2, progress=False)
    assert (history.steps, history.skipped) == (2, 0)


# --- two views --------------------------------------------------------------------------------------------------------


def test_self_supervised_loss_tells_the_views_of_an_image_from_all_others() -> None:
    trainer, given = trainer_of(SelfSupervisedLoss(NTXentLoss())), batch(views=2)
    assert given.other_view is not None
    rows = unit_rows(trainer, given.images) + unit_rows(trainer, given.other_view)
    expected = ntxent(rows, 2 * list(range(len(LABELS))))  # the labels of the classes count for nothing
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


def test_self_supervised_loss_in_one_direction() -> None:
    trainer, given = trainer_of(SelfSupervisedLoss(TripletMarginLoss(0.2), symmetric=False)), batch(views=2)
    assert given.other_view is not None
    first, second = unit_rows(trainer, given.images), unit_rows(trainer, given.other_view)
    own = list(range(len(LABELS)))
    assert trainer(given).item() == pytest.approx(triplet_loss(first, own, second, own, 0.2, False), rel=1e-9)


def test_vicreg_of_two_views() -> None:
    trainer, given = trainer_of(VICRegLoss(invariance_lambda=20, variance_mu=30, covariance_v=2)), batch(views=2)
    assert given.other_view is not None
    views = [[trainer.embedder(image[None])[0].tolist() for image in some] for some in (given.images, given.other_view)]
    count = len(LABELS)
    invariance = mean([mean([(a - b) ** 2 for a, b in zip(*rows, strict=True)]) for rows in zip(*views, strict=True)])
    variance, covariance = 0.0, 0.0
    for rows in views:
        centre = [mean(column) for column in zip(*rows, strict=True)]
        apart = [[x - c for x, c in zip(row, centre, strict=True)] for row in rows]
        cov = [[sum(r[i] * r[j] for r in apart) / (count - 1) for j in range(DIMS)] for i in range(DIMS)]
        variance += mean([max(0.0, 1 - math.sqrt(cov[d][d] + 1e-4)) for d in range(DIMS)]) / 2
        covariance += sum(cov[i][j] ** 2 for i, j in permutations(range(DIMS), 2)) / DIMS
    expected = 20 * invariance + 30 * variance + 2 * covariance
    assert trainer(given).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [partial(SelfSupervisedLoss, NTXentLoss()), VICRegLoss])
def test_self_supervised_losses_train_on_a_stream_of_two_views(loss: Callable[[], nn.Module]) -> None:
    trainer = MetricTrainer(embedder(), loss)
    stream = BatchStream(tiny_set(), BatchSpec(4, 4, views=2), 0, RandomAffine(degrees=15))
    history = fit(trainer, stream, Adam(trainer.parameters(), lr=0.02), 60, progress=False)
    assert history.skipped == 0
    assert history.losses[-1][1] < 0.8 * history.losses[0][1]


def test_miner_with_two_views_is_refused() -> None:
    trainer = trainer_of(SelfSupervisedLoss(NTXentLoss()), MultiSimilarityMiner())
    with pytest.raises(ValueError, match=r"expected no miner .*, got MultiSimilarityMiner; drop it"):
        trainer(batch(views=2))


LABELLED = [
    MultiSimilarityLoss,
    TripletMarginLoss,
    partial(ArcFaceLoss, CLASSES, DIMS),
    partial(CrossBatchMemory, ContrastiveLoss(), DIMS),
    partial(MultipleLosses, [NTXentLoss()]),
]


@pytest.mark.parametrize("loss", LABELLED, ids=lambda part: getattr(part, "func", part).__name__)
def test_two_views_and_a_loss_that_wants_labels_are_refused(loss: Callable[[], nn.Module]) -> None:
    name = getattr(loss, "func", loss).__name__
    with pytest.raises(
        ValueError, match=f"expected a loss without labels for batches of two views, .*got {name}; wrap"
    ):
        trainer_of(loss())(batch(views=2))


@pytest.mark.parametrize("loss", [partial(SelfSupervisedLoss, NTXentLoss()), VICRegLoss])
def test_one_view_and_a_loss_that_wants_two_are_refused(loss: Callable[[], nn.Module]) -> None:
    name = getattr(loss, "func", loss).__name__
    with pytest.raises(
        ValueError, match=rf"expected two views of each image for {name}, got one; use BatchSpec\(views=2"
    ):
        trainer_of(loss())(batch())


# --- several losses ---------------------------------------------------------------------------------------------------


def test_several_losses_are_added_with_their_weights() -> None:
    trainer = trainer_of(MultipleLosses([NTXentLoss(), TripletMarginLoss(0.2)], weights=[1.0, 0.3]))
    rows, labels = unit_rows(trainer, batch().images), LABELS.tolist()
    expected = ntxent(rows, labels) + 0.3 * triplet_loss(rows, labels, rows, labels, 0.2, True)
    assert trainer(batch()).item() == pytest.approx(expected, rel=1e-9)


def test_each_of_several_losses_may_have_its_own_miner() -> None:
    several = MultipleLosses(
        {"a": NTXentLoss(), "b": TripletMarginLoss(0.2)}, miners={"b": TripletMarginMiner(margin=0.05)}
    )
    trainer = trainer_of(several)
    rows, labels = unit_rows(trainer, batch().images), LABELS.tolist()
    expected = ntxent(rows, labels) + triplet_loss(rows, labels, rows, labels, 0.2, True, 0.15)
    assert trainer(batch()).item() == pytest.approx(expected, rel=1e-9)


# --- losses with weights of their own ---------------------------------------------------------------------------------


def test_arcface_with_its_class_weights() -> None:
    trainer, given = trainer_of(partial(ArcFaceLoss, CLASSES, DIMS, margin=20, scale=8)), batch()
    weights = trainer.loss.W.detach().T.tolist()
    centres = [[x / math.sqrt(dot(row, row)) for x in row] for row in weights]
    losses = []
    for row, label in zip(unit_rows(trainer, given.images), LABELS.tolist(), strict=True):
        cosines = [dot(row, centre) for centre in centres]
        angle = math.acos(cosines[label])
        assert angle <= math.pi - math.radians(20)
        cosines[label] = math.cos(angle + math.radians(20))
        exponentials = [math.exp(8 * c) for c in cosines]
        losses.append(-math.log(exponentials[label] / sum(exponentials)))
    assert trainer(given).item() == pytest.approx(mean(losses), rel=1e-6)  # its weights were made as float32


def test_proxy_anchor_with_its_proxies() -> None:
    trainer, given = trainer_of(partial(ProxyAnchorLoss, CLASSES + 1, DIMS, margin=0.2, alpha=16)), batch()
    proxies = [[x / math.sqrt(dot(row, row)) for x in row] for row in trainer.loss.proxies.detach().tolist()]
    rows, labels = unit_rows(trainer, given.images), LABELS.tolist()
    attract, repel = [], []
    for c, proxy in enumerate(proxies):
        own = [math.exp(-16 * (dot(r, proxy) - 0.2)) for r, label in zip(rows, labels, strict=True) if label == c]
        other = [math.exp(16 * (dot(r, proxy) + 0.2)) for r, label in zip(rows, labels, strict=True) if label != c]
        attract += [math.log1p(sum(own))] if own else []
        repel.append(math.log1p(sum(other)))
    expected = mean(attract) + mean(repel)
    assert trainer(given).item() == pytest.approx(expected, rel=1e-6)


def test_margin_loss_with_a_threshold_for_each_class() -> None:
    loss = MarginLoss(margin=0.3, beta=0.9, nu=0.1, learn_beta=True, num_classes=CLASSES)
    with torch.no_grad():
        loss.beta.copy_(torch.tensor([0.5, 0.7, 0.9, 1.1]))
    trainer, given = trainer_of(loss), batch()
    beta = loss.beta.tolist()
    rows, labels = unit_rows(trainer, given.images), LABELS.tolist()
    total, violated, anchors = 0.0, 0, []
    for a, p, n in permutations(range(len(rows)), 3):
        if labels[a] == labels[p] != labels[n]:
            attract = max(0.0, far(rows[a], rows[p]) - beta[labels[a]] + 0.3)
            repel = max(0.0, beta[labels[a]] - far(rows[a], rows[n]) + 0.3)
            total += attract + repel
            violated += (attract > 0) + (repel > 0)
            anchors.append(labels[a])
    expected = (total + 0.1 * sum(beta[label] for label in anchors)) / violated
    assert trainer(given).item() == pytest.approx(expected, rel=1e-6)


WITH_WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "ArcFaceLoss": partial(ArcFaceLoss, CLASSES, DIMS),
    "ProxyAnchorLoss": partial(ProxyAnchorLoss, CLASSES, DIMS),
    "MarginLoss": partial(MarginLoss, learn_beta=True, num_classes=CLASSES),
    "NormalizedSoftmaxLoss": partial(pml_losses.NormalizedSoftmaxLoss, CLASSES, DIMS),
    "ProxyNCALoss": partial(pml_losses.ProxyNCALoss, CLASSES, DIMS),
    "SoftTripleLoss": partial(pml_losses.SoftTripleLoss, CLASSES, DIMS, centers_per_class=2),
    "SubCenterArcFaceLoss": partial(pml_losses.SubCenterArcFaceLoss, num_classes=CLASSES, embedding_size=DIMS),
    "learned distance": lambda: ContrastiveLoss(distance=WeightedL1Similarity(DIMS), pos_margin=1.0, neg_margin=-1.0),
    "within others": lambda: MultipleLosses([NTXentLoss(), ArcFaceLoss(CLASSES, DIMS)]),
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_of_a_loss_are_trained_saved_and_loaded_with_the_trainer(name: str) -> None:
    trainer = trainer_of(WITH_WEIGHTS[name])
    before = {key: weight.detach().clone() for key, weight in trainer.named_parameters()}
    assert any(key.startswith("loss.") for key in before)
    fit(trainer, [batch(seed=i) for i in range(3)], Adam(trainer.parameters(), lr=0.05), 3, progress=False)
    for key, weight in trainer.named_parameters():
        assert not torch.equal(weight, before[key]), f"{key} was not trained"
    torch.manual_seed(7)
    other = MetricTrainer(embedder(7), WITH_WEIGHTS[name]).double()
    trainer.train()  # fit leaves it in eval mode
    assert other(batch()).item() != trainer(batch()).item()
    other.load_state_dict(trainer.state_dict())
    assert torch.equal(other(batch()), trainer(batch()))


@pytest.mark.parametrize("name", [name for name in WITH_WEIGHTS if name != "learned distance"])
def test_labels_beyond_the_weights_of_a_loss_are_refused(name: str) -> None:
    given = batch(torch.tensor([0, 0, CLASSES, CLASSES, 1, 1]))
    of = "ArcFaceLoss" if name == "within others" else name
    message = f"expected labels below {CLASSES}, the num_classes of {of}, got {CLASSES}; .*at least {CLASSES + 1}"
    with pytest.raises(ValueError, match=message):
        trainer_of(WITH_WEIGHTS[name])(given)


def test_labels_beyond_the_thresholds_of_a_loss_in_a_memory_are_refused() -> None:
    memory = CrossBatchMemory(MarginLoss(learn_beta=True, num_classes=2), DIMS, 32)
    with pytest.raises(ValueError, match="expected labels below 2, the num_classes of MarginLoss, got 3"):
        trainer_of(memory)(batch())


# --- every loss of PML ------------------------------------------------------------------------------------------------

ABSTRACT = {"BaseLossWrapper", "BaseMetricLossFunction", "GenericPairLoss"}
MADE: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in WITH_WEIGHTS.items() if name.endswith("Loss")},
    **{
        name: partial(getattr(pml_losses, name), num_classes=CLASSES, embedding_size=DIMS)
        for name in ("CosFaceLoss", "LargeMarginSoftmaxLoss", "SphereFaceLoss")
    },
    "P2SGradLoss": partial(pml_losses.P2SGradLoss, DIMS, CLASSES),
    "RankedListLoss": partial(pml_losses.RankedListLoss, margin=0.4, Tn=5),
    "CrossBatchMemory": lambda: CrossBatchMemory(ContrastiveLoss(), DIMS, 24),
    "MultipleLosses": lambda: MultipleLosses([NTXentLoss(), TripletMarginLoss()]),
}
OF_TWO_VIEWS = {"SelfSupervisedLoss", "VICRegLoss"}
WITHOUT_LABELS = {"ManifoldLoss"}  # draws the classes itself
EXPORTED = [
    name
    for name, part in vars(pml_losses).items()
    if inspect.isclass(part) and issubclass(part, nn.Module) and name not in ABSTRACT
]


# numpy warns of scipy's results that become tensors, and torch of a list of indices, both in PML
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("name", sorted(set(EXPORTED) - OF_TWO_VIEWS - WITHOUT_LABELS))
def test_every_loss_of_labels_is_called_as_pml_has_it_and_trains(name: str) -> None:
    torch.manual_seed(3)
    loss = MADE.get(name, getattr(pml_losses, name))()
    labels = torch.arange(CLASSES).repeat_interleave(3)
    trainer, apart = trainer_of(loss), copy.deepcopy(loss).double()
    given = batch(labels)
    torch.testing.assert_close(trainer(given), apart(embedder().double()(given.images), labels))
    torch.manual_seed(3)
    fresh = trainer_of(MADE.get(name, getattr(pml_losses, name)))
    history = fit(fresh, [given] * 12, Adam(fresh.parameters(), lr=0.01), 12, progress=False)
    assert history.losses[0][0] == 1
    assert history.losses[1][1] < history.losses[0][1]  # of step 1, and of those after


def test_manifold_loss_is_called_without_labels() -> None:
    loss = pml_losses.ManifoldLoss(DIMS, K=3)
    trainer, apart = trainer_of(loss), copy.deepcopy(loss).double()
    embedded = embedder().double()(batch().images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = apart(embedded)
        torch.manual_seed(5)
        torch.testing.assert_close(trainer(batch()), expected)
    history = fit(trainer, [batch()] * 2, Adam(trainer.parameters(), lr=0.01), 2, progress=False)
    assert history.skipped == 0


# --- a memory of batches before ---------------------------------------------------------------------------------------


def test_memory_compares_a_batch_with_those_before() -> None:
    trainer = trainer_of(CrossBatchMemory(TripletMarginLoss(margin=0.2), DIMS, 12))
    rows: list[list[float]] = []
    labels: list[int] = []
    for step in range(4):  # 5 + 5 + 5 + 5 items in 12 places
        given = batch(torch.tensor([0, 1, 0, 2, 1]), seed=step)
        new, own = unit_rows(trainer, given.images), given.labels.tolist()
        rows, labels = (rows + new)[-12:], (labels + own)[-12:]
        losses = []
        for a, row in enumerate(new):
            for p, n in permutations(range(len(rows)), 2):
                itself = p == len(rows) - len(new) + a
                if labels[p] == own[a] != labels[n] and not itself:
                    losses.append(far(row, rows[p]) - far(row, rows[n]) + 0.2)
        expected = mean([loss for loss in losses if loss > 0])
        assert trainer(given).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_miner_beside_a_memory_is_refused(nested: bool) -> None:
    """PML would take its numbers of items of the batch for places in the memory."""
    memory = CrossBatchMemory(ContrastiveLoss(), DIMS, 24)
    with pytest.raises(
        ValueError, match=r"expected no miner beside CrossBatchMemory.*, got TripletMarginMiner; give it"
    ):
        trainer_of(MultipleLosses([NTXentLoss(), memory]) if nested else memory, TripletMarginMiner())(batch())


def test_miner_of_a_memory_mines_in_the_memory() -> None:
    """Triplets of an item of the batch with any two in the memory, if it were not for the miner."""
    loss = TripletMarginLoss(margin=0.2)
    trainer = trainer_of(CrossBatchMemory(loss, DIMS, 20, miner=TripletMarginMiner(margin=0.05)))
    trainer(batch(seed=0))
    given = batch(seed=1)
    rows = unit_rows(trainer, batch(seed=0).images) + unit_rows(trainer, given.images)
    labels = 2 * LABELS.tolist()
    losses = []
    for a in range(8, 16):
        for p, n in permutations(range(16), 2):
            if p != a and labels[p] == labels[a] != labels[n]:
                losses.append(far(rows[a], rows[p]) - far(rows[a], rows[n]) + 0.2)
    expected = mean([loss for loss in losses if loss >= 0.15])
    assert trainer(given).item() == pytest.approx(expected, rel=1e-6)


def memory_trainer(memory_size: int, seed: int = 0) -> MetricTrainer:
    return MetricTrainer(embedder(seed), CrossBatchMemory(ContrastiveLoss(), DIMS, memory_size))


# not filled within 6 steps of 6 items, filled and overwritten in the middle of a batch, and one batch large
@pytest.mark.parametrize("memory_size", [64, 36, 18, 14, 6])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resumed_memory_goes_on_bit_for_bit(memory_size: int, cut: int, tmp_path: Path) -> None:
    def sitting(steps: int, name: str, seed: int = 0, resume: bool = False) -> tuple[MetricTrainer, History]:
        trainer = memory_trainer(memory_size, seed)
        stream = BatchStream(tiny_set(), BatchSpec(3, 2), seed, RandomAffine())
        optimizer = Adam(trainer.parameters(), lr=0.05)
        history = fit(trainer, stream, optimizer, steps, checkpoint=tmp_path / name, resume=resume, progress=False)
        return trainer, history

    whole, _ = sitting(6, "whole.pt")
    first, _ = sitting(cut, "cut.pt")
    assert first.loss.queue_idx == 6 * cut % memory_size
    resumed, history = sitting(6, "cut.pt", seed=99, resume=True)
    assert history.steps == 6
    assert resumed.loss.queue_idx == whole.loss.queue_idx == 36 % memory_size
    assert resumed.loss.has_been_filled == whole.loss.has_been_filled == (memory_size <= 36)
    for name, value in whole.state_dict().items():
        other = resumed.state_dict()[name]
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name


def test_histogram_of_dynamic_soft_margin_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def sitting(steps: int, name: str, seed: int = 0, resume: bool = False) -> MetricTrainer:
        trainer = MetricTrainer(embedder(seed), pml_losses.DynamicSoftMarginLoss())
        stream = BatchStream(tiny_set(), BatchSpec(3, 3), seed)
        optimizer = Adam(trainer.parameters(), lr=0.05)
        fit(trainer, stream, optimizer, steps, checkpoint=tmp_path / name, resume=resume, progress=False)
        return trainer

    whole = sitting(6, "whole.pt")
    sitting(3, "cut.pt")
    resumed = sitting(6, "cut.pt", seed=99, resume=True)
    assert whole.loss.hist_.any()
    assert torch.equal(resumed.loss.hist_, whole.loss.hist_)
    assert all(torch.equal(*pair) for pair in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_memory_in_a_list_of_losses_is_kept_too() -> None:
    def make(seed: int) -> MetricTrainer:
        several = MultipleLosses(
            [CrossBatchMemory(ContrastiveLoss(), DIMS, 20), NTXentLoss(), CrossBatchMemory(NTXentLoss(), DIMS, 40)]
        )
        return MetricTrainer(embedder(seed), several).double()

    trainer, other = make(0), make(1)
    for step in range(3):
        trainer(batch(seed=step))
    other.load_state_dict(trainer.state_dict())
    memories = [[part for part in t.modules() if isinstance(part, CrossBatchMemory)] for t in (trainer, other)]
    assert [(m.queue_idx, m.has_been_filled) for m in memories[1]] == [(4, True), (24, False)]
    assert torch.equal(other(batch(seed=9)), trainer(batch(seed=9)))


# --- nothing to learn from --------------------------------------------------------------------------------------------


def assert_skipped(trainer: MetricTrainer, given: Batch | Episode, useful: Batch | None = None) -> None:
    """Two steps of training before give Adam a momentum, which must not move the weights any further."""
    optimizer = Adam(trainer.parameters(), lr=0.005)
    useful = batch(seed=4) if useful is None else useful
    before = fit(trainer, [useful, useful], optimizer, 2, progress=False)
    assert before.skipped == 0
    weights = {name: weight.clone() for name, weight in trainer.named_parameters()}
    slots = copy.deepcopy(optimizer.state_dict()["state"])
    assert slots
    history = fit(trainer, [given, useful, given], optimizer, 3, l2=0.1, progress=False)
    assert (history.steps, history.skipped) == (3, 2)
    assert all(weight.isfinite().all() for weight in trainer.parameters())
    assert not all(torch.equal(weight, weights[name]) for name, weight in trainer.named_parameters())
    weights = {name: weight.clone() for name, weight in trainer.named_parameters()}
    slots = copy.deepcopy(optimizer.state_dict()["state"])
    fit(trainer, [given], optimizer, 1, l2=0.1, progress=False)
    for name, weight in trainer.named_parameters():
        assert torch.equal(weight, weights[name]), name
    for number, slot in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, slots[number][name]) for name, value in slot.items())


@pytest.mark.parametrize(
    "miner", [TripletMarginMiner(margin=0.1), MultiSimilarityMiner(epsilon=-0.3)], ids=["triplets", "similarity"]
)
def test_miner_that_finds_nothing(miner: BaseMiner) -> None:
    """Every item of a class is one and the same image: no triplet is violated, no pair is hard."""
    same = Batch(images(3).repeat_interleave(2, dim=0), torch.arange(3).repeat_interleave(2))
    trainer = trainer_of(TripletMarginLoss(margin=0.5), miner)
    with torch.no_grad():
        trainer.embedder.trunk[1].weight.copy_(torch.eye(DIMS, SIZE * SIZE))
        trainer.embedder.trunk[1].bias.fill_(-0.5)
    assert not any(len(found) for found in miner(trainer.embedder(same.images), same.labels))
    value = trainer(same)
    assert (value.item(), value.requires_grad) == (0, False)
    optimizer = Adam(trainer.parameters(), lr=0.05)
    weights = copy.deepcopy(trainer.state_dict())
    history = fit(trainer, [same, same], optimizer, 2, progress=False)
    assert (history.steps, history.skipped) == (2, 2)
    assert not optimizer.state
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.named_parameters())


ONE_CLASS = batch(torch.full((6,), 2))


@pytest.mark.parametrize(
    "loss",
    [
        TripletMarginLoss,
        NTXentLoss,
        pml_losses.SupConLoss,
        pml_losses.CircleLoss,
        partial(MarginLoss, learn_beta=True, num_classes=CLASSES),
        partial(MultipleLosses, [TripletMarginLoss(), NTXentLoss()]),
    ],
    ids=lambda part: getattr(part, "func", part).__name__,
)
def test_batch_of_one_class_where_the_loss_wants_two(loss: Callable[[], nn.Module]) -> None:
    trainer = trainer_of(loss)
    assert not trainer(ONE_CLASS).requires_grad
    assert_skipped(trainer, ONE_CLASS)


@pytest.mark.parametrize("loss", [None, ContrastiveLoss, partial(ArcFaceLoss, CLASSES, DIMS)])
def test_batch_of_one_class_where_the_loss_can_learn_from_it(loss: Callable[[], nn.Module] | None) -> None:
    trainer = trainer_of(loss)
    history = fit(trainer, [ONE_CLASS] * 2, Adam(trainer.parameters(), lr=0.01), 2, progress=False)
    assert history.skipped == 0
    assert all(weight.isfinite().all() for weight in trainer.parameters())


def test_batch_without_two_items_of_a_class_is_skipped() -> None:
    assert_skipped(trainer_of(TripletMarginLoss), batch(torch.arange(4)))


@pytest.mark.parametrize("loss", [partial(TripletMarginLoss, margin=0.0), partial(MarginLoss, margin=0.0, beta=1e-7)])
def test_loss_of_exactly_zero_is_skipped(loss: Callable[[], nn.Module]) -> None:
    same = Batch(images(3).repeat_interleave(2, dim=0), torch.arange(3).repeat_interleave(2))
    assert_skipped(trainer_of(loss), same, batch(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), seed=4))


def test_loss_of_exactly_zero_over_two_views_is_skipped() -> None:
    given = batch(torch.arange(4))
    same = Batch(given.images, given.labels, given.images)
    assert_skipped(trainer_of(SelfSupervisedLoss(TripletMarginLoss(margin=0.0))), same, batch(seed=4, views=2))


def test_loss_of_exactly_zero_over_an_episode_is_skipped() -> None:
    given = episode().support[:, :, :1]
    same = Episode(given.expand(-1, -1, 2, -1, -1, -1), given.expand(-1, -1, 2, -1, -1, -1))
    assert_skipped(trainer_of(TripletMarginLoss(margin=0.0)), same)


def test_nan_is_not_skipped() -> None:
    given = batch()
    given.images[0] = float("nan")
    assert trainer_of()(given).requires_grad


def test_an_infinite_loss_and_a_tiny_one_are_not_skipped() -> None:
    trainer = trainer_of()
    trainer.loss = Scaled(1e-300)
    assert trainer(batch()).requires_grad
    trainer.loss = Scaled(float("inf"))
    assert trainer(batch()).requires_grad


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: object = None) -> Tensor:
        return embeddings.square().sum() * self.factor


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [LpDistance(p=1), CosineSimilarity()], ids=["l1", "cosine"])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("head", ["default", "nn"])
def test_classify_is_by_the_distance_of_the_loss(distance: BaseDistance, wrap: bool, head: str) -> None:
    loss: nn.Module = ContrastiveLoss(distance=distance)
    loss = CrossBatchMemory(loss, DIMS) if wrap else loss
    trainer = trainer_of(loss, **({} if head == "default" else {"head": nearest_neighbour}))
    generator = torch.Generator().manual_seed(3)
    support = torch.randn(2, WAYS, SHOTS, DIMS, generator=generator, dtype=torch.float64)
    query = torch.randn(2, 5, DIMS, generator=generator, dtype=torch.float64)
    logits = trainer.classify(support, query)
    assert logits.shape == (2, 5, WAYS)
    for e in range(2):
        for n in range(5):
            for way in range(WAYS):
                items = support[e, way].mean(0, keepdim=True) if head == "default" else support[e, way]
                values = distance(query[e, n : n + 1], items)[0]
                nearest = max(values.tolist()) if distance.is_inverted else max((-values).tolist())
                assert logits[e, n, way].item() == pytest.approx(nearest, rel=1e-9)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_factories_and_instances_are_both_accepted() -> None:
    given = MetricTrainer(
        embedder(), TripletMarginLoss(distance=CosineSimilarity()), TripletMarginMiner(margin=0.5), turns=2
    )
    torch.manual_seed(0)
    trunk = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, SIZE * SIZE, DIMS))
    made = MetricTrainer(
        partial(Embedder, trunk),
        partial(TripletMarginLoss, distance=CosineSimilarity),
        partial(TripletMarginMiner, margin=0.5),
        turns=2,
    )
    for some in (batch(), episode()):
        assert torch.equal(given.double()(some), made.double()(some))


def test_misspelt_keyword_raises() -> None:
    with pytest.raises(TypeError, match="mner"):
        MetricTrainer(embedder(), mner=None)  # type: ignore[call-arg]
