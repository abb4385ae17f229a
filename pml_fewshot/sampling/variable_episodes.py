"""Episodes of different sizes, as Meta-Dataset draws them: VariableEpisodeSpec and its sampler."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError, as_labels, check_at_least_one, check_enough_items


@dataclass(frozen=True)
class VariableEpisodeSpec:
    """Episodes whose ways and shots differ from one to the next, and whose classes have different numbers of shots.

    An episode has from `min_ways` to `max_ways` classes, each number with equal probability. Each class has half as
    many queries as the smallest one has items, at most `max_queries`. The support has a random share, the same for all
    classes, of each class's remaining items or `max_shots`, whichever is less; at most `max_support` items. It is split
    among the classes in proportion to their sizes, times a factor between 1/2 and 2 drawn for each; at least one shot.

    Source: Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
    section 3.2 and appendix; the defaults are theirs. There, one of ten datasets is drawn for each episode; here, all
    episodes are from one.

    Raises:
        UsageError: a number below 1, min_ways above max_ways, or max_support below max_ways.
    """

    min_ways: int = 5
    max_ways: int = 50
    max_queries: int = 10
    max_support: int = 500
    max_shots: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_at_least_one(name, value)
            object.__setattr__(self, name, int(value))
        if self.min_ways > self.max_ways:
            raise UsageError(f"expected min_ways of at most max_ways={self.max_ways}, got {self.min_ways}; lower it")
        if self.max_support < self.max_ways:
            wanted = f"max_support of at least max_ways={self.max_ways}, a shot of each class"
            raise UsageError(f"expected {wanted}, got {self.max_support}; raise it")

    def __str__(self) -> str:
        return f"{self.min_ways}- to {self.max_ways}-way episodes of variable shots"


@dataclass(frozen=True)
class VariableEpisode:
    """One episode as indices into a dataset: support (S,), class after class, and query (W, Q), int64.

    `sizes` holds the W numbers of support items, S in total.
    """

    support: Tensor
    sizes: tuple[int, ...]
    query: Tensor


@dataclass(frozen=True)
class VariableEpisodes:
    """The episodes drawn by a VariableEpisodeSampler."""

    episodes: tuple[VariableEpisode, ...]

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[VariableEpisode]:
        return iter(self.episodes)

    def hash(self, fingerprint: str = "") -> str:
        """Returns 16 hex digits of episodes and dataset fingerprint: equal for the same items in the same roles."""
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=8)
        for each in self.episodes:
            digest.update(str((each.sizes, tuple(each.query.shape))).encode())
            for part in (each.support, each.query):
                digest.update(part.contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


class VariableEpisodeSampler:
    """Draws episodes of different sizes from labeled items, one at a time: 600 in about a tenth of a second.

    Args:
        labels: (M,) class of each item: any integers, or strings.
        spec: limits of the episodes' sizes.
        generator: source of all randomness, on the CPU; its state advances with each call.
        class_names: the names that the labels are indices into, for messages.

    Raises:
        UsageError: labels that are neither integers nor strings, fewer classes than min_ways, or a class with one item.
    """

    def __init__(
        self, labels: Any, spec: VariableEpisodeSpec, generator: torch.Generator, class_names: Sequence[str] = ()
    ) -> None:
        labels, names = as_labels(labels, len(labels), "the sampler's")
        self.spec, self.generator = spec, generator
        values, counts = torch.unique(labels.cpu(), return_counts=True)
        if len(values) < spec.min_ways:
            do = "lower min_ways, or use a set with more classes"
            raise UsageError(f"expected at least {spec.min_ways} classes for {spec}, got {len(values)} classes; {do}")
        check_enough_items(values, counts, 2, str(spec), class_names or names)
        self.items = torch.argsort(labels.cpu(), stable=True).split(counts.tolist())  # of each class

    def sample(self, num_episodes: int) -> VariableEpisodes:
        """Draws `num_episodes` episodes, each of distinct classes with disjoint support and query."""
        check_at_least_one("num_episodes", num_episodes)
        return VariableEpisodes(tuple(self._draw() for _ in range(num_episodes)))

    def _draw(self) -> VariableEpisode:
        spec = self.spec
        most = min(spec.max_ways, len(self.items))
        ways = int(torch.randint(spec.min_ways, most + 1, (), generator=self.generator))
        classes = torch.randperm(len(self.items), generator=self.generator)[:ways].tolist()
        sizes = torch.tensor([len(self.items[each]) for each in classes])
        queries = min(spec.max_queries, int(sizes.min()) // 2)
        shots = self._draw_shots(sizes, sizes - queries)
        support, query = [], []
        for each, count in zip(classes, shots, strict=True):
            order = torch.randperm(len(self.items[each]), generator=self.generator)[: count + queries]
            support.append(self.items[each][order[:count]])
            query.append(self.items[each][order[count:]])
        return VariableEpisode(torch.cat(support), tuple(shots), torch.stack(query))

    def _draw_shots(self, sizes: Tensor, left: Tensor) -> list[int]:
        """Draws the shots of classes with `sizes` (W,) items, `left` (W,) of which are not queries."""
        uniform = torch.rand(1 + len(sizes), generator=self.generator, dtype=torch.float64)
        share = 1 - uniform[0]  # above 0, up to 1
        wanted = torch.ceil(share * left.clamp(max=self.spec.max_shots)).sum()
        support = int(min(wanted.item(), self.spec.max_support))
        factors = torch.exp(math.log(0.5) + uniform[1:] * math.log(4)) * sizes
        shots = torch.floor(factors / factors.sum() * (support - len(sizes))).long() + 1
        return torch.minimum(shots, left).tolist()
