"""FewShotClassifier: classifies images by a few examples of each class, with a network that is not trained."""

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.classify.model import UNKNOWN, Model, fit_of, threads_for
from pml_fewshot.classify.photos import labeled_photos, source_of
from pml_fewshot.classify.saved import load_classifier, save_classifier
from pml_fewshot.classify.taught import Taught
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.modes import widened
from pml_fewshot.evaluation.heads import Head, nearest_prototype
from pml_fewshot.evaluation.neighbors import Neighbors


class Answer(NamedTuple):
    """A classifier's answer for one image."""

    label: Any  # "unknown" if rejected
    probability: float  # of the most likely class
    similarity: float  # to the most similar class, from -1 to 1
    nearest: str  # where the most similar example came from; empty if not known
    nearest_label: Any


_teaching = threading.RLock()  # so that examples taught by two threads at the same time are both kept


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classifies images or embeddings by a few examples of each class; a scikit-learn classifier.

    Nothing is trained: a head (by default the nearest mean of a class's embeddings) is fitted to the examples, in
    milliseconds. Classes may have different numbers of examples, at least one. Threads may call `predict` and the like
    at the same time, even while another teaches: each call uses the examples that were known when it began.

    Args:
        embedder: computes embeddings of images: an Embedder or a trunk (TimmTrunk, TorchvisionTrunk, ..), which apply
            their own preprocessing, or an ImageEmbedder. X is then a list of paths, PIL images, arrays or tensors. When
            None, X contains embeddings (n, D).
        head: a head of this library, with options as `partial(ridge_regression, penalty=3.0)`, or any function from
            support (1, W, K, D) and query (1, n, D) to logits (1, n, W), which receives all of X at once and requires
            classes of equal size. A transductive head also receives all of X at once, so that each label depends on the
            other items; it gives no probabilities.
        reject: "auto" or a similarity: an item less similar than that to every class is predicted as "unknown".
            "auto" chooses it from the examples, each left out in turn; this needs a class with two examples.
            `similarity(X)` returns the values.
        false_rejections: share of photos of known classes that "auto" may reject as unknown.

    Attributes:
        model_: everything that is known: a `classify.model.Model`.
        classes_: (W,) the labels, sorted.
        sources_: where each example came from, by class; a path, or empty.
        calibrated_: whether probabilities are based on left-out examples.
        threshold_: the similarity below which an item is unknown; None without `reject`.
    """

    def __init__(
        self,
        embedder: Any = None,
        head: Head | Callable[..., Tensor] = nearest_prototype,
        reject: float | Literal["auto"] | None = None,
        false_rejections: float = 0.05,
    ) -> None:
        self.embedder = embedder
        self.head = head
        self.reject = reject
        self.false_rejections = false_rejections

    def fit(self, X: Any, y: Any) -> "FewShotClassifier":
        """Forgets earlier examples and learns these: X as described above, y (n,) names or numbers.

        Raises:
            UsageError: a broken image or invalid options; earlier examples are then kept. (Embeddings with NaN are
                scikit-learn's ValueError.)
        """
        return self._teach(X, y, forget=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "FewShotClassifier":
        """Learns more examples, of new or existing classes.

        The result does not depend on the order: it is that of `fit` on all examples at once. `classes` is
        scikit-learn's argument and is not needed: a class is known from its first example on.
        """
        return self._teach(X, y, forget=False)

    def fit_folder(self, folder: str | Path) -> "FewShotClassifier":
        """Learns a folder of images, or a zip of one, with a subfolder per class, named after the class.

        A warning counts what is left out: other files, and folders without an image.
        """
        if self.embedder is None:
            do = "give embedder=TimmTrunk(...), or another trunk"
            raise UsageError(f"expected an embedder for images, got none; {do}")
        with labeled_photos(folder) as (photos, labels):
            return self._teach(photos, labels, forget=True)

    def remove_class(self, label: Any) -> "FewShotClassifier":
        """Forgets a class and its examples."""
        check_is_fitted(self)
        with _teaching:
            self._set(self.model_.taught.without(label))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n,) label of each item; "unknown" if rejected, also among numbers (then in an array of objects)."""
        model, rows = self._asked(X)
        return model.predict(rows)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, W) probability of each class of `classes_`, given that the item is of one of them.

        The softmax of the head's logits at a temperature fitted to the examples, each left out in turn. Warns if no
        class has two examples: the temperature is then a guess, and `calibrated_` is False.

        Raises:
            UsageError: a transductive head.
        """
        model, rows = self._asked(X)
        _warn_if_not_calibrated(model)
        return model.probabilities(rows).numpy()

    def answer(self, X: Any) -> list["Answer"]:
        """Label, probability, similarity and nearest example of each item, embedded once; warns as predict_proba."""
        model, rows = self._asked(X)
        _warn_if_not_calibrated(model)
        probability, similarity = model.probabilities(rows).amax(dim=1), model.similarity(rows).amax(dim=1)
        nearest = model.nearest(rows, 1).indices[:, 0].tolist()
        taught, number = model.taught, model.taught.labels.tolist()
        columns = model.predict(rows).tolist(), probability.tolist(), similarity.tolist(), nearest
        return [
            Answer(label, sure, similar, taught.sources[place], taught.classes.tolist()[number[place]])
            for label, sure, similar, place in zip(*columns, strict=True)
        ]

    def decision_function(self, X: Any) -> np.ndarray:
        """(n, W) the head's logits; for two classes (n,), the second's minus the first's, as in scikit-learn."""
        model, rows = self._asked(X)
        logits = model.logits(rows).numpy()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def similarity(self, X: Any) -> np.ndarray:
        """(n,) similarity of each item to its most similar class, from -1 to 1; `reject` compares it with a threshold.

        The mean of two cosines to the class's mean example: plain, and relative to the mean of all classes.
        """
        model, rows = self._asked(X)
        return model.similarity(rows).amax(dim=1).numpy()

    def nearest(self, X: Any, k: int = 1) -> Neighbors:
        """The k nearest examples by cosine: indices, cosines and labels, each (n, k); `sources_[index]` is its file."""
        model, rows = self._asked(X)
        return model.nearest(rows, k)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; with `reject`, a label that was never taught counts as right if "unknown" is predicted.

        Raises:
            UsageError: labels that were never taught, without `reject`.
        """
        predicted = self.predict(X)
        y = column_or_1d(y)
        strange = ~np.isin(y, self.classes_)
        if strange.any():
            if self.threshold_ is None:
                got = f"{y[strange].tolist()[0]!r} ({strange.sum()} of {len(y)})"
                do = "teach them (partial_fit), or set reject= to have them count as right where predicted unknown"
                raise UsageError(f"expected labels among {_few(self.classes_)}, got {got}; {do}")
            y = np.where(strange, UNKNOWN, y.astype(object))
        return float(np.average(predicted == y, weights=sample_weight))

    def save(self, folder: str | Path) -> None:
        """Writes the examples and the embedder's weights to a folder; a classifier already there is replaced.

        Raises:
            UsageError: a head or embedder that cannot be written; the message says what to do.
            CannotWriteError: the disk is full or the folder read-only; its earlier contents are unharmed.
        """
        check_is_fitted(self)
        save_classifier(folder, self._options, self.model_.taught)

    @classmethod
    def load(cls, folder: str | Path, embedder: Any = None, head: Any = None) -> "FewShotClassifier":
        """Loads a classifier that `save` wrote; nothing in the files is run.

        Args:
            folder: the folder to read.
            embedder: the one it was taught with; may be omitted if it was created by the name of a model
                (`TimmTrunk("resnet18", pretrained=True)`), because its weights are then in the folder.
            head: the one it had, if it is not one of this library's.

        Raises:
            MissingFileError: no classifier in the folder.
            UsageError: damaged files, an embedder with other weights, or a required one that was not given.
        """
        options, taught = load_classifier(folder, embedder, head)
        classifier = cls(**options)
        classifier.n_features_in_ = taught.means.shape[1]
        classifier._set(taught)
        return classifier

    @property
    def classes_(self) -> np.ndarray:
        return self._known().taught.classes

    @property
    def sources_(self) -> tuple[str, ...]:
        return self._known().taught.sources

    @property
    def calibrated_(self) -> bool:
        return self._known().calibrated

    @property
    def threshold_(self) -> float | None:
        return self._known().threshold

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def _known(self) -> Model:
        check_is_fitted(self)  # (also an AttributeError, as a property must raise)
        return self.model_

    def _teach(self, X: Any, y: Any, forget: bool) -> "FewShotClassifier":
        first, X = forget or not hasattr(self, "model_"), _listed(X)
        form = {name: vars(self)[name] for name in ("n_features_in_", "feature_names_in_") if name in vars(self)}
        try:
            return self._taught(X, y, first, forget)
        except BaseException:  # validate_data has set these by then
            for name in ("n_features_in_", "feature_names_in_"):
                self.__dict__.pop(name, None)
            self.__dict__.update(form)
            raise

    def _taught(self, X: Any, y: Any, first: bool, forget: bool) -> "FewShotClassifier":
        rows, y = self._embedded(X, y, reset=first)
        sources = [source_of(each) for each in X] if self.embedder is not None else [""] * len(rows)
        check_classification_targets(y)
        with _teaching, threads_for(rows):
            known = None if forget or not hasattr(self, "model_") else self.model_.taught  # (another thread may teach)
            taught = Taught.of(rows, y, sources) if known is None else known.plus(rows, y, sources)
            self._set(taught)
        _warn_of_twins(taught)
        return self

    def _set(self, taught: Taught) -> None:
        """Switches to the new examples, once everything that can fail has been tried."""
        if self.reject is not None and UNKNOWN in taught.classes.tolist():
            raise UsageError(
                f"expected another name than {UNKNOWN!r} for a class, as reject= says it, got it; rename it"
            )
        self.model_ = Model(taught, fit_of(self.head), self.reject, self.false_rejections)
        self._options = self.get_params(deep=False)  # (set_params takes effect when next taught)

    def _asked(self, X: Any) -> tuple[Model, Tensor]:
        """The current model, and X as embeddings."""
        check_is_fitted(self)
        model = self.model_
        return model, self._embedded(_listed(X), reset=False)[0].to(model.taught.means.dtype)

    def _embedded(self, X: Any, y: Any = "no_validation", reset: bool = False) -> tuple[Tensor, Any]:
        if self.embedder is not None:
            embedder = self.embedder if isinstance(self.embedder, ImageEmbedder) else ImageEmbedder(self.embedder)
            X = embedder.transform(X)
        elif isinstance(X, list | tuple) and X and isinstance(X[0], str | Path | Image.Image):
            raise UsageError(f"expected embeddings, got {type(X[0]).__name__}; for images give embedder=TimmTrunk(...)")
        if isinstance(X, Tensor):  # NumPy has no bfloat16
            X = widened(X.detach()).cpu()
        checked = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=reset)
        X, y = checked if isinstance(checked, tuple) else (checked, None)
        X = np.ascontiguousarray(X)  # torch refuses negative strides, and warns about read-only arrays
        return torch.from_numpy(X if X.flags.writeable else X.copy()), y


def _listed(X: Any) -> Any:
    """X, with a single path or image as a list of one, and an iterator as a list."""
    if isinstance(X, str | Path | Image.Image):
        return [X]
    return list(X) if isinstance(X, Iterator) else X


def _warn_of_twins(taught: Taught) -> None:
    if twins := taught.twins():
        a, b = twins[0]
        names = [repr(taught.classes.tolist()[int(taught.labels[each])]) for each in (a, b)]
        files = f" ({taught.sources[a]} and {taught.sources[b]})" if taught.sources[a] else ""
        more = f", and {len(twins) - 1} more" if len(twins) > 1 else ""
        warnings.warn(
            f"the same example is in classes {names[0]} and {names[1]}{files}{more}; take it out of one", stacklevel=4
        )


def _warn_if_not_calibrated(model: Model) -> None:
    model.check_inductive("probabilities")
    if not model.calibrated and len(model.taught.classes) > 1:
        do = "give a class two examples or more"
        warnings.warn(f"the probabilities are not calibrated, as no example can be left out: {do}", stacklevel=3)


def _few(names: np.ndarray) -> str:
    return ", ".join(map(repr, names[:5].tolist())) + (f", .. ({len(names)} in all)" if len(names) > 5 else "")
