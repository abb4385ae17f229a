"""EpisodeStream: what an episode holds, and that a run goes on with the very next episode."""

from itertools import islice

import pytest
import torch

from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.episode_stream import DRAWN_AT_ONCE, EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.episodes import Episode, EpisodeSampler, EpisodeSpec

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


def stream(seed: int = 0, tasks: int = 1, augmented: bool = False) -> EpisodeStream:
    return EpisodeStream(told_apart(), SPEC, seed, RandomAffine(flip=True) if augmented else None, tasks)


def take(source: EpisodeStream, count: int) -> list[Episode]:
    return list(islice(source, count))


def same(first: list[Episode], second: list[Episode]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.support, b.support) and torch.equal(a.query, b.query) for a, b in zip(first, second, strict=True)
    )


def numbers(images: torch.Tensor, pixel: int) -> torch.Tensor:
    return (images[..., 0, 0, pixel] * 255).round().long()


@pytest.mark.parametrize("tasks", [1, 4])
def test_episodes_hold_real_images_of_one_class_a_row_in_one_role(tasks: int):
    dataset, source = told_apart(), stream(tasks=tasks)
    assert iter(source) is source
    for episode in take(source, DRAWN_AT_ONCE + 3):
        assert episode.support.shape == (tasks, 3, 2, 1, 3, 3)
        assert episode.query.shape == (tasks, 3, 1, 1, 3, 3)
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
    blocks = [sampler.sample(DRAWN_AT_ONCE) for _ in range(2)]
    episodes = take(source, 2 * DRAWN_AT_ONCE)
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

    halved = take(EpisodeStream(told_apart(), SPEC, 0, spy, tasks=2), 4)
    whole = take(stream(tasks=2), 4)
    assert [images.shape for images in seen] == [(18, 1, 3, 3)] * 4  # support and query in one batch
    for half, full in zip(halved, whole, strict=True):
        assert torch.equal(half.support, full.support * 0.5)
        assert torch.equal(half.query, full.query * 0.5)


@pytest.mark.parametrize(
    "position", [0, 1, 5, DRAWN_AT_ONCE - 1, DRAWN_AT_ONCE, DRAWN_AT_ONCE + 1, 2 * DRAWN_AT_ONCE, 150]
)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_saved_state_goes_on_with_the_very_next_episode(position: int, tasks: int):
    source = stream(0, tasks, augmented=True)
    take(source, position)
    state = source.state_dict()
    expected = take(source, DRAWN_AT_ONCE + 5)
    fresh = stream(99, tasks, augmented=True)
    take(fresh, 17)
    fresh.load_state_dict(state)
    assert same(take(fresh, DRAWN_AT_ONCE + 5), expected)
    again = stream(98, tasks, augmented=True)
    again.load_state_dict(state)  # the state was not used up
    assert same(take(again, 3), expected[:3])


def test_a_restored_stream_can_be_saved_again_at_once(tmp_path):
    source = stream(augmented=True)
    take(source, DRAWN_AT_ONCE + 9)
    expected = source.state_dict()
    torch.save(expected, tmp_path / "state.pt")
    restored = stream(5, augmented=True)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    state = restored.state_dict()
    assert state.keys() == expected.keys()
    assert state["position"] == expected["position"]
    assert torch.equal(state["block_state"], expected["block_state"])
    assert torch.equal(state["augmentation_state"], expected["augmentation_state"])
    assert same(take(restored, 3), take(source, 3))


def test_a_class_too_small_or_no_tasks_are_refused_at_once():
    with pytest.raises(ValueError, match="in every class, got 4 in class 0"):
        EpisodeStream(told_apart(), EpisodeSpec(2, 2, 3), 0)
    for wrong in (0, True):
        with pytest.raises(ValueError, match="expected tasks to be an integer of at least 1"):
            EpisodeStream(told_apart(), SPEC, 0, tasks=wrong)
