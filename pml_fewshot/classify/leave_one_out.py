"""Leave-one-out evaluation of a classifier: each of its examples is left out and classified by the others."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.classify.calibration import fit_similarity, folds_of_ranks, folds_one_by_one, held_out, threshold_of
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.modes import no_autocast
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult
from pml_fewshot.evaluation.support import Support
from pml_fewshot.sampling.episodes import EpisodeSpec

if TYPE_CHECKING:
    from pml_fewshot.classify.classifier import FewShotClassifier

ALL_ALONE = 1000  # up to this many examples, each is left out alone, with a head fitted for each
SHOWN_CLASSES = 12  # of a confusion matrix; with more, the most confused pairs are shown
SHOTS = (1, 2, 3, 5, 10, 20, 50)
EPISODES = 300  # for each number of shots


@dataclass(frozen=True)
class LeaveOneOut:
    """The n examples that were left out of a classifier, and what it predicted for each.

    Args:
        classes: W labels.
        items: (n,) indices of the examples in the classifier, as in its `sources_`.
        labels: (n,) class of each, from 0 to W - 1.
        predicted: (n,) the predicted class, never unknown.
        similarity: (n,) to the most similar class.
        certainty: (n,) softmax of the predicted class, calibrated on all of them.
        others: (S,) similarity of each example to the most similar class other than its own, as if its own were
            unknown; empty with fewer than three classes.
        others_certainty: (S,) softmax of the predicted class, likewise.
        rate: share of known photos that may be rejected.
        shots: the accuracy by number of examples per class, over episodes drawn from all of them.
        alone: whether each was left out alone; otherwise one of each class at a time.
    """

    classes: tuple[str, ...]
    items: Tensor
    labels: Tensor
    predicted: Tensor
    similarity: Tensor
    certainty: Tensor
    others: Tensor
    others_certainty: Tensor
    rate: float
    shots: tuple[EpisodicResult, ...]
    alone: bool

    @property
    def accuracy(self) -> float:
        return (self.predicted == self.labels).double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson 1927), valid for few examples and if all are right."""
        n, z2 = len(self.labels), 1.96**2
        middle = (self.accuracy + z2 / (2 * n)) / (1 + z2 / n)
        half = 1.96 / (1 + z2 / n) * (self.accuracy * (1 - self.accuracy) / n + z2 / (4 * n**2)) ** 0.5
        return middle - half, middle + half

    @cached_property
    def confusion(self) -> Tensor:
        """(W, W) how often an example of the row's class was classified as the column's."""
        width = len(self.classes)
        return torch.bincount(self.labels * width + self.predicted, minlength=width**2).unflatten(0, (width, width))

    @property
    def auroc(self) -> float:
        """How often a left-out example is more similar to the classes than one whose whole class was left out."""
        return _auroc(self.similarity, self.others)

    @property
    def softmax_auroc(self) -> float:
        """The same for the highest probability in place of the similarity."""
        return _auroc(self.certainty, self.others_certainty)

    @property
    def false_rejections(self) -> float:
        """Share of the left-out examples that a threshold from the other ones rejects."""
        if len(self.similarity) < 3:
            return float("nan")  # (a bound needs two others)
        own = torch.arange(len(self.similarity))
        bounds = [threshold_of(self.similarity[own != each], self.rate) for each in own]
        return (self.similarity < torch.tensor(bounds)).double().mean().item()

    @property
    def rejections(self) -> tuple[float, float]:
        """Shares of examples whose whole class was left out that thresholds on similarity and on the softmax reject."""
        by_similarity = self.others < threshold_of(self.similarity, self.rate)
        by_softmax = self.others_certainty < threshold_of(self.certainty, self.rate)
        return by_similarity.double().mean().item(), by_softmax.double().mean().item()

    def __str__(self) -> str:
        n, (low, high) = len(self.labels), self.interval
        how = "each left out in turn" if self.alone else "one of each class left out at a time"
        right = int((self.predicted == self.labels).sum())
        lines = [f"accuracy {100 * self.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f}): {right} of {n}, {how}"]
        lines += ["", *self._confusion_lines()]
        if self.shots:
            lines += ["", "with this many examples of each class (all classes, 95 % intervals):"]
            for each in self.shots:
                spec: Any = each.spec
                chance = f"{spec.ways}-way, {len(each.per_episode)} draws"
                lines.append(f"  {spec.shots:3}  {100 * each.mean:5.1f} +- {100 * each.ci95:.1f} %  ({chance})")
        if len(self.others):
            by_similarity, by_softmax = self.rejections
            lines += [
                "",
                f"unknown classes, each class as if never taught; rejected at {100 * self.rate:.0f} % of the known:",
                f"  by similarity  {100 * by_similarity:5.1f} %, AUROC {self.auroc:.3f}  (reject='auto')",
                f"  by softmax     {100 * by_softmax:5.1f} %, AUROC {self.softmax_auroc:.3f}",
                f"  known examples rejected by a threshold from the other ones: {100 * self.false_rejections:.1f} %",
            ]
        return "\n".join(lines)

    def _confusion_lines(self) -> list[str]:
        names, counts = self.classes, self.confusion
        if len(names) <= SHOWN_CLASSES:
            width = max(5, *(len(name) + 2 for name in names))
            rows = zip(names, counts.tolist(), strict=True)
            lines = ["confusion (row: class, column: predicted)", " " * width + "".join(f"{n:>{width}}" for n in names)]
            return lines + [
                f"{name:<{width}}" + "".join(f"{count or '.':>{width}}" for count in row) for name, row in rows
            ]
        wrong = counts - counts.diag().diag()
        pairs = [divmod(int(each), len(names)) for each in wrong.flatten().argsort(descending=True, stable=True)[:10]]
        lines = [f"  {names[a]} taken for {names[b]}: {wrong[a, b]}" for a, b in pairs if wrong[a, b]]
        return ["most confused:", *lines] if lines else ["nothing confused"]


