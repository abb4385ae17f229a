"""FewShotClassifier with heads that see all rows of a call together, and with the tuned one that does not."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pml_fewshot import FewShotClassifier, UsageError
from pml_fewshot.classify import model
from pml_fewshot.classify.leave_one_out import leave_one_out
from pml_fewshot.evaluation.transductive_heads import alpha_tim, bd_cspn, laplacian_shot, pt_map
from pml_fewshot.evaluation.tuned_heads import fine_tuning, transductive_fine_tuning

SHORT = {"steps": 20, "learning_rate": 0.01}
HEADS = [
    bd_cspn,
    laplacian_shot,
    partial(alpha_tim, alpha=2.0, **SHORT),
    partial(pt_map, steps=3),
    partial(transductive_fine_tuning, **SHORT),
]
POINTS = np.random.default_rng(9).normal(size=(3, 10))


def examples(sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(len(sizes)), sizes)
    rows = POINTS[number] + 0.7 * rng.normal(size=(len(number), 10))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.array(["ant", "bee", "cat"])[number]


def name_of(head: Any) -> str:
    return (head.func if isinstance(head, partial) else head).__name__


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_a_transductive_head_sees_all_rows_of_a_call(head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (X, y), (Q, _) = examples([3, 3, 3], 0), examples([8, 6, 4], 1)
    support = torch.from_numpy(X).unflatten(0, (3, 3))[None]
    expected = head(support, torch.from_numpy(Q)[None])[0]
    classifier = FewShotClassifier(head=head).fit(X, y)
    monkeypatch.setattr(model, "CHUNK_FLOATS", 1)  # a row at a time, where rows are on their own
    np.testing.assert_allclose(classifier.decision_function(Q), expected.numpy(), rtol=1e-6, atol=1e-8)
    assert (classifier.predict(Q) == classifier.classes_[expected.argmax(dim=1).numpy()]).all()
    classifier.save(tmp_path)
    assert (FewShotClassifier.load(tmp_path).decision_function(Q) == classifier.decision_function(Q)).all()
    assert not classifier.calibrated_


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_classes_of_different_sizes_and_unknown_rows(head: Any):
    (X, y), (Q, labels) = examples([1, 5, 2], 0), examples([8, 8, 8], 1)
    classifier = FewShotClassifier(head=head, reject="auto", false_rejections=0.2).fit(X, y)
    assert (classifier.predict(Q) == labels).mean() > 0.6
    far = np.concatenate([Q, -Q[:3] - Q[8:11]])
    assert (classifier.predict(far)[-3:] == "unknown").all()  # by similarity, which is none of the head's


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_probabilities_and_leave_one_out_are_refused(head: Any):
    X, y = examples([4, 4, 4], 0)
    classifier = FewShotClassifier(head=head).fit(X, y)
    for ask in (classifier.predict_proba, classifier.answer, lambda _: leave_one_out(classifier)):
        with pytest.raises(UsageError, match=f"expected an inductive head for .*, got {name_of(head)}"):
            ask(X)


def test_fine_tuning_is_a_head_like_the_others(tmp_path: Path):
    (X, y), (Q, labels) = examples([1, 5, 2], 0), examples([8, 8, 8], 1)
    classifier = FewShotClassifier(head=partial(fine_tuning, steps=50, similarity="cosine")).fit(X, y)
    assert (classifier.predict(Q) == labels).mean() > 0.6
    one_by_one = np.concatenate([classifier.decision_function(row[None]) for row in Q])
    np.testing.assert_allclose(classifier.decision_function(Q), one_by_one, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(classifier.predict_proba(Q).sum(axis=1), 1)
    classifier.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path)
    assert loaded.head.func is fine_tuning
    assert (loaded.predict_proba(Q) == classifier.predict_proba(Q)).all()
    assert leave_one_out(classifier).accuracy > 0.5
