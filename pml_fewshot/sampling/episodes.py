"""Episodes of one size (EpisodeSpec, Episode), and a sampler that draws thousands at once (EpisodeSampler).

Letters in shapes, here and elsewhere: E episodes, W ways, K shots, Q queries per class, N = W*Q, M items.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.sampling.class_sampler import ClassSampler
from pml_fewshot.sampling.moving import moved


@dataclass(frozen=True)
class EpisodeSpec:
    """The size of an episode: `ways` classes with `shots` support items and `queries` query items each.

    Args:
        query_balance: None for the same number of queries per class. With a number alpha, the `ways * queries` queries
            of an episode are divided among its classes by a Dirichlet distribution whose parameters are all alpha: 2 as
            in Veilleux et al. 2021, "Realistic Evaluation of Transductive Few-Shot Learning"; the smaller, the less
            balanced. `queries` is then the mean per class. For evaluation only.

    Raises:
        UsageError: (a ValueError) one of the three is not an integer of at least 1, or alpha is not a number above 0.
    """

    ways: int
    shots: int
    queries: int
    query_balance: float | None = None

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries"):
            check_at_least_one(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # JSON rejects numpy's integers
        alpha: Any = self.query_balance
        if alpha is not None:
            number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
            if not (number and 0 < alpha < math.inf):
                raise UsageError(f"expected query_balance as a number above 0, or None, got {alpha!r}; 2.0 is usual")
            object.__setattr__(self, "query_balance", float(alpha))

    def __repr__(self) -> str:
        more = "" if self.query_balance is None else f", query_balance={self.query_balance}"
        return f"EpisodeSpec(ways={self.ways}, shots={self.shots}, queries={self.queries}{more})"

    def __str__(self) -> str:
        size = f"{self.ways}-way {self.shots}-shot {self.queries}-query"
        return size if self.query_balance is None else f"{size} unbalanced (Dirichlet {self.query_balance:g})"


def check_balanced(spec: object) -> None:
    """Raises a UsageError unless a training spec has equally many queries per class, which implies the labels."""
    if isinstance(spec, EpisodeSpec) and spec.query_balance is not None:
        raise UsageError(f"expected balanced episodes to train on, got {spec}; leave query_balance to eval_specs")


@dataclass(frozen=True)
class Episode:
    """A batch of episodes as tensors; labels are implied by the class axis.

    Args:
        support: (E, W, K, *item) floats, images in [0, 1].
        query: (E, W, Q, *item) likewise.
        classes: (E, W) int64, the dataset's labels of the classes, for messages; None if unknown.
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
        classes = moved(self.classes, device) if self.classes is not None else None
        return Episode(moved(self.support, device), moved(self.query, device), classes)


@dataclass(frozen=True)
class EpisodeIndex:
    """Episodes as indices into a dataset: support (E, W, K) and query (E, W, Q), int64.

    In unbalanced episodes the W * Q queries are in the order of their classes too, and `query_ways` (E, W, Q) is the
    class of each, from 0 to W - 1; None if each class has Q queries.
    """

    support: Tensor
    query: Tensor
    query_ways: Tensor | None = None

    def __len__(self) -> int:
        return len(self.support)

    @property
    def parts(self) -> list[Tensor]:
        every = (self.support, self.query, self.query_ways)
        return [part for part in every if part is not None]

    def __getitem__(self, episodes: slice) -> "EpisodeIndex":
        return EpisodeIndex(*(part[episodes] for part in self.parts))

    @property
    def true_ways(self) -> Tensor:
        """The class of each query, from 0 to W - 1: (E, N), or (1, N) where it is the same in all episodes."""
        if self.query_ways is not None:
            return self.query_ways.flatten(1)
        _, ways, queries = self.query.shape
        return torch.arange(ways, device=self.query.device).repeat_interleave(queries).unsqueeze(0)

    def to(self, device: torch.device | str) -> "EpisodeIndex":
        return EpisodeIndex(*(moved(part, device) for part in self.parts))

    def hash(self, fingerprint: str = "") -> str:
        """Returns 16 hex digits of episodes and dataset fingerprint: equal for the same items in the same roles."""
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=8)
        for part in self.parts:
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


class EpisodeSampler:
    """Draws episodes from labeled items: classes without replacement, then their items without replacement.

    All episodes of a call are drawn at once, on the labels' device. Classes may have different sizes. The same CPU
    generator state gives the same episodes on every machine and device.

    Args:
        labels: (M,) class of each item: any integers, or strings.
        spec: size of the episodes.
        generator: source of all randomness; its state advances with each call.
        class_names: the names that the labels are indices into, for messages.

    Raises:
        UsageError: labels that are neither integers nor strings, fewer classes than ways, or a class (which is
            named) with fewer items than shots + queries, or shots + ways * queries if the queries are unbalanced.
    """

    def __init__(
        self, labels: Any, spec: EpisodeSpec, generator: torch.Generator, class_names: Sequence[str] = ()
    ) -> None:
        self.spec, self.generator = spec, generator
        most = spec.queries if spec.query_balance is None else spec.ways * spec.queries  # all may be of one class
        self.classes = ClassSampler(labels, spec.ways, spec.shots + most, str(spec), class_names)

    def sample(self, num_episodes: int) -> EpisodeIndex:
        """Draws `num_episodes` episodes, each of distinct classes with disjoint support and query."""
        check_at_least_one("num_episodes", num_episodes)
        spec, generator = self.spec, self.generator
        index = self.classes.draw(num_episodes, generator)
        support, query = index[..., : spec.shots], index[..., spec.shots :]
        if spec.query_balance is None:
            return EpisodeIndex(support, query)
        # the first ones of each class, which are those of balanced episodes
        counts = draw_counts(num_episodes, spec.ways, spec.queries, spec.query_balance, generator).to(index.device)
        taken = torch.arange(query.shape[2], device=index.device) < counts.unsqueeze(2)  # (E, W, W * Q)
        ways = torch.arange(spec.ways, device=index.device).unsqueeze(1).expand_as(taken)
        shape = (num_episodes, spec.ways, spec.queries)
        return EpisodeIndex(support, query[taken].view(shape), ways[taken].view(shape))


def draw_counts(num_episodes: int, ways: int, queries: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws how many of an episode's ways * queries queries each class has, (E, W), in Dirichlet(alpha) proportions.

    Numbers are rounded down, and those with the largest remainders up, so that the sum is right.
    """
    uniform = torch.rand(num_episodes, ways, generator=generator, device=generator.device, dtype=torch.float64)
    uniform = uniform.cpu()
    # Dirichlet variables are normalized gamma variables, here from the inverse of their distribution. With an alpha
    # below 0.01 these are less than the smallest float; their logarithms follow from the first term of its series.
    gammas = torch.from_numpy(gammaincinv(alpha, uniform.numpy()))
    tiny = (uniform.log() + torch.lgamma(torch.tensor(alpha + 1, dtype=torch.float64))) / alpha
    exact = ways * queries * torch.where(gammas > 1e-250, gammas.log(), tiny).softmax(dim=1)
    counts = exact.floor()
    missing = ways * queries - counts.sum(dim=1, keepdim=True)
    rank = (exact - counts).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (counts + (rank < missing)).long()