def leave_one_out(classifier: "FewShotClassifier", draws: int = EPISODES, seed: int = 0) -> LeaveOneOut:
    """Classifies each example with a classifier of the others, and draws episodes to show the gain of more examples.

    Examples that are the only one of their class are not left out. Up to 1,000 examples, each is left out alone.

    Args:
        classifier: a fitted classifier.
        draws: episodes for each number of shots.
        seed: of these draws.

    Raises:
        UsageError: one class, no class with two examples, or a transductive head.
    """
    check_is_fitted(classifier)
    model = classifier.model_
    support, names = model.taught.support, tuple(map(str, model.taught.classes))
    model.check_inductive("leaving one out")
    if not model.calibrated:
        got = f"{len(names)} classes of at most {max(support.sizes)} examples"
        raise UsageError(
            f"expected two classes or more, one with two examples, to leave one out, got {got}; teach more"
        )
    alone = len(support.labels) <= ALL_ALONE and not getattr(model.scores, "whole", False)
    folds = folds_one_by_one(support) if alone else folds_of_ranks(support)
    with torch.no_grad(), no_autocast():
        logits, items = held_out(model.fit, support, folds)
        similarity, _ = held_out(fit_similarity, support, folds)
        others, certainty = [], []
        if len(names) > 2:
            for own, rest in support.class_by_class():
                others.append(fit_similarity(rest)(own)[0].amax(dim=1))
                certainty.append((model.fit(rest)(own)[0] / model.temperature).softmax(dim=1).amax(dim=1))
    return LeaveOneOut(
        names,
        items,
        support.labels[items],
        logits.argmax(dim=1),
        similarity.amax(dim=1),
        (logits / model.temperature).softmax(dim=1).amax(dim=1),
        torch.cat(others) if others else similarity.new_empty(0),
        torch.cat(certainty) if certainty else similarity.new_empty(0),
        classifier.false_rejections,
        _by_shots(classifier, draws, seed),
        alone,
    )


def _by_shots(classifier: "FewShotClassifier", draws: int, seed: int) -> tuple[EpisodicResult, ...]:
    """The accuracy by shots, among the classes with at least one more example: more than half of all."""
    taught, fit = classifier.model_.taught, classifier.model_.fit

    def head(support: Tensor, query: Tensor) -> Tensor:  # as the classifier fits it, also with fewer neighbors than k
        return fit(Support.of(support))(query)

    whole = getattr(classifier.model_.scores, "whole", False)
    bank = EmbeddingBank(taught.items, taught.labels)
    sizes = torch.tensor(taught.sizes)
    results = []
    for shots in SHOTS:
        if (ways := int((sizes > shots).sum())) > len(sizes) / 2 and ways > 1:
            spec = EpisodeSpec(ways, shots, queries=1)
            enough = (sizes > shots)[bank.labels]
            some = EmbeddingBank(bank.embeddings[enough], bank.labels[enough])
            results.append(EpisodicEvaluator(spec, draws, seed, head=classifier.head if whole else head).evaluate(some))
    return tuple(results)


def _auroc(known: Tensor, unknown: Tensor) -> float:
    is_known = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))])
    return float(roc_auc_score(is_known, torch.cat([known, unknown])))
