"""EpisodeStream: the endless sequence of training episodes, drawn and augmented on the data's device."""

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Any

import torch

from pml_fewshot.checks import check_at_least_one
from pml_fewshot.data.augmentation import Augmentation, as_augmentation, augmented
from pml_fewshot.data.dataset import FewShotDataset, as_dataset
from pml_fewshot.sampling.episodes import Episode, EpisodeIndex, EpisodeSampler, EpisodeSpec, check_balanced

PREFETCH_BATCHES = 64  # drawing 64 60-way episodes takes 25 ms, about as long as drawing one


@dataclass(eq=False, repr=False)
class EpisodeStream:
    """Yields training episodes without end: an Episode of float images from 0 to 1, or of features.

    Args:
        dataset: images to draw from, on the training device.
        spec: size of an episode.
        seed: seed of the episodes and their augmentation.
        augment: `augment(images (B, C, H, W), generator) -> images`, a transform of one image (from torchvision, or any
            function), which becomes a PerImage, or a list of these; for support and query alike; none when None. The
            size of the images may change.
        episodes_per_batch: the E of an Episode.

    `state_dict()` and `load_state_dict()` let a run resume with the very episode that would have come next.

    Raises:
        UsageError: too few classes or items for the spec, unbalanced queries, or no episode in a batch.
    """

    dataset: FewShotDataset
    spec: EpisodeSpec
    seed: InitVar[int]
    augment: Augmentation | None = None
    episodes_per_batch: int = 1

    def __post_init__(self, seed: int) -> None:
        check_at_least_one("episodes_per_batch", self.episodes_per_batch)
        check_balanced(self.spec)
        self.dataset = as_dataset(self.dataset)
        seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(int(seed))).tolist()
        generator, self.augmentation_generator = (torch.Generator().manual_seed(each) for each in seeds)
        self._augment = as_augmentation(self.augment)
        self.sampler = EpisodeSampler(self.dataset.labels, self.spec, generator, self.dataset.class_names)
        self._block_state = generator.get_state()
        self._block: EpisodeIndex | None = None
        self._position = 0  # batches of the block that have been yielded

    def __iter__(self) -> Iterator[Episode]:
        return self

    def __next__(self) -> Episode:
        if self._block is None or self._position == PREFETCH_BATCHES:
            self._block_state = self.sampler.generator.get_state()
            self._block = self.sampler.sample(PREFETCH_BATCHES * self.episodes_per_batch)
            self._position = 0
        start = self._position * self.episodes_per_batch
        self._position += 1
        index = self._block[start : start + self.episodes_per_batch]
        shots = index.support.shape[2]
        images = self.dataset.floats(torch.cat([index.support, index.query], dim=2))  # (E, W, K+Q, *item)
        changed = augmented(images.flatten(0, 2), self._augment, self.augmentation_generator)
        images = changed.unflatten(0, images.shape[:3])
        return Episode(images[:, :, :shots], images[:, :, shots:], self.dataset.labels[index.support[:, :, 0]])

    def state_dict(self) -> dict[str, Any]:
        return {
            "block_state": self._block_state,
            "position": self._position,
            "augmentation_state": self.augmentation_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.generator.set_state(state["block_state"])
        self._block_state = state["block_state"]
        self._block = self.sampler.sample(PREFETCH_BATCHES * self.episodes_per_batch)
        self._position = state["position"]
        self.augmentation_generator.set_state(state["augmentation_state"])
