"""EpisodeStream: what an episode holds, and that a run goes on with the very next episode."""

import random
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.photo_augmentation import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from pml_fewshot.sampling.episode_stream import PREFETCH_BATCHES, EpisodeStream
from pml_fewshot.sampling.episodes import Episode, EpisodeSampler, EpisodeSpec
from tests.sampling.material import DATA, numbers

SPEC = EpisodeSpec(3, 2, 1)


def stream(seed: int = 0, episodes_per_batch: int = 1, augmented: bool = False) -> EpisodeStream:
    return EpisodeStream(DATA, SPEC, seed, RandomAffine(flip=True) if augmented else None, episodes_per_batch)


def take(source: EpisodeStream, count: int) -> list[Episode]:
    return list(islice(source, count))


def same(first: list[Episode], second: list[Episode]) -> bool:
    return all(
        torch.equal(a.support, b.support) and torch.equal(a.query, b.query) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("episodes_per_batch", [1, 4])
def test_episodes_hold_real_images_of_one_class_a_row_in_one_role(episodes_per_batch: int):
    source = stream(episodes_per_batch=episodes_per_batch)
    assert iter(source) is source
    for episode in take(source, PREFETCH_BATCHES + 3):
        assert episode.support.shape == (episodes_per_batch, 3, 2, 1, 3, 3)
        assert episode.query.shape == (episodes_per_batch, 3, 1, 1, 3, 3)
        items = numbers(torch.cat([episode.support, episode.query], dim=2))
        assert torch.equal(DATA.labels[items], episode.classes.unsqueeze(2).expand(-1, -1, 3))
        for task_classes, task_items in zip(episode.classes, items, strict=True):
            assert len(task_classes.unique()) == 3
            assert len(task_items.unique()) == 9


def test_episodes_are_the_samplers_in_order_and_never_repeat_a_block():
    source, generator = stream(seed=3), torch.Generator()
    generator.set_state(source.state_dict()["block_state"])
    sampler = EpisodeSampler(DATA.labels, SPEC, generator)
    blocks = [sampler.sample(PREFETCH_BATCHES) for _ in range(2)]
    episodes = take(source, 2 * PREFETCH_BATCHES)
    for role in ("support", "query"):
        found = numbers(torch.cat([getattr(episode, role) for episode in episodes]))
        assert torch.equal(found, torch.cat([getattr(block, role) for block in blocks]))
    assert blocks[0].hash() != blocks[1].hash()


def test_the_seed_decides_everything():
    before = torch.get_rng_state()
    assert same(take(stream(0, 2, augmented=True), 70), take(stream(0, 2, augmented=True), 70))
    assert not same(take(stream(0), 3), take(stream(1), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_changes_the_pixels_and_not_the_episodes():
    seen: list[torch.Tensor] = []

    def scaled(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(torch.rand(len(images), generator=generator))
        return images * seen[-1].view(-1, 1, 1, 1)

    changed = take(EpisodeStream(DATA, SPEC, 0, scaled, episodes_per_batch=2), 4)
    assert [drawn.shape for drawn in seen] == [(18,)] * 4  # support and query in one batch
    assert len({tuple(drawn.tolist()) for drawn in seen}) == 4
    for new, old, drawn in zip(changed, take(stream(episodes_per_batch=2), 4), seen, strict=True):
        factor = drawn.view(2, 3, 3, 1, 1, 1)
        assert torch.equal(new.support, old.support * factor[:, :, :2])
        assert torch.equal(new.query, old.query * factor[:, :, 2:])


@pytest.mark.parametrize("position", [0, 5, PREFETCH_BATCHES, PREFETCH_BATCHES + 1, 150])
@pytest.mark.parametrize("episodes_per_batch", [1, 2])
def test_a_saved_state_goes_on_with_the_very_next_episode(position: int, episodes_per_batch: int):
    source, fresh, again = (stream(seed, episodes_per_batch, augmented=True) for seed in (0, 99, 98))
    take(source, position)
    state = source.state_dict()
    expected = take(source, PREFETCH_BATCHES + 5)
    take(fresh, 17)
    fresh.load_state_dict(state)
    again.load_state_dict(fresh.state_dict())  # saved again at once
    assert same(take(fresh, PREFETCH_BATCHES + 5), expected)
    source.load_state_dict(state)  # which was not used up
    assert same(take(again, 3), expected[:3])
    assert same(take(source, 3), expected[:3])


def by_all_generators(image: Tensor) -> Tensor:
    """A transform of one image, which draws from the global generators, and gives another size."""
    return (image * random.random() + np.random.rand() * torch.rand(1)).repeat(1, 2, 3)  # noqa: NPY002


PHOTOS = [RandomResizedCrop((6, 9)), RandomHorizontalFlip(), ColorJitter(0.4, 0.4)]


@pytest.mark.parametrize("augment", [by_all_generators, PHOTOS], ids=["per image", "batched"])
def test_transforms_of_another_size_resume_exactly_and_leave_the_global_generators(augment: Callable | list):
    def source(seed: int) -> EpisodeStream:
        return EpisodeStream(DATA, SPEC, seed, augment, episodes_per_batch=2)

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = source(0)
    first = take(whole, 3)
    state = whole.state_dict()
    expected = take(whole, 3)
    assert same(take(source(0), 6), first + expected)
    resumed = source(99)
    resumed.load_state_dict(state)
    assert same(take(resumed, 3), expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert expected[0].support.shape == (2, 3, 2, 1, 6, 9)
    assert expected[0].query.shape == (2, 3, 1, 1, 6, 9)
    assert not torch.equal(first[0].support, expected[0].support)


def test_each_image_keeps_its_place_when_its_size_changes():
    pairs = zip(take(EpisodeStream(DATA, SPEC, 0, lambda image: image[:, 0:1, :2]), 3), take(stream(), 3), strict=True)
    for cut, whole in pairs:
        assert torch.equal(cut.support, whole.support[..., 0:1, :2])
        assert torch.equal(cut.query, whole.query[..., 0:1, :2])


def test_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match="expected a tensor of 9 images, as many as were given"):
        next(EpisodeStream(DATA, SPEC, 0, lambda images, generator: images[1:]))


def test_a_class_too_small_or_no_tasks_are_refused_at_once():
    with pytest.raises(ValueError, match="in every class, got 4 in class 'a'"):
        EpisodeStream(DATA, EpisodeSpec(2, 2, 3), 0)
    for wrong in (0, True):
        with pytest.raises(ValueError, match="expected episodes_per_batch to be an integer of at least 1"):
            EpisodeStream(DATA, SPEC, 0, episodes_per_batch=wrong)
