"""Every class that PML exports trains here, or stands in a list that says why not: no release of PML can slip by."""

import csv
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, testers, trainers
from pytorch_metric_learning.utils import inference
from torch import Tensor, nn
from torch.optim import SGD

import pml_fewshot
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import History, fit

CLASSES, ITEMS, SIDE, DIM = 6, 8, 4, 6
OURS = [PrototypicalLoss, MatchingLoss, PairVerificationLoss, DenseNTXentLoss, DenseTripletMarginLoss]


class TripletsOfTheFirstTwoClasses(miners.BaseMiner):
    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, ...]:
        first, second = (labels == 0).nonzero().flatten(), (labels == 1).nonzero().flatten()
        return first, first.roll(1), second


def named(module: ModuleType, names: str) -> list[type]:
    return [getattr(module, name) for name in names.split()]


WITH_CLASS_WEIGHTS: dict[type, Callable[..., Any]] = {
    losses.P2SGradLoss: partial(losses.P2SGradLoss, descriptors_dim=DIM, num_classes=CLASSES),
}
for kind in named(
    losses,
    "ArcFaceLoss CosFaceLoss LargeMarginSoftmaxLoss NormalizedSoftmaxLoss ProxyAnchorLoss ProxyNCALoss SoftTripleLoss "
    "SphereFaceLoss SubCenterArcFaceLoss",
):
    WITH_CLASS_WEIGHTS[kind] = partial(kind, num_classes=CLASSES, embedding_size=DIM)
