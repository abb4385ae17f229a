"""Episodes: what one is (EpisodeSpec, Episode) and how thousands are drawn at once (EpisodeSampler).

Letters in shapes, here and everywhere: E episodes, W ways, K shots, Q queries per class, N = W*Q, M items.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.sampling.class_sampler import ClassSampler


@dataclass(frozen=True)
class EpisodeSpec:
    """The size of an episode: `ways` classes with `shots` support items and `queries` query items each.

    Raises:
        UsageError: (a ValueError) one of the three is not an integer of at least 1.
    """

    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_at_least_one(name, value)
            object.__setattr__(self, name, int(value))  # numpy's integers are none to JSON

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot {self.queries}-query"


@dataclass(frozen=True)
class Episode:
    """A batch of episodes as tensors; labels are implied by the class axis.

    Args:
        support: (E, W, K, *item) floats, images in [0, 1].
        query: (E, W, Q, *item) likewise.
        classes: (E, W) int64, the data set's labels of the classes, to be named in messages; None where unknown.
    """

    support: Tensor
    query: Tensor
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        s, q = tuple(self.support.shape), tuple(self.query.shape)
        if len(s) < 4 or len(q) < 4 or s[:2] != q[:2] or s[3:] != q[3:]:
            wanted = "support (E, W, K, *item) and query (E, W, Q, *item) with the same E, W and item shape"
            raise UsageError(
                f"expected {wanted}, got {s} and {q}; stack episodes along axis 0 and classes along axis 1"
            )

    def to(self, device: torch.device | str) -> "Episode":
        classes = self.classes.to(device, non_blocking=True) if self.classes is not None else None
        return Episode(self.support.to(device, non_blocking=True), self.query.to(device, non_blocking=True), classes)


@dataclass(frozen=True)
class EpisodeIndex:
    """Episodes as indices into a data set: support (E, W, K) and query (E, W, Q), int64."""

    support: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.support)

    def __getitem__(self, episodes: slice) -> "EpisodeIndex":
        return EpisodeIndex(self.support[episodes], self.query[episodes])

    def to(self, device: torch.device | str) -> "EpisodeIndex":
        return EpisodeIndex(self.support.to(device, non_blocking=True), self.query.to(device, non_blocking=True))

    def hash(self, fingerprint: str = "") -> str:
        """16 hex digits of the episodes and their data set's fingerprint: equal for the same items in equal roles."""
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=8)
        for part in (self.support, self.query):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


class EpisodeSampler:
    """Draws episodes from labeled items: classes without replacement, then their items without replacement.

    All episodes of a call are drawn at once, on the labels' device. Classes may have different sizes. The same CPU
    generator state gives the same episodes on every machine and device.

    Args:
        labels: (M,) class of each item: integers of any values, or texts.
        spec: the episodes' size.
        generator: source of all randomness; its state moves on with each call.
        class_names: that the labels are indices into, for messages.

    Raises:
        UsageError: labels that are neither integers nor texts, fewer classes than ways, or a class (named by its label)
            with fewer items than shots + queries.
    """

    def __init__(
        self, labels: Any, spec: EpisodeSpec, generator: torch.Generator, class_names: Sequence[str] = ()
    ) -> None:
        self.spec, self.generator = spec, generator
        self.classes = ClassSampler(labels, spec.ways, spec.shots + spec.queries, str(spec), class_names)

    def sample(self, num_episodes: int) -> EpisodeIndex:
        """Draws `num_episodes` episodes, each of distinct classes with disjoint support and query."""
        check_at_least_one("num_episodes", num_episodes)
        index = self.classes.draw(num_episodes, self.generator)
        return EpisodeIndex(index[..., : self.spec.shots], index[..., self.spec.shots :])
