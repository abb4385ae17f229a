"""Subject: a trained method and the classes that it is evaluated on, with results that several pictures share.

Letters: E episodes, W ways, N queries of an episode, M items.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import FewShotDataset, as_floats
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, modules_of
from pml_fewshot.sampling.episodes import EpisodeIndex, EpisodeSampler, EpisodeSpec

SECONDS = 1.5  # for the episodes behind one picture
FEWEST, MOST = 20, 1000  # of such episodes
CHUNK = 20  # episodes at a time
MOST_WAYS = 20  # of an episode that is drawn
TRIAL = 4  # episodes that are timed first


@dataclass(frozen=True)
class Scored:
    """Episodes, the logits (E, N, W) of their queries, and the seconds per pair of query and class.

    The softmax of the logits gives the method's probabilities: the logits are multiplied by its `logit_scale`.
    """

    episodes: EpisodeIndex
    logits: Tensor
    seconds_a_pair: float

    @property
    def right(self) -> Tensor:
        """(E, N) which queries are classified correctly."""
        return self.logits.argmax(dim=2) == self.episodes.true_ways


@dataclass
class Subject:
    """The subject of a report: a trained method in eval mode, and the classes that it is evaluated on.

    Args:
        trainer: the method.
        dataset: images or features, on any device.
        specs: of the experiment's episodes; the first is used for the examples.
        seed: of the episodes and of other random choices.
        allowed: whether the method can be evaluated on episodes of a spec.
        accuracies: by spec, those (E,) of the table's episodes.
    """

    trainer: Any
    dataset: FewShotDataset
    specs: Sequence[EpisodeSpec]
    seed: int
    allowed: Callable[[EpisodeSpec], bool]
    accuracies: Mapping[EpisodeSpec, Tensor] = field(default_factory=dict)

    @cached_property
    def spec(self) -> EpisodeSpec:
        """Spec of the example episodes: the first that is not too large to draw, with equally many queries a class."""
        small = [spec for spec in self.specs if spec.ways <= MOST_WAYS]
        cut = replace(self.specs[0], ways=min(MOST_WAYS, self.specs[0].ways))
        spec = small[0] if small else cut if self.allowed(cut) else self.specs[0]  # a head may have fixed ways
        return replace(spec, query_balance=None)

    @cached_property
    def bank(self) -> Tensor:
        return self.trainer.bank(self.dataset)

    @cached_property
    def embeddings(self) -> EmbeddingBank:
        if self.bank.ndim != 2:
            got = f"a bank of shape {tuple(self.bank.shape)}, as of a method that adapts to each episode"
            raise UsageError(f"expected embeddings (M, D), got {got}; nothing to compare outside of episodes")
        return EmbeddingBank(self.bank.cpu(), self.dataset.labels.cpu(), class_names=self.dataset.class_names)

    @cached_property
    def pictures(self) -> Tensor | None:
        """(M, C, H, W) the items, on the CPU, if they are images with one or three channels."""
        shape = self.dataset.item_shape
        return self.dataset.images.cpu() if len(shape) == 3 and shape[0] in (1, 3) else None

    @property
    def images(self) -> Tensor:
        if self.pictures is None:
            got = f"items of shape {self.dataset.item_shape}"
            raise UsageError(f"expected images (C, H, W) of one or three channels, got {got}; nothing to show")
        return self.pictures

    @cached_property
    def ink(self) -> bool:
        """Whether images are writing: gray, and mostly 0."""
        some = None if self.pictures is None else self.pictures[:256]
        return some is not None and some.shape[1] == 1 and float(as_floats(some).mean()) < 0.4

    @cached_property
    def scored(self) -> Scored:
        """Episodes of the first spec, as many as there is time for."""
        sampler = EpisodeSampler(self.dataset.labels.cpu(), self.spec, self.generator(), self.dataset.class_names)
        count = affordable(lambda few: self._logits(sampler.sample(few)))
        sampler.generator.manual_seed(self.seed)  # the trial has advanced it
        episodes = sampler.sample(count)
        started = time.perf_counter()
        logits = self._logits(episodes)
        return Scored(episodes, logits, (time.perf_counter() - started) / (count * pairs_in(self.spec)))

    def _logits(self, episodes: EpisodeIndex) -> Tensor:
        found, own = [], self.bank
        with torch.no_grad(), evaluating(*modules_of(self.trainer)):
            for start in range(0, len(episodes), CHUNK):
                part = episodes[start : start + CHUNK].to(own.device)
                support, query = (as_floats(own[index]) for index in (part.support, part.query))
                found.append(self.trainer.classify(support, query.flatten(1, 2)).cpu())
        logits = self.trainer.logit_scale * torch.cat(found)
        if not torch.isfinite(logits).all():
            raise UsageError("expected finite logits, got NaN or infinity; the weights have diverged")
        return logits

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def evaluate(self, spec: EpisodeSpec, count: int) -> EpisodicResult:
        return EpisodicEvaluator(spec, count, self.seed).evaluate(self.trainer, self.dataset, self.bank)

    def episodes_of(self, spec: EpisodeSpec, seconds: float = SECONDS) -> int:
        """How many episodes of a spec can be evaluated in so many seconds; may be none."""
        return min(MOST, int(seconds / (self.scored.seconds_a_pair * pairs_in(spec))))


def pairs_in(spec: EpisodeSpec) -> int:
    return spec.ways**2 * spec.queries


def affordable(score: Callable[[int], object]) -> int:
    """How many episodes can be scored in about SECONDS, from the time that a few take."""
    score(TRIAL)  # the first time takes longer
    started = time.perf_counter()
    score(TRIAL)
    return max(FEWEST, min(MOST, int(TRIAL * SECONDS / (time.perf_counter() - started))))
