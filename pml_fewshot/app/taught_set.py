"""TaughtSet: examples that are added, removed and relabeled while other threads query a classifier kept up to date."""

import threading
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pml_fewshot.app.pictures import Picture
from pml_fewshot.checks import UsageError
from pml_fewshot.classify.model import Model, fit_of
from pml_fewshot.classify.taught import Taught
from pml_fewshot.evaluation.heads import nearest_prototype

LONGEST_NAME = 200
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
NEAREST = 5  # examples that an answer shows
FALSE_REJECTIONS = 0.05  # FewShotClassifier's default


class ConflictError(UsageError):
    """The request does not fit the current state."""


class TooMuchError(UsageError):
    """More than a limit allows."""


class UnknownExampleError(UsageError):
    """An example or a class that does not exist, or no longer does."""


class Example(NamedTuple):
    number: int  # never used again in this process, so that a browser may keep its picture
    label: str
    picture: Picture
    embedding: np.ndarray  # (D,)


class Known(NamedTuple):
    """Everything known at one moment; a change creates a new one, so that readers need no lock."""

    version: int
    examples: tuple[Example, ...]
    model: Model | None
    advice: tuple[str, ...]

    @property
    def classes(self) -> dict[str, list[Example]]:
        """Examples by class, in the order of the classes' first examples."""
        classes: dict[str, list[Example]] = {}
        for example in self.examples:
            classes.setdefault(example.label, []).append(example)
        return classes


class TaughtSet:
    """Examples with their embeddings, and the classifier fitted to them: FewShotClassifier(reject="auto")'s model.

    Many threads may use it. Nothing is embedded here: a change of classes refits the classifier to the existing
    embeddings, in milliseconds.

    Args:
        most_examples: the limit for all classes together.
    """

    def __init__(self, most_examples: int = 2000) -> None:
        self.most_examples = most_examples
        self.known = known_of(0, ())
        self._lock = threading.Lock()
        self._next = 1

    def add(self, label: str, pictures: Sequence[Picture], embeddings: Sequence[np.ndarray]) -> list[int]:
        """Teaches examples of one class, new or existing; returns their numbers."""
        label = checked_name(label)
        with self._lock:
            self.check_room(len(pictures))
            new = self._numbered([label] * len(pictures), pictures, embeddings)
            self._set([*self.known.examples, *new])
            return [each.number for each in new]

    def rename(self, label: str, new: str) -> None:
        """Renames a class; taking the name of another class merges them."""
        new = checked_name(new)
        with self._lock:
            self._check_class(label)
            self._set(each._replace(label=new) if each.label == label else each for each in self.known.examples)

    def remove_class(self, label: str) -> None:
        with self._lock:
            self._check_class(label)
            self._set(each for each in self.known.examples if each.label != label)

    def move(self, number: int, label: str) -> None:
        """Corrects the class of an example."""
        label = checked_name(label)
        with self._lock:
            self.example(number)
            self._set(each._replace(label=label) if each.number == number else each for each in self.known.examples)

    def remove(self, number: int) -> None:
        """Forgets an example, and its class if it was the last one."""
        with self._lock:
            self.example(number)
            self._set(each for each in self.known.examples if each.number != number)

    def replace(self, labels: Sequence[str], pictures: Sequence[Picture], embeddings: Sequence[np.ndarray]) -> int:
        """Replaces all examples with these; returns the new version."""
        if len(labels) > self.most_examples:
            raise TooMuchError(f"expected at most {self.most_examples} examples, got {len(labels)}; raise the limit")
        with self._lock:
            self._set(self._numbered(labels, pictures, embeddings))
            return self.known.version

    def answer(self, row: np.ndarray) -> dict[str, Any]:
        """The classifier's answer for the embedding (D,) of a picture, as data for the page.

        Returns:
            label (None if it is none of the classes), rejected, similarity, threshold (None if nothing can be rejected
            yet), calibrated, classes with probability and similarity, the likeliest first, nearest examples with
            number, label and cosine, and the version of what was known.

        Raises:
            ConflictError: nothing is taught yet.
        """
        known = self.known
        model = known.model
        if model is None:
            raise ConflictError("expected a class to choose from, got none yet; teach one first")
        rows = torch.from_numpy(row)[None].to(model.taught.means.dtype)
        probability, similarity = model.probabilities(rows)[0], model.similarity(rows)[0]
        threshold, best = model.threshold, float(similarity.max())
        rejected = threshold is not None and best < threshold
        names, order = model.taught.classes.tolist(), probability.argsort(descending=True, stable=True).tolist()
        found = model.nearest(rows, min(NEAREST, len(model.taught.sources)))
        nearest = zip(found.indices[0].tolist(), found.distances[0].tolist(), found.labels[0].tolist(), strict=True)
        return {
            "version": known.version,
            "label": None if rejected else names[order[0]],
            "rejected": rejected,
            "similarity": best,
            "threshold": threshold,
            "calibrated": model.calibrated,
            "classes": [
                {"name": names[c], "probability": float(probability[c]), "similarity": float(similarity[c])}
                for c in order
            ],
            "nearest": [
                {"example": int(model.taught.sources[place]), "name": names[c], "similarity": cosine}
                for place, cosine, c in nearest
            ],
        }

    def _numbered(
        self, labels: Sequence[str], pictures: Sequence[Picture], embeddings: Sequence[np.ndarray]
    ) -> list[Example]:
        numbers = range(self._next, self._next + len(labels))
        self._next += len(labels)
        return [Example(*each) for each in zip(numbers, labels, pictures, embeddings, strict=True)]

    def _set(self, examples: Iterable[Example]) -> None:
        self.known = known_of(self.known.version + 1, tuple(examples))

    def check_room(self, more: int) -> None:
        if len(self.known.examples) + more > self.most_examples:
            got = f"{len(self.known.examples)} and {more} more"
            raise TooMuchError(f"expected at most {self.most_examples} examples, got {got}; remove some first")

    def _check_class(self, label: str) -> None:
        if all(each.label != label for each in self.known.examples):
            raise UnknownExampleError(f"expected a class that is taught, got {label!r}; load the page again")

    def example(self, number: int) -> Example:
        for each in self.known.examples:
            if each.number == number:
                return each
        raise UnknownExampleError(f"expected an example that is there, got number {number}; load the page again")


