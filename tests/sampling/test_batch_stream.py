"""BatchStream: what a batch holds, that a run resumes with the very next batch, and PML's samplers in place of ours."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.samplers import FixedSetOfTriplets, HierarchicalSampler, MPerClassSampler
from pytorch_metric_learning.samplers import TuplesToWeightsSampler as ToWeights
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.data.photo_augmentation import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.sampling.batch_stream import PREFETCH_BATCHES, BatchStream
from pml_fewshot.sampling.batches import Batch, BatchSpec
from pml_fewshot.sampling.class_sampler import ClassSampler
from tests.sampling.material import CLASSES, DATA, numbers, seeded

SPEC = BatchSpec(3, 2)


def stream(seed: int = 0, augmented: bool = False, **options: Any) -> BatchStream:
    return BatchStream(DATA, options.pop("spec", SPEC), seed, RandomAffine(flip=True) if augmented else None, **options)


def take(source: BatchStream, count: int) -> list[Batch]:
    return list(islice(source, count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    def tensors(batches: list[Batch]) -> list[Tensor]:
        return [each for b in batches for each in (b.images, b.labels, b.other_view) if each is not None]

    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def items(batches: list[Batch]) -> list[list[int]]:
    return [numbers(batch.images).tolist() for batch in batches]


@pytest.mark.parametrize("spec", [SPEC, BatchSpec(2, 1), BatchSpec(CLASSES, 4), BatchSpec(5, 3)], ids=str)
def test_a_batch_holds_distinct_items_of_distinct_classes_and_as_many_of_each(spec: BatchSpec) -> None:
    source = stream(spec=spec)
    assert iter(source) is source
    for batch in take(source, PREFETCH_BATCHES + 3):
        found = numbers(batch.images)
        assert batch.images.shape == (spec.size, 1, 3, 3)
        assert batch.other_view is None
        assert torch.equal(batch.labels, DATA.labels[found])
        assert len(set(found.tolist())) == spec.size
        assert list(Counter(batch.labels.tolist()).values()) == [spec.per_class] * spec.classes


def test_batches_are_the_samplers_in_order_and_never_repeat_a_block() -> None:
    source, generator = stream(seed=3), torch.Generator()
    generator.set_state(source.state_dict()["generator_state"])
    sampler = ClassSampler(DATA.labels, 3, 2, "a test")
    blocks = [sampler.draw(PREFETCH_BATCHES, generator) for _ in range(2)]
    assert items(take(source, 2 * PREFETCH_BATCHES)) == torch.cat(blocks).flatten(1).tolist()
    assert not torch.equal(*blocks)


def test_the_seed_decides_everything() -> None:
    before = torch.get_rng_state()
    assert same(take(stream(augmented=True), 70), take(stream(augmented=True), 70))
    assert items(take(stream(0), 3)) != items(take(stream(1), 3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("views", [1, 2])
def test_each_view_is_the_same_images_augmented_anew(views: int) -> None:
    drawn: list[Tensor] = []

    def scaled(images: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(torch.rand(len(images), 1, 1, 1, generator=generator))
        return images * drawn[-1]

    changed, plain = take(BatchStream(DATA, BatchSpec(3, 2, views), 0, scaled), 5), take(stream(), 5)
    expected = [b.images * amounts for b, amounts in zip([b for b in plain for _ in range(views)], drawn, strict=True)]
    found = [view for b in changed for view in (b.images, b.other_view) if view is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(changed, plain, strict=True))
    assert len({tuple(amounts.flatten().tolist()) for amounts in drawn}) == 5 * views


def by_all_generators(image: Tensor) -> Tensor:
    """A transform of one image, which draws from the global generators, and gives another size."""
    return (image * random.random() + np.random.rand() * torch.rand(1)).repeat(1, 2, 3)  # noqa: NPY002


PHOTOS = [RandomResizedCrop((6, 9)), RandomHorizontalFlip(), ColorJitter(0.4, 0.4)]


@pytest.mark.parametrize("augment", [by_all_generators, PHOTOS], ids=["per image", "batched"])
def test_transforms_of_another_size_resume_exactly_and_leave_the_global_generators(augment: Any) -> None:
    def source(seed: int) -> BatchStream:
        return BatchStream(DATA, BatchSpec(3, 2, views=2), seed, augment)

    before = global_states()
    whole = source(0)
    first = take(whole, 3)
    state = whole.state_dict()
    expected = take(whole, 3)
    assert same(take(source(0), 6), first + expected)
    resumed = source(99)
    resumed.load_state_dict(state)
    assert same(take(resumed, 3), expected)
    assert global_states() == before
    for batch in first:
        assert batch.images.shape == batch.other_view.shape == (6, 1, 6, 9)
        assert len({image.numpy().tobytes() for image in torch.cat([batch.images, batch.other_view])}) == 12


def test_another_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a tensor of 6 images, as many as were given"):
        next(BatchStream(DATA, SPEC, 0, lambda images, generator: images[1:]))


def model() -> Embedder:
    torch.manual_seed(0)
    # dropout and batch norm: in training mode the same images would give other embeddings
    embedder = Embedder(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    with torch.random.fork_rng(devices=[]):
        embedder(torch.rand(20, 1, 3, 3, generator=seeded(2)))
    return embedder


MODEL = model()


def by_super_class(labels: np.ndarray) -> HierarchicalSampler:
    """Classes 0-2 and 3-5 are two super classes; of each a batch has 3 items of one class and 3 of another."""
    return HierarchicalSampler(np.stack([labels, labels // 3], axis=1), batch_size=12, samples_per_class=3)


WEIGHTS = partial(ToWeights, miner=TripletMarginMiner(margin=0.1), dataloader_num_workers=0)
PART = partial(ToWeights, miner=MultiSimilarityMiner(), subset_size=20, dataloader_num_workers=0)
SAMPLERS: dict[str, tuple[Callable[..., Iterable[Any]], BatchSpec, int]] = {  # and the batches in a pass
    "MPerClassSampler": (partial(MPerClassSampler, m=2, batch_size=6, length_before_new_iter=36), SPEC, 6),
    "HierarchicalSampler": (by_super_class, BatchSpec(4, 3), 4),
    "FixedSetOfTriplets": (partial(FixedSetOfTriplets, num_triplets=10), SPEC, 5),
    "TuplesToWeightsSampler": (WEIGHTS, SPEC, 6),  # 39 items: three are left over
    "TuplesToWeightsSampler of a part": (PART, SPEC, 3),
}


def sampled(name: str, seed: int = 0, augmented: bool = False) -> BatchStream:
    sampler, spec, _ = SAMPLERS[name]
    return stream(seed, augmented, spec=spec, sampler=sampler, model=MODEL)


def global_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002, PML draws from it
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, id(c_f.NUMPY_RANDOM), random.getstate()]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_decides_what_a_sampler_draws_and_every_pass_draws_anew(name: str) -> None:
    _, spec, count = SAMPLERS[name]
    before = global_states()
    batches = take(sampled(name), 2 * count)
    first = items(batches)
    assert global_states() == before
    for batch, found in zip(batches, first, strict=True):
        assert batch.images.shape == (spec.size, 1, 3, 3)
        assert torch.equal(batch.labels, DATA.labels[found])
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)  # whatever others have drawn before
        c_f.NUMPY_RANDOM.rand(5)
        assert first == items(take(sampled(name), 2 * count))
    assert first[:count] != first[count:]
    assert first != items(take(sampled(name, seed=1), 2 * count))


def test_global_generators_are_as_before_when_a_sampler_fails() -> None:
    def broken(labels: np.ndarray) -> list[int]:
        c_f.NUMPY_RANDOM.rand(3)
        torch.rand(3)
        random.random()
        raise RuntimeError("broken")

    before = global_states()
    with pytest.raises(RuntimeError, match="broken"):
        next(stream(sampler=broken))
    assert global_states() == before


def test_a_sampler_may_draw_from_any_global_generator_and_pml_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(labels: np.ndarray) -> Iterator[int]:
        draws = (np.random.permutation(39)[:12], random.sample(range(39), 12), torch.randperm(39)[:12])  # noqa: NPY002
        yield from (int(item) for draw in (*draws, c_f.NUMPY_RANDOM.permutation(39)[:12]) for item in draw)

    first = items(take(stream(sampler=drawing), 16))
    monkeypatch.setattr(c_f, "NUMPY_RANDOM", np.random.RandomState(7))  # as PML's documents allow
    assert items(take(stream(sampler=drawing), 16)) == first
    assert first[:8] != first[8:]


def test_triplets_are_the_same_fixed_ones_in_every_pass_and_in_another_order() -> None:
    def one_pass(source: BatchStream) -> list[list[int]]:
        return np.reshape(items(take(source, 5)), (10, 3)).tolist()

    source = sampled("FixedSetOfTriplets")
    first, second = one_pass(source), one_pass(source)
    assert first != second
    assert sorted(first) == sorted(second) != sorted(one_pass(sampled("FixedSetOfTriplets", seed=1)))


def test_the_model_and_its_mode_are_as_before() -> None:
    embedder = model().train()
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    take(stream(sampler=WEIGHTS, model=embedder), 7)
    assert embedder.training
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())


def test_weights_follow_the_model_as_it_learns() -> None:
    """A pass is drawn when it begins, by the model of then."""
    embedder = model()
    factory = partial(ToWeights, miner=TripletMarginMiner(margin=-0.8), dataloader_num_workers=0)
    one, other = (stream(sampler=factory, model=embedder) for _ in range(2))
    assert items(take(one, 6)) == items(take(other, 6))
    second = items(take(one, 6))
    with torch.no_grad():
        embedder.trunk[1].weight.mul_(torch.tensor([[5.0], [-1.0], [0.1], [2.0]]))
    assert items(take(other, 6)) != second


def test_a_sampler_is_given_what_it_still_needs() -> None:
    calls: list[tuple[Any, ...]] = []

    def all_of_them(labels: np.ndarray, dataset: FewShotDataset, model: nn.Module, other: int = 3) -> range:
        calls.append((labels, dataset, model, other))
        return range(12)

    take(stream(sampler=all_of_them, model=MODEL), 3)
    assert len(calls) == 2  # anew for each pass of two batches
    assert isinstance(calls[0][0], np.ndarray)
    assert calls[0][0].tolist() == DATA.labels.tolist()
    assert calls[0][1:] == (DATA, MODEL, 3)
    mine = DATA.labels.numpy() + 7
    take(stream(sampler=partial(all_of_them, labels=mine, model=None), model=MODEL), 1)
    assert calls[-1][0] is mine
    assert calls[-1][2] is None


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
    message = f"at least 6 items from range, one batch of 3 classes with 2 items each, got {length}; make the sampler's"
    with pytest.raises(ValueError, match=message):
        next(stream(sampler=lambda: range(length)))


def test_what_cannot_give_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 7 classes for 7 classes with 2 items each, got 6 classes"):
        stream(spec=BatchSpec(7, 2))
    with pytest.raises(ValueError, match=r"expected at least 5 items \(2 classes with 5 items each\) in every class"):
        stream(spec=BatchSpec(2, 5))
    with pytest.raises(ValueError, match=r"expected augmentation for two views, got none; give augment=RandomAffine"):
        stream(spec=BatchSpec(3, 2, views=2))
    with pytest.raises(ValueError, match=r"expected batch_size=6 for MPerClassSampler.*, got 4"):
        next(stream(sampler=partial(MPerClassSampler, m=2, batch_size=4)))


def test_a_pass_is_copied_to_the_sets_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a CPU to a GPU, which waits; meta: without memory, places only."""
    source, drawn = stream(sampler=range), torch.arange(12).view(2, 6)
    state = source.state_dict() | {"block": drawn}
    source.dataset = DATA.to("meta")
    monkeypatch.setattr(source, "_one_pass", lambda _: drawn)
    take(source, 1)
    assert source._block.is_meta
    source.load_state_dict(state)
    assert source._block.is_meta
    assert [batch.labels.is_meta for batch in take(source, 3)] == [True] * 3  # two of them, and one of the next pass


RESUMED = [("", position) for position in (0, 5, PREFETCH_BATCHES, PREFETCH_BATCHES + 1)]
RESUMED += [(name, count + 1) for name, (_, _, count) in SAMPLERS.items()] + [("MPerClassSampler", 1)]


@pytest.mark.parametrize(("name", "position"), RESUMED)
def test_a_saved_state_continues_with_the_very_next_batch(name: str, position: int, tmp_path: Path) -> None:
    def source(seed: int) -> BatchStream:
        if not name:
            return stream(seed, augmented=True, spec=BatchSpec(3, 2, views=2))
        return sampled(name, augmented=True)  # of the same seed, for the sampler is built with it

    whole, fresh, again, count = source(0), source(99), source(98), 17 if name else PREFETCH_BATCHES + 5
    take(whole, position)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = take(whole, count)
    take(fresh, 2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.load_state_dict(fresh.state_dict())  # saved again at once
    assert same(take(fresh, count), expected)
    assert same(take(again, 3), expected[:3])
