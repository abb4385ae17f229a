"""Model: everything that a classifier derives from its examples."""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_fewshot.checks import UsageError, UsageTypeError, check_at_least_one, check_finite
from pml_fewshot.classify.calibration import (
    Fit,
    fit_similarity,
    folds_of_ranks,
    held_out,
    spread_of,
    temperature_of,
    threshold_of,
)
from pml_fewshot.classify.taught import Taught
from pml_fewshot.embedders.modes import no_autocast
from pml_fewshot.environment import one_thread_each
from pml_fewshot.evaluation.episodic import Classifier
from pml_fewshot.evaluation.heads import Scores, unwrapped
from pml_fewshot.evaluation.neighbors import Neighbors
from pml_fewshot.evaluation.search import Ranking, exact_neighbors
from pml_fewshot.evaluation.support import Support

UNKNOWN = "unknown"
CHUNK_FLOATS = 2**24  # of similarities of queries to support items: 64 MiB
FEW_ROWS = 32
GUESSED_FROM = 1000  # examples at most, if none can be left out


class Model:
    """Everything derived from the examples; parts that not every call needs are computed on first use.

    Args:
        taught: the examples.
        fit: fits the head.
        reject: the classifier's.
        false_rejections: the classifier's.
    """

    def __init__(self, taught: Taught, fit: Fit, reject: float | str | None, false_rejections: float) -> None:
        self.taught, self.fit, self._options = taught, fit, (reject, false_rejections)
        self.scores: Scores = fit(taught.support)
        similar = isinstance(reject, Real) and not isinstance(reject, bool) and -1 <= reject <= 1  # NaN is not
        if not (reject is None or reject == "auto" or similar):
            do = "give a value of similarity(X)"
            raise UsageError(f"expected reject as None, 'auto' or a similarity from -1 to 1, got {reject!r}; {do}")
        if not 0 < false_rejections < 1:
            got = f"{false_rejections!r}; 0.05 is one photo in twenty"
            raise UsageError(f"expected false_rejections between 0 and 1, got {got}")
        if reject == "auto" and max(taught.sizes) == 1:
            got = f"one of each of {len(taught.classes)} classes"
            do = "teach more, or give reject= a similarity"
            raise UsageError(f"expected two examples of a class for reject='auto', got {got}; {do}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Model, (self.taught, self.fit, *self._options)  # fitted parts may hold functions, which do not pickle

    def logits(self, rows: Tensor) -> Tensor:
        """(n, W) logits, in blocks if the head is fitted to the support alone, so that queries are independent."""
        size = len(rows) if getattr(self.scores, "whole", False) else max(1, CHUNK_FLOATS // sum(self.taught.sizes))
        with torch.no_grad(), no_autocast(), threads_for(rows):
            logits = torch.cat([self.scores(block[None])[0] for block in rows.split(size)])
        check_finite(logits, "logits", "look at the embeddings (numbers above 1e18 overflow) and the head")
        return logits

    @cached_property
    def similarities(self) -> Scores:
        return fit_similarity(self.taught.support)

    def similarity(self, rows: Tensor) -> Tensor:
        """(n, W) similarities; see `fit_similarity`."""
        similarities = self.similarities
        with torch.no_grad(), no_autocast(), threads_for(rows):
            return similarities(rows[None])[0]

    def predict(self, rows: Tensor) -> np.ndarray:
        """(n,) labels; see FewShotClassifier.predict."""
        labels = self.taught.classes[self.logits(rows).argmax(dim=1).numpy()]
        if self.threshold is None:
            return labels
        unknown = (self.similarity(rows).amax(dim=1) < self.threshold).numpy()
        return np.where(unknown, UNKNOWN, labels if labels.dtype.kind == "U" else labels.astype(object))

    def probabilities(self, rows: Tensor) -> Tensor:
        """(n, W) float64."""
        return (self.logits(rows).double() / self.temperature).softmax(dim=1)

    def nearest(self, rows: Tensor, k: int) -> Neighbors:
        """The k nearest examples by cosine."""
        check_at_least_one("k", k)
        if k > (most := sum(self.taught.sizes)):
            raise UsageError(f"expected k of at most {most}, the examples, got {k}; lower k")
        ranking, directions = Ranking.of(CosineSimilarity()), self._directions
        with threads_for(rows):
            index, cosine = exact_neighbors(ranking.prepare(rows), directions, k, ranking)
        return Neighbors(index, cosine, self.taught.labels[index], tuple(map(str, self.taught.classes)))

    @cached_property
    def _directions(self) -> Tensor:
        return Ranking.of(CosineSimilarity()).prepare(self.taught.items)

    @cached_property
    def temperature(self) -> float:
        """The divisor of the logits before the softmax: calibrated, or a guess."""
        self.check_inductive("probabilities")
        if len(self.taught.classes) == 1:
            return 1.0
        if not self.calibrated:
            some = torch.arange(0, len(self.taught.items), -(-len(self.taught.items) // GUESSED_FROM))
            return spread_of(self.logits(self.taught.items[some]), self.taught.labels[some])
        with torch.no_grad(), no_autocast():
            # (a plain function requires classes of equal size, so one of each is left out)
            folds = folds_of_ranks(self.taught.support) if getattr(self.scores, "whole", False) else None
            logits, items = held_out(self.fit, self.taught.support, folds)
        return temperature_of(logits, self.taught.labels[items])

    @property
    def calibrated(self) -> bool:
        together = isinstance(self.scores, Together)
        return len(self.taught.classes) > 1 and max(self.taught.sizes) > 1 and not together

    def check_inductive(self, what: str) -> None:
        """Raises a UsageError if the head is transductive: left-out examples say little about other queries."""
        if isinstance(self.scores, Together):
            got = f"{self.scores.name}, whose answer about one depends on what else is asked"
            raise UsageError(f"expected an inductive head for {what}, got {got}; use predict, or another head")

    @cached_property
    def threshold(self) -> float | None:
        """The similarity below which an item is unknown."""
        reject, rate = self._options
        if reject != "auto":
            return None if reject is None else float(reject)
        with torch.no_grad(), no_autocast():
            known, _ = held_out(fit_similarity, self.taught.support)
        return threshold_of(known.amax(dim=1), rate)


def threads_for(rows: Tensor) -> AbstractContextManager[None]:
    """Limits few rows to one thread: if other programs use the cores, two that share a millisecond's work take four."""
    return one_thread_each() if len(rows) <= FEW_ROWS else nullcontext()


def fit_of(head: Any) -> Fit:
    """A function that fits a head to a support; a plain function receives the support with each call's queries."""
    function, options = unwrapped(head)
    fit = getattr(function, "fit", None)
    if fit is not None:
        fitted = partial(fit, **options)
        return partial(Together, function.__name__, fitted) if getattr(function, "transductive", False) else fitted
    if not callable(head):
        do = "give nearest_prototype, partial(ridge_regression, penalty=3.0) or the like"
        raise UsageTypeError(f"expected a head, a function of support and query, got {head!r}; {do}")
    return partial(WholeScores, head)


class Together:
    """Logits of a transductive head, which sees all queries of a call at once."""

    whole = True

    def __init__(self, name: str, fit: Fit, support: Support) -> None:
        self.name, self.scores = name, fit(support)

    def __call__(self, query: Tensor) -> Tensor:
        return self.scores(query)


class WholeScores:
    """Logits of a head that is a plain function, perhaps a transductive one: it sees all queries of a call at once."""

    whole = True

    def __init__(self, head: Any, support: Support) -> None:
        if support.shots is None:
            sizes = f"{min(support.sizes)} to {max(support.sizes)}"
            do = "even them out, or use a head of this library, which takes any sizes"
            raise UsageError(
                f"expected classes of one size, as this head takes a tensor (1, W, K, D), got {sizes}; {do}"
            )
        self.classify = Classifier.of(None, head).classify
        self.support = support.items.unflatten(1, (-1, support.shots))

    def __call__(self, query: Tensor) -> Tensor:
        return self.classify(self.support, query)