NTXENT = partial(losses.NTXentLoss)
LEVELS = np.stack([np.arange(CLASSES), np.arange(CLASSES) // 2], axis=1).repeat(ITEMS, axis=0)
FACTORIES: dict[Any, Callable[..., Any]] = WITH_CLASS_WEIGHTS | {
    made.func: made
    for made in (
        partial(losses.BaseLossWrapper, NTXENT),
        partial(losses.CrossBatchMemory, NTXENT, DIM, memory_size=20),
        partial(losses.GenericPairLoss, mat_based_loss=False),
        partial(losses.ManifoldLoss, l=DIM, K=3),
        partial(losses.MarginLoss, learn_beta=True),
        partial(losses.MultipleLosses, {"pairs": NTXENT, "classes": partial(losses.ArcFaceLoss, CLASSES, DIM)}),
        partial(losses.RankedListLoss, margin=0.4, Tn=1),
        partial(losses.SelfSupervisedLoss, NTXENT),
        partial(MatchingLoss, scale=2),  # else a bounded distance is warned of
        partial(PairVerificationLoss, distance=partial(WeightedL1Similarity, DIM)),
        partial(PrototypicalLoss, scale=2),
        partial(WeightedL1Similarity, DIM),
        partial(distances.BatchedDistance, partial(distances.LpDistance), lambda mat, start, end: None),
        partial(reducers.ClassWeightedReducer, torch.linspace(0.5, 2, CLASSES)),
        partial(reducers.MultipleReducers, {"loss": reducers.SumReducer()}),
        partial(reducers.ThresholdReducer, low=0.01),
        partial(regularizers.SparseCentersRegularizer, CLASSES, 10),
        partial(samplers.FixedSetOfTriplets, num_triplets=16),
        partial(samplers.HierarchicalSampler, labels=LEVELS, batch_size=12, samples_per_class=3),
        partial(samplers.MPerClassSampler, m=3, batch_size=12, length_before_new_iter=48),
        partial(samplers.TuplesToWeightsSampler, miner=TripletsOfTheFirstTwoClasses(), dataloader_num_workers=0),
    )
}
OF_TWO_VIEWS = {losses.SelfSupervisedLoss, losses.VICRegLoss}
OF_ANY_VIEW = {losses.ManifoldLoss}  # takes neither labels nor a second view


Reason = tuple[str, str]

BASES = [*named(losses, "BaseMetricLossFunction BaseLossWrapper"), miners.BaseMiner, distances.BaseDistance]
BASES += [reducers.BaseReducer, regularizers.BaseRegularizer]
MIXINS = named(losses, "EmbeddingRegularizerMixin WeightRegularizerMixin")
CANNOT: dict[type, Reason] = {
    **dict.fromkeys(BASES, ("a base class", "NotImplementedError")),
    **dict.fromkeys(MIXINS, ("a base class", "UsageError: expected a PML loss, .*Mixin, which is no module")),
    losses.GenericPairLoss: ("a base class", "_compute_loss"),
    distances.BatchedDistance: ("returns nothing: it hands the matrix to a callback, block by block", "NoneType"),
    reducers.DoNothingReducer: ("returns the dictionary of losses, no scalar", "dict"),
}
OWN_WEIGHTS = "compares embeddings with weights of its own"
WITHIN_A_BATCH = "FastAPLoss HistogramLoss InstanceLoss NPairsLoss PNPLoss RankedListLoss SmoothAPLoss"
TAKES_NO_REFERENCE = "its forward has no place for a support set and its labels"
NOT_ON_EPISODES: dict[type, str] = {
    **dict.fromkeys([*WITH_CLASS_WEIGHTS, losses.ManifoldLoss], OWN_WEIGHTS),
    **dict.fromkeys(named(losses, WITHIN_A_BATCH), "compares the items of one batch"),
    losses.ThresholdConsistentMarginLoss: "takes ref_emb but looks the support's indices up among the queries",
    **dict.fromkeys((losses.CrossBatchMemory, losses.MultipleLosses, losses.SelfSupervisedLoss), TAKES_NO_REFERENCE),
    losses.VICRegLoss: "takes no labels",
}
DEPENDS_ON_ORDER: dict[type, Reason] = {
    losses.LiftedStructureLoss: ("takes a support item's number for a query's", "support in another order"),
}
ROWS = ("takes rows (a, p, n, a, ..) of one batch without a look at labels", "IndexError|AssertionError")
BLIND: dict[type, Reason] = {miners.EmbeddingsAlreadyPackagedAsTriplets: ROWS}  # on what is not made for it
ONLY_TWO_DIVIDE = ("only MarginLoss and ProxyAnchorLoss give a divisor", "KeyError: 'divisor'")
OF_CENTERS = ("of the weights of SoftTripleLoss: wants num_classes * centers_per_class rows", "IndexError")
NOT_TOGETHER: dict[tuple[type, type], Reason] = {
    **{(reducers.DivisorReducer, loss): ONLY_TWO_DIVIDE for loss in OURS},
    **{(regularizers.SparseCentersRegularizer, loss): OF_CENTERS for loss in (losses.NTXentLoss, *OURS)},
    (reducers.PerAnchorReducer, DenseTripletMarginLoss): ("PML has it for items and pairs", "reduction not supported"),
}


# What of PML is walked over is what this list names, from which the reference's tables are made. Nothing else pins it:
# what another release adds or drops fails one test until it is named there.
LIST = Path(__file__).parents[1] / "docs" / "reference" / "parts.csv"
with LIST.open(encoding="utf-8", newline="") as lines:
    DOCUMENTED = {row["part"]: row for row in csv.DictReader(lines)}
MODULES = (losses, miners, distances, reducers, regularizers, samplers)


def public(module: ModuleType) -> dict[str, type]:
    return {name: kind for name, kind in inspect.getmembers(module, inspect.isclass) if not name.startswith("_")}


def exported(module: ModuleType) -> list[type]:
    """The public classes of a module that are known."""
    return [kind for name, kind in public(module).items() if name in DOCUMENTED or kind in CANNOT]


LOSSES = exported(losses)
TRAINABLE = [kind for kind in LOSSES if kind not in CANNOT]
# LargeMarginSoftmaxLoss and HistogramLoss use what NumPy and torch have deprecated; PML's computations are right.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]


def by_name(value: object) -> str:
    return getattr(value, "__name__", str(value))


walk = partial(pytest.mark.parametrize, ids=by_name)


def tiny_set() -> FewShotDataset:
    """Each class is a pattern of its own with noise upon it."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(40, 216, (CLASSES, 1, 1, SIDE, SIDE), generator=generator)
    images = pattern + torch.randint(-60, 61, (CLASSES, ITEMS, 1, SIDE, SIDE), generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(ITEMS)
    return FewShotDataset(images.clamp(0, 255).byte().flatten(0, 1), labels, [f"class {c}" for c in range(CLASSES)])


DATA = tiny_set()


def embedder() -> Embedder:
    torch.manual_seed(0)  # PML's losses and miners draw from it too
    return Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, DIM, bias=False)))


def batches(views: int = 1, spec: BatchSpec | None = None, sampler: Any = None, **options: Any) -> BatchStream:
    augment = RandomAffine() if views == 2 else None
    return BatchStream(DATA, spec or BatchSpec(4, 3, views), 0, augment, sampler, **options)


def episodes() -> EpisodeStream:
    return EpisodeStream(DATA, EpisodeSpec(ways=4, shots=2, queries=3), 0)


def factory(kind: type) -> Callable[..., Any]:
    return FACTORIES.get(kind, partial(kind))


ON_EPISODES = [kind for kind in TRAINABLE if kind not in NOT_ON_EPISODES]
each_trainer = walk("trainer", [MetricTrainer, ProtoNetTrainer])
each_material = walk("material", [batches, episodes])


def train(trainer: FewShotTrainer, stream: Iterable[Any]) -> tuple[History, list[str]]:
    """Trains two steps; gives the history and the names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in trainer.named_parameters()}
    history = fit(trainer, stream, SGD(trainer.parameters(), lr=0.05), 2, progress=False)
    assert all(torch.isfinite(p).all() for p in trainer.parameters())
    return history, [name for name, p in trainer.named_parameters() if not torch.equal(p, before[name])]


def check_trains(trainer: FewShotTrainer, stream: Iterable[Any]) -> None:
    """Both steps have a finite loss and move the embedder and all that the loss learns."""
    learned = [name for name, p in trainer.named_parameters() if p.requires_grad]
    history, moved = train(trainer, stream)
    assert all(np.isfinite(loss) for _, loss in history.losses)
    assert (len(history.losses), history.skipped) == (2, 0)
    if isinstance(trainer.loss, DenseTripletMarginLoss):  # a bias cancels in its differences, but for rounding
        moved, learned = ([name for name in names if name != "loss.distance.score.bias"] for names in (moved, learned))
    assert moved == learned


def check_mined(mined: tuple[Tensor, ...], labels: Tensor, ref_labels: Tensor | None) -> None:
    """Something was mined, positives are of their anchor's class and negatives are not, and no item is its own."""
    anchors, positives, others, negatives = mined if len(mined) == 4 else (*mined[:2], mined[0], mined[2])
    assert min(len(anchors), len(others)) > 0
    if ref_labels is None:
        assert (anchors != positives).all()
    references = labels if ref_labels is None else ref_labels
    assert (labels[anchors] == references[positives]).all()
    assert (labels[others] != references[negatives]).all()


@contextmanager
def unless(reason: Reason | None) -> Iterator[None]:
    """Without a reason nothing may fail; with one it must fail, and the error must say so."""
    if reason is None:
        yield
        return
    why, error = reason
    with pytest.raises(Exception) as raised:  # noqa: PT011
        yield
    assert re.search(error, f"{raised.typename}: {raised.value}"), f"for a reason other than that it {why}"


def test_the_docs_name_all_that_pml_exports_and_nothing_else() -> None:
    added = {kind for module in MODULES for kind in public(module).values()} - {k for m in MODULES for k in exported(m)}
    assert not added, f"a new release of PML: name them in {LIST.name}, and the walks take them along: {added}"
    there = (name for module in (*MODULES, testers, trainers, inference, pml_fewshot) for name in dir(module))
    dropped = DOCUMENTED.keys() - set(there)
    assert not dropped, f"PML has them no more: drop them from {LIST.name} and the lists here: {dropped}"


def test_the_docs_say_where_a_loss_works() -> None:
    for kind in TRAINABLE:
        row = DOCUMENTED[kind.__name__]
        on_episodes = "no" if kind in NOT_ON_EPISODES else "with a flaw" if kind in DEPENDS_ON_ORDER else "yes"
        assert row["episodes"] == on_episodes, row
        assert row["batches"] == ("two views" if kind in OF_TWO_VIEWS else "yes"), row


@walk("kind", LOSSES)
def test_loss_trains_on_batches(kind: type[nn.Module]) -> None:
    with unless(CANNOT.get(kind)):
        check_trains(MetricTrainer(embedder(), factory(kind)), batches(2 if kind in OF_TWO_VIEWS else 1))


@each_trainer
@walk("kind", LOSSES)
def test_loss_trains_on_episodes_or_says_that_it_cannot(
    kind: type[nn.Module], trainer: Callable[..., FewShotTrainer]
) -> None:
    refused = rf"UsageError: .*compares queries with a support set .* got {kind.__name__}: .*BatchSpec"
    with unless((NOT_ON_EPISODES[kind], refused) if kind in NOT_ON_EPISODES else CANNOT.get(kind)):
        check_trains(trainer(embedder(), factory(kind)), episodes())


def check_same(trainer: FewShotTrainer, loss: Tensor, explicit: FewShotTrainer, expected: Tensor) -> None:
    """Two losses and their gradients are the same."""
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        value.backward()
    for parameter, same in zip(trainer.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad)


@walk("kind", TRAINABLE)
def test_loss_of_a_batch_is_the_explicit_one(kind: type[nn.Module]) -> None:
    trainer, explicit = (MetricTrainer(embedder(), factory(kind)) for _ in range(2))
    batch = next(batches(2 if kind in OF_TWO_VIEWS else 1))
    torch.manual_seed(1)  # ManifoldLoss draws
    value = trainer(batch)
    embeddings = explicit.embedder(batch.images)
    torch.manual_seed(1)
    if batch.other_view is not None:
        expected = explicit.loss(embeddings, ref_emb=explicit.embedder(batch.other_view))
    else:
        expected = explicit.loss(embeddings, None if kind in OF_ANY_VIEW else batch.labels)
    check_same(trainer, value, explicit, expected)


@each_trainer
@walk("kind", ON_EPISODES)
def test_loss_of_an_episode_is_the_explicit_one(kind: type[nn.Module], trainer: Callable[..., FewShotTrainer]) -> None:
    made, explicit = (trainer(embedder(), factory(kind)) for _ in range(2))
    episode = next(episodes())
    query, support = (explicit.embedder(images.flatten(0, 2)) for images in (episode.query, episode.support))
    labels, support_labels = (torch.arange(4).repeat_interleave(count) for count in (3, 2))
    expected = explicit.loss(query, labels, None, support, support_labels)
    check_same(made, made(episode), explicit, expected)


@walk("kind", ON_EPISODES)
def test_loss_compares_queries_with_the_support(kind: type[nn.Module]) -> None:
    """The support gets a gradient, and its order does not matter."""
    generator = torch.Generator().manual_seed(1)
    query, support = torch.randn(12, DIM, generator=generator), torch.randn(8, DIM, generator=generator)
    query_labels, labels = torch.arange(4).repeat_interleave(3), torch.arange(4).repeat_interleave(2)
    trainer = MetricTrainer(embedder(), factory(kind))
    loss = trainer.mined_loss(query, query_labels, support.requires_grad_(), labels)
    loss.backward()
    assert support.grad is not None
    assert (support.grad != 0).any()
    order = torch.randperm(8, generator=generator)
    with unless(DEPENDS_ON_ORDER.get(kind)):
        again = trainer.mined_loss(query, query_labels, support[order], labels[order])
        assert again.item() == pytest.approx(loss.item(), rel=1e-4), "support in another order"


@walk("kind", [kind for kind in TRAINABLE if kind not in OF_ANY_VIEW])
def test_batches_with_the_wrong_number_of_views_raise(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"labels|ref_emb|view"):
        train(MetricTrainer(embedder(), factory(kind)), batches(1 if kind in OF_TWO_VIEWS else 2))


@walk("kind", list(WITH_CLASS_WEIGHTS))
def test_labels_without_class_weights_raise(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"labels below 2, the num_classes of {kind.__name__}"):
        train(MetricTrainer(embedder(), partial(factory(kind), num_classes=2)), batches())


ONE_CLASS = partial(batches, spec=BatchSpec(2, 4), sampler=lambda: np.arange(len(DATA)).reshape(CLASSES, ITEMS))
ALL_LONE = partial(batches, spec=BatchSpec(4, 1))
STREAMS_WITHOUT_PAIRS = {"one class": ONE_CLASS, "all lone": ALL_LONE}


@walk("stream", list(STREAMS_WITHOUT_PAIRS))
@walk("kind", [kind for kind in TRAINABLE if kind not in OF_TWO_VIEWS])
def test_batch_of_one_class_or_without_a_pair_is_skipped_or_trained_on(kind: type[nn.Module], stream: str) -> None:
    history, moved = train(MetricTrainer(embedder(), factory(kind)), STREAMS_WITHOUT_PAIRS[stream]())
    tiny = all(abs(loss) < 1e-6 for _, loss in history.losses)  # zero but for rounding
    assert bool(moved) == (history.skipped < 2) or tiny


@each_material
@walk("loss", [losses.TripletMarginLoss, *OURS])
@walk("kind", exported(miners))
def test_loss_trains_on_what_the_miner_finds(
    kind: type[miners.BaseMiner], loss: type[nn.Module], material: Callable[..., Iterable[Any]]
) -> None:
    in_triplets = kind is miners.EmbeddingsAlreadyPackagedAsTriplets and material is batches
    stream = batches(sampler=factory(samplers.FixedSetOfTriplets)) if in_triplets else material()
    with unless(CANNOT.get(kind) or (BLIND.get(kind) if material is episodes else None)):
        trainer, found, used = MetricTrainer(embedder(), factory(loss), factory(kind)), [], []
        trainer.miner.register_forward_hook(lambda miner, args, mined: found.append((mined, *args[1::2], None)[:3]))
        trainer.loss.register_forward_pre_hook(lambda loss, args: used.append(args[2]))
        check_trains(trainer, stream)
        assert [id(mined) for mined, _, _ in found] == [id(mined) for mined in used]
        assert len(found) == 2
        for mined in found:
            check_mined(*mined)


@walk("stream", list(STREAMS_WITHOUT_PAIRS))
@walk("kind", [kind for kind in exported(miners) if kind not in CANNOT])
def test_batch_where_a_miner_finds_no_triplet_is_skipped(kind: type[miners.BaseMiner], stream: str) -> None:
    """Miners of pairs still find pairs of one sort, of which no triplet can be made."""
    with unless(BLIND.get(kind)):
        trainer = MetricTrainer(embedder(), losses.TripletMarginLoss, factory(kind))
        history, moved = train(trainer, STREAMS_WITHOUT_PAIRS[stream]())
        assert (history.skipped, moved) == (2, [])


def check_matters(kind: type[nn.Module], loss: partial[Any], stream: Iterator[Any]) -> None:
    """The loss trains, and is another one when the output of that part is doubled."""
    check_trains(MetricTrainer(embedder(), loss), stream)
    plain, doubled = MetricTrainer(embedder(), loss), MetricTrainer(embedder(), loss)
    for part in doubled.loss.modules():
        if type(part) is kind:
            part.register_forward_hook(lambda part, args, value: 2 * value)
    batch = next(stream)
    assert doubled(batch).item() != plain(batch).item()


PARTS = {
    "distance": [*exported(distances), WeightedL1Similarity],
    "reducer": exported(reducers),
    "embedding_regularizer": exported(regularizers),
}


@each_material
@walk("own_loss", [None, *OURS])
@walk(("argument", "kind"), [(argument, kind) for argument, kinds in PARTS.items() for kind in kinds])
def test_loss_is_made_of(
    argument: str, kind: type[nn.Module], own_loss: type[nn.Module] | None, material: Callable[..., Iterator[Any]]
) -> None:
    loss = own_loss or (losses.MarginLoss if kind is reducers.DivisorReducer else losses.NTXentLoss)
    with unless(CANNOT.get(kind) or NOT_TOGETHER.get((kind, loss))):
        check_matters(kind, partial(factory(loss), **{argument: factory(kind)}), material())


@walk("kind", exported(regularizers))
def test_weights_of_a_loss_are_regularized(kind: type[nn.Module]) -> None:
    with unless(CANNOT.get(kind)):
        check_matters(kind, partial(factory(losses.SoftTripleLoss), weight_regularizer=factory(kind)), batches())


PROMISES: dict[type, Callable[[Tensor], Tensor]] = {
    samplers.FixedSetOfTriplets: lambda labels: (labels[::3] == labels[1::3]) & (labels[::3] != labels[2::3]),
    samplers.HierarchicalSampler: lambda labels: (labels // 2).bincount()[labels // 2] == 6,  # of two pairs of classes
    samplers.MPerClassSampler: lambda labels: labels.bincount()[labels] == 3,
    samplers.TuplesToWeightsSampler: lambda labels: labels < 2,
}


@walk("kind", exported(samplers))
def test_loss_trains_on_what_the_sampler_draws(kind: type) -> None:
    trainer = MetricTrainer(embedder(), losses.ContrastiveLoss)
    stream = batches(sampler=factory(kind), model=trainer.embedder)
    drawn = [next(stream).labels for _ in range(6)]
    assert all(len(labels) == 12 and PROMISES[kind](labels).all() for labels in drawn)
    assert not all(torch.equal(labels, drawn[0]) for labels in drawn)
    check_trains(trainer, stream)
