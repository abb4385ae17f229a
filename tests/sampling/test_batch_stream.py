"""BatchStream: what a batch holds, that a run resumes with the very next batch, and PML's samplers in place of ours."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.samplers import (
    FixedSetOfTriplets,
    HierarchicalSampler,
    MPerClassSampler,
    TuplesToWeightsSampler,
)
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.sampling.batch_stream import PREFETCH_BATCHES, BatchStream
from pml_fewshot.sampling.batches import Batch, BatchSpec

SPEC = BatchSpec(3, 2)
CLASSES = 6


def told_apart() -> FewShotDataset:
    """6 classes of 4 to 9 items; the first pixel of an image is its class, the second its number."""
    labels = torch.tensor([c for c in range(CLASSES) for _ in range(4 + c)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.randint(
        0, 256, (len(labels), 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    images[:, 0, 0, 1] = torch.arange(len(labels), dtype=torch.uint8)
    return FewShotDataset(images, labels, list("abcdef"))


DATA = told_apart()


def stream(seed: int = 0, augmented: bool = False, **options: Any) -> BatchStream:
    return BatchStream(DATA, options.pop("spec", SPEC), seed, RandomAffine(flip=True) if augmented else None, **options)


def take(source: BatchStream, count: int) -> list[Batch]:
    return list(islice(source, count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    def equal(a: Batch, b: Batch) -> bool:
        views = (a.other_view is None) == (b.other_view is None)
        if a.other_view is not None and b.other_view is not None:
            views = torch.equal(a.other_view, b.other_view)
        return views and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)

    return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))


def numbers(images: Tensor) -> Tensor:
    """Which items of the data set these are."""
    return (images[:, 0, 0, 1] * 255).round().long()


def items(batches: list[Batch]) -> list[list[int]]:
    return [numbers(batch.images).tolist() for batch in batches]


# --- our own drawing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, BatchSpec(2, 1), BatchSpec(CLASSES, 4), BatchSpec(5, 3)], ids=str)
def test_a_batch_holds_distinct_items_of_distinct_classes_and_as_many_of_each(spec: BatchSpec) -> None:
    source = stream(spec=spec)
    assert iter(source) is source
    for batch in take(source, PREFETCH_BATCHES + 3):
        found = numbers(batch.images)
        assert batch.images.shape == (spec.size, 1, 3, 3)
        assert batch.other_view is None
        assert torch.equal(batch.images, DATA.floats(found))
        assert torch.equal(batch.labels, DATA.labels[found])
        assert len(set(found.tolist())) == spec.size
        assert len(set(batch.labels.tolist())) == spec.classes
        assert set(Counter(batch.labels.tolist()).values()) == {spec.per_class}


def test_classes_and_items_come_up_as_often_as_each_other() -> None:
    batches = take(stream(), 3000)
    counts = torch.bincount(torch.cat([batch.labels for batch in batches]), minlength=CLASSES).double()
    expected = 3000 * SPEC.size / CLASSES  # whatever the sizes of the classes
    # two items at a time: a class is in a batch or not
    chi_square = float(((counts - expected) ** 2 / expected).sum()) / SPEC.per_class
    assert chi_square < 20.5  # 5 degrees of freedom: 1 in 1,000
    drawn = torch.bincount(torch.cat([numbers(batch.images) for batch in batches]), minlength=len(DATA)).double()
    for c in range(CLASSES):
        of_class = drawn[DATA.labels == c]
        share = counts[c] / len(of_class)
        assert float(((of_class - share) ** 2 / share).sum()) < 30  # at most 8 degrees of freedom: 1 in 5,000


@pytest.mark.parametrize("augmented", [False, True])
def test_the_seed_decides_everything(augmented: bool) -> None:
    before = torch.get_rng_state()
    assert same(take(stream(0, augmented), 70), take(stream(0, augmented), 70))
    assert not same(take(stream(0, augmented), 3), take(stream(1, augmented), 3))
    assert torch.equal(before, torch.get_rng_state())


# --- augmentation and views -------------------------------------------------------------------------------------------


class Halving:
    """Notes what it is given, and draws a number for each image."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(images.clone())
        self.drawn.append(torch.rand(len(images), generator=generator))
        return images * self.drawn[-1].view(-1, 1, 1, 1)


