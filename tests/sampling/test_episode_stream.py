"""EpisodeStream: what an episode holds, and that a run goes on with the very next episode."""

from itertools import islice

import pytest
import torch

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.sampling.episode_stream import PREFETCH_BATCHES, EpisodeStream
from pml_fewshot.sampling.episodes import Episode, EpisodeSampler, EpisodeSpec

SPEC = EpisodeSpec(3, 2, 1)


def told_apart() -> FewShotDataset:
    """5 classes of 4 to 8 items; the first pixel of an image is its class, the second its number."""
    labels = torch.tensor([c for c in range(5) for _ in range(4 + c)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.randint(
        0, 256, (len(labels), 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    images[:, 0, 0, 1] = torch.arange(len(labels), dtype=torch.uint8)
    return FewShotDataset(images, labels, list("abcde"))


def stream(seed: int = 0, episodes_per_batch: int = 1, augmented: bool = False) -> EpisodeStream:
    return EpisodeStream(told_apart(), SPEC, seed, RandomAffine(flip=True) if augmented else None, episodes_per_batch)


def take(source: EpisodeStream, count: int) -> list[Episode]:
    return list(islice(source, count))


def same(first: list[Episode], second: list[Episode]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.support, b.support) and torch.equal(a.query, b.query) for a, b in zip(first, second, strict=True)
    )


def numbers(images: torch.Tensor, pixel: int) -> torch.Tensor:
    return (images[..., 0, 0, pixel] * 255).round().long()


@pytest.mark.parametrize("episodes_per_batch", [1, 4])
def test_episodes_hold_real_images_of_one_class_a_row_in_one_role(episodes_per_batch: int):
    dataset, source = told_apart(), stream(episodes_per_batch=episodes_per_batch)
    assert iter(source) is source
    for episode in take(source, PREFETCH_BATCHES + 3):
        assert episode.support.shape == (episodes_per_batch, 3, 2, 1, 3, 3)
        assert episode.query.shape == (episodes_per_batch, 3, 1, 1, 3, 3)
        both = torch.cat([episode.support, episode.query], dim=2)
        items, classes = numbers(both, 1), numbers(both, 0)
        assert torch.equal(both, dataset.floats(items))
        assert torch.equal(classes, dataset.labels[items])
        assert (classes == classes[..., :1]).all()
        for task_classes, task_items in zip(classes[..., 0], items, strict=True):
            assert len(task_classes.unique()) == 3
            assert len(task_items.unique()) == 9


def test_episodes_are_the_samplers_in_order_and_never_repeat_a_block():
    """What the sampler gives for the first two blocks from the stream's own generator state."""
    source = stream(seed=3)
    generator = torch.Generator()
    generator.set_state(source.state_dict()["block_state"])
    sampler = EpisodeSampler(told_apart().labels, SPEC, generator)
    blocks = [sampler.sample(PREFETCH_BATCHES) for _ in range(2)]
    episodes = take(source, 2 * PREFETCH_BATCHES)
    for role in ("support", "query"):
        found = numbers(torch.cat([getattr(episode, role) for episode in episodes]), 1)
        assert torch.equal(found, torch.cat([getattr(block, role) for block in blocks]))
    assert blocks[0].hash() != blocks[1].hash()


@pytest.mark.parametrize("augmented", [False, True])
def test_the_seed_decides_everything(augmented: bool):
    before = torch.get_rng_state()
    assert same(take(stream(0, 2, augmented), 70), take(stream(0, 2, augmented), 70))
    assert not same(take(stream(0, 2, augmented), 3), take(stream(1, 2, augmented), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_changes_the_pixels_and_not_the_episodes():
    plain, augmented = take(stream(), 5), take(stream(augmented=True), 5)
    assert not same(plain, augmented)
    seen: list[torch.Tensor] = []

    def spy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(images.clone())
        return images * 0.5

    halved = take(EpisodeStream(told_apart(), SPEC, 0, spy, episodes_per_batch=2), 4)
    whole = take(stream(episodes_per_batch=2), 4)
    assert [images.shape for images in seen] == [(18, 1, 3, 3)] * 4  # support and query in one batch
    for half, full in zip(halved, whole, strict=True):
        assert torch.equal(half.support, full.support * 0.5)
        assert torch.equal(half.query, full.query * 0.5)


@pytest.mark.parametrize(
    "position", [0, 1, 5, PREFETCH_BATCHES - 1, PREFETCH_BATCHES, PREFETCH_BATCHES + 1, 2 * PREFETCH_BATCHES, 150]
)
@pytest.mark.parametrize("episodes_per_batch", [1, 2])
def test_a_saved_state_goes_on_with_the_very_next_episode(position: int, episodes_per_batch: int):
    source = stream(0, episodes_per_batch, augmented=True)
    take(source, position)
    state = source.state_dict()
    expected = take(source, PREFETCH_BATCHES + 5)
    fresh = stream(99, episodes_per_batch, augmented=True)
    take(fresh, 17)
    fresh.load_state_dict(state)
    assert same(take(fresh, PREFETCH_BATCHES + 5), expected)
    again = stream(98, episodes_per_batch, augmented=True)
    again.load_state_dict(state)  # the state was not used up
    assert same(take(again, 3), expected[:3])


def test_a_class_too_small_or_no_tasks_are_refused_at_once():
    with pytest.raises(ValueError, match="in every class, got 4 in class 0"):
        EpisodeStream(told_apart(), EpisodeSpec(2, 2, 3), 0)
    for wrong in (0, True):
        with pytest.raises(ValueError, match="expected episodes_per_batch to be an integer of at least 1"):
            EpisodeStream(told_apart(), SPEC, 0, episodes_per_batch=wrong)