def known_of(version: int, examples: tuple[Example, ...]) -> Known:
    """What is known from these examples. A picture that is in a class twice counts once: left out, it would find its
    copy, and everything that is not identical would be rejected."""
    distinct = {(each.label, each.embedding.tobytes()): each for each in examples}.values()
    if not distinct:
        return Known(version, (), None, ("Teach a first class: draw, drop or choose an example, and name it.",))
    rows = torch.from_numpy(np.stack([each.embedding for each in distinct]))
    labels = np.array([each.label for each in distinct])
    taught = Taught.of(rows, labels, [str(each.number) for each in distinct])
    # FewShotClassifier keeps no sources with embeddings, and uses Python's warnings, which threads share
    reject = "auto" if max(taught.sizes) > 1 else None
    model = Model(taught, fit_of(nearest_prototype), reject, FALSE_REJECTIONS)
    return Known(version, examples, model, tuple(advice_on(model, len(examples) - len(distinct))))


def advice_on(model: Model, repeated: int) -> list[str]:
    """Advice for the page on what is missing before the answers can be trusted."""
    advice, names = [], model.taught.classes.tolist()
    if len(names) == 1:
        advice.append("Teach a second class: with one alone there is nothing to choose from.")
    if max(model.taught.sizes) == 1:
        advice.append("Give a class two different examples, so that unlike images can be told and chances are fair.")
    elif model.threshold is not None and model.threshold <= -1:
        advice.append("Give the classes more examples: these are too few to tell unlike images.")
    if twins := model.taught.twins():
        one, other = (names[int(model.taught.labels[each])] for each in twins[0])
        advice.append(f"The same picture is in “{one}” and in “{other}”: take it out of one.")
    if repeated:
        advice.append(f"Pictures that are twice in a class count once ({repeated} here): give different ones.")
    return advice


def checked_name(text: Any) -> str:
    """The name of a class as it is stored: NFC, without surrounding blanks, line breaks or invisible marks.

    Raises:
        UsageError: no name, one that is too long, or characters that cannot be seen or written to a file.
    """
    name = unicodedata.normalize("NFC", " ".join(text.split())) if isinstance(text, str) else ""
    # direction marks would reverse text next to the name; joiners belong to emoji and to Persian
    name = "".join(each for each in name if each in JOINERS or unicodedata.category(each) != "Cf")
    kinds = {unicodedata.category(character) for character in name}
    if not any(kind[0] not in "CZ" for kind in kinds):
        raise UsageError("expected a name, got none; type one")
    if len(name) > LONGEST_NAME:
        raise UsageError(f"expected a name of at most {LONGEST_NAME} characters, got {len(name)}; shorten it")
    if kinds & {"Cc", "Cs"}:
        raise UsageError("expected a name of visible characters, got a control character in it; type it again")
    return name