def test_augmentation_changes_the_pixels_and_not_the_batches() -> None:
    augment = Halving()
    changed, plain = take(BatchStream(DATA, SPEC, 0, augment), 5), take(stream(), 5)
    assert len(augment.seen) == 5
    for a, b, seen, drawn in zip(changed, plain, augment.seen, augment.drawn, strict=True):
        assert torch.equal(seen, b.images)
        assert torch.equal(a.images, b.images * drawn.view(-1, 1, 1, 1))
        assert torch.equal(a.labels, b.labels)
        assert a.other_view is None
    assert len({tuple(drawn.tolist()) for drawn in augment.drawn}) == 5


def test_two_views_are_the_same_images_augmented_twice() -> None:
    augment = Halving()
    batches = take(BatchStream(DATA, BatchSpec(3, 2, views=2), 0, augment), 5)
    plain = take(stream(), 5)
    assert len(augment.seen) == 10
    for i, (batch, b) in enumerate(zip(batches, plain, strict=True)):
        assert torch.equal(augment.seen[2 * i], b.images)
        assert torch.equal(augment.seen[2 * i + 1], b.images)
        assert batch.other_view is not None
        assert torch.equal(batch.images, b.images * augment.drawn[2 * i].view(-1, 1, 1, 1))
        assert torch.equal(batch.other_view, b.images * augment.drawn[2 * i + 1].view(-1, 1, 1, 1))
        assert torch.equal(batch.labels, b.labels)
        assert not torch.equal(batch.images, batch.other_view)


def test_two_views_want_an_augmentation() -> None:
    with pytest.raises(
        ValueError, match=r"expected augmentation for two views, got none; give augment=RandomAffine\(\)"
    ):
        stream(spec=BatchSpec(3, 2, views=2))


# --- PML's samplers ---------------------------------------------------------------------------------------------------


def model() -> Embedder:
    torch.manual_seed(0)
    # dropout and batch norm: in training mode the same images would give other embeddings
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    embedder = Embedder(trunk)
    with torch.random.fork_rng(devices=[]):
        embedder(torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(2)))
    return embedder


MODEL = model()


def by_super_class(labels: np.ndarray) -> HierarchicalSampler:
    """Classes 0-2 and 3-5 are two super classes; of each a batch has 3 items of one class and 3 of another."""
    return HierarchicalSampler(np.stack([labels, labels // 3], axis=1), batch_size=12, samples_per_class=3)


LENGTH = 36  # items of a pass of MPerClassSampler
SAMPLERS: dict[str, tuple[Callable[..., Iterable[Any]], BatchSpec]] = {
    "MPerClassSampler": (partial(MPerClassSampler, m=2, batch_size=6, length_before_new_iter=LENGTH), SPEC),
    "HierarchicalSampler": (by_super_class, BatchSpec(4, 3)),
    "FixedSetOfTriplets": (partial(FixedSetOfTriplets, num_triplets=10), SPEC),
    "TuplesToWeightsSampler": (
        partial(TuplesToWeightsSampler, miner=TripletMarginMiner(margin=0.1), dataloader_num_workers=0),
        SPEC,
    ),
    "TuplesToWeightsSampler of a part": (
        partial(TuplesToWeightsSampler, miner=MultiSimilarityMiner(), subset_size=20, dataloader_num_workers=0),
        SPEC,
    ),
}
BATCHES_IN_A_PASS = {
    "MPerClassSampler": 6,
    "HierarchicalSampler": 4,
    "FixedSetOfTriplets": 5,
    "TuplesToWeightsSampler": 6,  # 39 items: three are left over
    "TuplesToWeightsSampler of a part": 3,
}


def sampled(name: str, seed: int = 0, augmented: bool = False) -> BatchStream:
    sampler, spec = SAMPLERS[name]
    return stream(seed, augmented, spec=spec, sampler=sampler, model=MODEL)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_of_a_sampler_are_real_images_with_their_labels(name: str) -> None:
    spec = SAMPLERS[name][1]
    for batch in take(sampled(name), 2 * BATCHES_IN_A_PASS[name] + 1):
        found = numbers(batch.images)
        assert batch.images.shape == (spec.size, 1, 3, 3)
        assert torch.equal(batch.images, DATA.floats(found))
        assert torch.equal(batch.labels, DATA.labels[found])
        assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_decides_what_a_sampler_draws_and_every_pass_draws_anew(name: str) -> None:
    count = BATCHES_IN_A_PASS[name]
    first = items(take(sampled(name), 2 * count))
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)  # whatever others have drawn before
        c_f.NUMPY_RANDOM.rand(5)
        assert first == items(take(sampled(name), 2 * count))
    assert first[:count] != first[count:]
    assert first != items(take(sampled(name, seed=1), 2 * count))


@pytest.mark.parametrize("name", SAMPLERS)
def test_global_generators_are_as_before_a_pass(name: str) -> None:
    def states() -> list[Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002, PML draws from it
        return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, c_f.NUMPY_RANDOM]

    before = states()
    source = sampled(name, augmented=True)
    take(source, BATCHES_IN_A_PASS[name] + 1)
    source.state_dict()
    assert states() == before
    assert c_f.NUMPY_RANDOM is before[-1]


def test_global_generators_are_as_before_when_a_sampler_fails() -> None:
    def broken(labels: np.ndarray) -> list[int]:
        c_f.NUMPY_RANDOM.rand(3)
        torch.rand(3)
        raise RuntimeError("broken")

    torch_state, numpy_source = torch.get_rng_state(), c_f.NUMPY_RANDOM
    with pytest.raises(RuntimeError, match="broken"):
        next(stream(sampler=broken))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert c_f.NUMPY_RANDOM is numpy_source


def test_triplets_are_the_same_fixed_ones_in_every_pass_and_in_another_order() -> None:
    source = sampled("FixedSetOfTriplets")

    def one_pass() -> list[tuple[int, ...]]:
        flat = [i for batch in items(take(source, 5)) for i in batch]
        return [tuple(flat[i : i + 3]) for i in range(0, 30, 3)]

    passes = [one_pass() for _ in range(3)]
    for triplets in passes:
        for anchor, positive, negative in triplets:
            assert DATA.labels[anchor] == DATA.labels[positive] != DATA.labels[negative]
            assert anchor != positive
        assert sorted(triplets) == sorted(passes[0])
    assert passes[0] != passes[1] != passes[2] != passes[0]
    other = [i for batch in items(take(sampled("FixedSetOfTriplets", seed=1), 5)) for i in batch]
    assert sorted(tuple(other[i : i + 3]) for i in range(0, 30, 3)) != sorted(passes[0])


def test_modes_of_the_model_are_as_before_and_nothing_learns() -> None:
    embedder = model()
    embedder.train()
    embedder.trunk[2].eval()  # frozen by hand
    modes = [part.training for part in embedder.modules()]
    weights = {name: value.clone() for name, value in embedder.state_dict().items()}
    source = stream(sampler=SAMPLERS["TuplesToWeightsSampler"][0], model=embedder)
    take(source, 7)
    assert [part.training for part in embedder.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in embedder.state_dict().items())
    assert all(parameter.grad is None for parameter in embedder.parameters())


def test_weights_follow_the_model_as_it_learns() -> None:
    """A pass is drawn when it begins, by the model of then."""
    embedder = model()
    factory = partial(TuplesToWeightsSampler, miner=TripletMarginMiner(margin=-0.8), dataloader_num_workers=0)
    streams = [stream(sampler=factory, model=embedder) for _ in range(2)]
    first = [items(take(source, 6)) for source in streams]
    assert first[0] == first[1]
    second = items(take(streams[0], 6))
    with torch.no_grad():
        embedder.trunk[1].weight.mul_(torch.tensor([[5.0], [-1.0], [0.1], [2.0]]))
    assert items(take(streams[1], 6)) != second


# --- any other sampler ------------------------------------------------------------------------------------------------


def test_a_sampler_is_given_what_it_still_needs() -> None:
    calls: list[dict[str, Any]] = []

    def all_of_them(labels: np.ndarray, dataset: FewShotDataset, model: nn.Module, other: int = 3) -> range:
        calls.append({"labels": labels, "dataset": dataset, "model": model, "other": other})
        return range(12)

    take(stream(sampler=all_of_them, model=MODEL), 3)
    assert len(calls) == 2  # anew for each pass of two batches
    assert isinstance(calls[0]["labels"], np.ndarray)
    assert calls[0]["labels"].tolist() == DATA.labels.tolist()
    assert calls[0]["dataset"] is DATA
    assert calls[0]["model"] is MODEL
    assert calls[0]["other"] == 3
    mine = DATA.labels.numpy() + 7
    take(stream(sampler=partial(all_of_them, labels=mine, model=None), model=MODEL), 1)
    assert calls[-1]["labels"] is mine
    assert calls[-1]["model"] is None


ORDER = [5, 0, 38, 7, 7, 1, 20, 3, 4, 9, 30, 31, 2]


@pytest.mark.parametrize(
    "passes",
    [ORDER, torch.tensor(ORDER), np.array(ORDER), [ORDER[:6], ORDER[6:12], ORDER[12:]], [torch.tensor(ORDER)]],
    ids=["list", "tensor", "array", "lists", "tensors"],
)
def test_indices_may_come_in_any_form_and_keep_their_order(passes: Iterable[Any]) -> None:
    found = items(take(stream(sampler=lambda: passes), 5))
    assert found == [ORDER[:6], ORDER[6:12]] * 2 + [ORDER[:6]]  # the 13th is left out


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_pass_shorter_than_a_batch_is_refused(length: int) -> None:
    message = (
        f"expected at least 6 items from range, one batch of 3 classes with 2 items each, got {length}; "
        "make the sampler's pass longer or the batch smaller"
    )
    with pytest.raises(ValueError, match=message):
        next(stream(sampler=lambda: range(length)))


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_too_few_classes_or_items_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="expected at least 7 classes for 7 classes with 2 items each, got 6 classes"):
        stream(spec=BatchSpec(7, 2))
    with pytest.raises(ValueError, match=r"expected at least 5 items \(2 classes with 5 items each\) in every class"):
        stream(spec=BatchSpec(2, 5))


def test_a_sampler_of_batches_of_another_size_raises() -> None:
    made = BatchStream(told_apart(), BatchSpec(3, 2), 0, sampler=partial(MPerClassSampler, m=2, batch_size=4))
    with pytest.raises(ValueError, match=r"expected batch_size=6 for MPerClassSampler.*, got 4"):
        next(made)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 5, PREFETCH_BATCHES, PREFETCH_BATCHES + 1])
def test_a_saved_state_continues_with_the_very_next_batch(position: int, tmp_path: Path) -> None:
    def source(seed: int) -> BatchStream:
        return stream(seed, augmented=True, spec=BatchSpec(3, 2, views=2))

    whole = source(0)
    take(whole, position)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = take(whole, PREFETCH_BATCHES + 5)
    fresh = source(99)
    take(fresh, 17)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = source(98)
    again.load_state_dict(fresh.state_dict())  # saved again at once
    assert same(take(fresh, PREFETCH_BATCHES + 5), expected)
    assert same(take(again, 3), expected[:3])


@pytest.mark.parametrize(("name", "passes"), [*((name, 1) for name in SAMPLERS), ("MPerClassSampler", 0)])
def test_a_saved_state_of_a_sampled_stream_continues_with_the_very_next_batch(
    name: str, passes: int, tmp_path: Path
) -> None:
    source = sampled(name, augmented=True)
    take(source, passes * BATCHES_IN_A_PASS[name] + 1)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    expected = take(source, 2 * BATCHES_IN_A_PASS[name] + 1)
    fresh = sampled(name, augmented=True)
    take(fresh, 2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(take(fresh, 2 * BATCHES_IN_A_PASS[name] + 1), expected)
