"""Linear heads: against scikit-learn and scipy, fitted episode by episode."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from pml_fewshot.evaluation.linear_heads import LEAST_PENALTY, cosine_classifier, logistic_regression, ridge_regression

QUERIES = 20
HEADS: list[Callable[..., Tensor]] = [cosine_classifier, ridge_regression, logistic_regression]
# ways, shots, dimensions: more dimensions than support items, fewer, one shot, two ways
SIZES = [(5, 1, 16), (5, 3, 40), (4, 6, 5), (3, 10, 2), (2, 1, 8), (2, 5, 3)]


def clouds(
    ways: int, shots: int, dims: int, norm: float | None = 1.0, count: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Overlapping classes off the origin, in float64; every embedding of one norm, or as drawn where it is None."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    centres = 0.5 + randn(count, ways, 1, dims)
    support = centres + randn(count, ways, shots, dims)
    query = (centres + 1.2 * randn(count, ways, QUERIES // ways + 1, dims)).flatten(1, 2)[:, :QUERIES]
    if norm is not None:
        support, query = (part / part.norm(dim=-1, keepdim=True) * norm for part in (support, query))
    return support, query


def items_and_classes(support: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One episode's support (W, K, D) as scikit-learn takes it."""
    return support.flatten(0, 1).numpy(), np.repeat(np.arange(support.shape[0]), support.shape[1])


def up_to_a_constant(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=1, keepdims=True)


def objective(weights: np.ndarray, items: np.ndarray, classes: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Summed cross-entropy plus penalty / 2 |weights|^2 and its gradient, in the embeddings' own dimensions."""
    weights = weights.reshape(items.shape[1], -1)
    logits = items @ weights
    best = logits.max(axis=1, keepdims=True)
    totals = best + np.log(np.exp(logits - best).sum(axis=1, keepdims=True))
    shares = np.exp(logits - totals)
    one_hot = np.eye(weights.shape[1])[classes]
    value = (totals[:, 0] - logits[np.arange(len(items)), classes]).sum() + penalty / 2 * (weights**2).sum()
    return value, (items.T @ (shares - one_hot) + penalty * weights).ravel()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("norm", [1.0, None])
def test_ridge_equals_scikit_learns(size: tuple[int, int, int], alpha: float, norm: float | None):
    support, query = clouds(*size, norm)
    logits = ridge_regression(support, query, penalty=alpha)
    assert logits.shape == (3, QUERIES, size[0])
    assert logits.dtype == torch.float64
    single = ridge_regression(support.float(), query.float(), penalty=alpha)
    for e in range(len(support)):
        expected = RidgeClassifier(alpha=alpha).fit(*items_and_classes(support[e])).decision_function(query[e].numpy())
        if size[0] == 2:  # scikit-learn scores the second class only
            expected = np.stack([-expected, expected], axis=1)
        np.testing.assert_allclose(logits[e].numpy(), expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(single[e].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_ridge_has_a_penalty_of_one_by_default():
    support, query = clouds(5, 3, 8)
    expected = RidgeClassifier().fit(*items_and_classes(support[0])).decision_function(query[0].numpy())
    np.testing.assert_allclose(ridge_regression(support, query)[0].numpy(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("penalty", [0.1, 1.0, 20.0])
def test_logistic_equals_scikit_learns(size: tuple[int, int, int], penalty: float):
    support, query = clouds(*size)
    logits = logistic_regression(support, query, penalty=penalty)
    assert logits.shape == (3, QUERIES, size[0])
    assert logits.dtype == torch.float64
    for e in range(len(support)):
        items, classes = items_and_classes(support[e])
        middle = items.mean(axis=0)
        # for two classes scikit-learn has one weight, the difference v of ours: |v/2|^2 + |-v/2|^2 = |v|^2 / 2
        inverse = 2 / penalty if size[0] == 2 else 1 / penalty
        fitted = LogisticRegression(
            C=inverse, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cholesky"
        ).fit(items - middle, classes)
        expected = fitted.decision_function(query[e].numpy() - middle)
        if size[0] == 2:
            expected = np.stack([-expected / 2, expected / 2], axis=1)
        ours, theirs = up_to_a_constant(logits[e].numpy()), up_to_a_constant(expected)
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_logistic_in_float32_equals_float64():
    support, query = clouds(5, 5, 64)
    double = logistic_regression(support, query)
    single = logistic_regression(support.float(), query.float())
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-4 * double.abs().max()


@pytest.mark.parametrize("size", [(5, 1, 16), (5, 5, 16), (4, 6, 5), (20, 2, 64), (2, 5, 8)])
@pytest.mark.parametrize(("norm", "penalty"), [(1.0, 1.0), (1.0, 0.01), (30.0, 1.0)])
def test_logistic_reaches_the_minimum_of_its_objective(size: tuple[int, int, int], norm: float, penalty: float):
    """The weights themselves are the logits of the unit vectors, laid off from the middle of the support."""
    support, _ = clouds(*size, norm, count=2)
    middle = support.flatten(1, 2).mean(dim=1, keepdim=True)
    weights = logistic_regression(support, middle + torch.eye(size[2], dtype=torch.float64), penalty=penalty)
    for e in range(len(support)):
        items, classes = items_and_classes(support[e])
        items = items - items.mean(axis=0)
        value, gradient = objective(weights[e].numpy(), items, classes, penalty)
        at_zero, gradient_at_zero = objective(np.zeros(weights[e].numel()), items, classes, penalty)
        assert at_zero == pytest.approx(len(items) * math.log(size[0]))
        best = scipy.optimize.minimize(
            objective,
            np.zeros(weights[e].numel()),
            (items, classes, penalty),
            "L-BFGS-B",
            jac=True,
            options={"maxiter": 5000, "ftol": 0, "gtol": 1e-9, "maxcor": 30},
        )
        assert best.fun * (1 - 1e-9) <= value <= best.fun * (1 + 1e-6)
        assert np.linalg.norm(gradient) < 1e-4 * np.linalg.norm(gradient_at_zero)


def test_logistic_of_more_steps_does_not_move_away():
    support, query = clouds(5, 5, 16)
    ten = logistic_regression(support, query)
    torch.testing.assert_close(logistic_regression(support, query, steps=40), ten, rtol=1e-9, atol=1e-9)
    one, three = (logistic_regression(support, query, penalty=0.01, steps=steps) for steps in (1, 3))
    best = logistic_regression(support, query, penalty=0.01, steps=40)
    assert (three - best).norm() < (one - best).norm()


@pytest.mark.parametrize("scale", [1.0, 10.0, 0.3])
def test_cosine_equals_a_loop(scale: float):
    support, query = clouds(4, 3, 6, norm=None)
    logits = cosine_classifier(support, query, scale=scale)
    s, q = support.numpy(), query.numpy()
    for e, n, way in np.ndindex(3, QUERIES, 4):
        weight = sum(item / math.sqrt((item**2).sum()) for item in s[e, way]) / 3
        cosine = (weight @ q[e, n]) / math.sqrt((weight @ weight) * (q[e, n] @ q[e, n]))
        assert logits[e, n, way] == pytest.approx(scale * cosine, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(cosine_classifier(support * 30, query * 0.01, scale=scale), logits)
    assert cosine_classifier(support, support.flatten(1, 2)).max() <= 10 + 1e-9  # the default scale


@pytest.mark.parametrize("head", HEADS)
def test_an_episode_does_not_depend_on_the_others_of_its_batch(head: Callable[..., Tensor]):
    """Easy, hard, huge and degenerate episodes beside each other."""
    support, query = clouds(4, 3, 10, count=5)
    for e, factor in enumerate((1.0, 40.0, 1e-3, 5.0)):
        support[e] *= factor
        query[e] *= factor
    support[4] = support[4, 0, 0]
    together = head(support, query)
    for e in range(5):
        alone = head(support[e : e + 1], query[e : e + 1])[0]
        torch.testing.assert_close(together[e], alone, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(head(support.flip(0), query.flip(0)).flip(0), together, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_unfinished_episode_does_not_depend_on_the_others_either(steps: int):
    """Each episode takes its own number of conjugate gradients to a step."""
    support, query = clouds(4, 3, 10, count=6)
    factor = torch.logspace(-1, 1.5, 6, dtype=torch.float64)
    support, query = support * factor[:, None, None, None], query * factor[:, None, None]
    together = logistic_regression(support, query, penalty=0.1, steps=steps)
    alone = [
        logistic_regression(s[None], q[None], penalty=0.1, steps=steps) for s, q in zip(support, query, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_the_order_of_classes_shots_and_queries_changes_only_the_order_of_the_logits(head: Callable[..., Tensor]):
    support, query = clouds(4, 3, 10)
    logits, order = head(support, query), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(head(support[:, order], query), logits[:, :, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(support.flip(2), query), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(support, query.flip(1)), logits.flip(1))
    torch.testing.assert_close(head(support, query[:, :1]), logits[:, :1])


@pytest.mark.parametrize("head", [ridge_regression, logistic_regression])
def test_a_shift_of_all_embeddings_changes_nothing(head: Callable[..., Tensor]):
    support, query = clouds(4, 3, 10)
    shift = torch.linspace(-50, 80, 10, dtype=torch.float64)
    torch.testing.assert_close(head(support + shift, query + shift), head(support, query), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_a_linear_classifier_has_no_distance(head: Callable[..., Tensor]):
    support, query = clouds(3, 2, 4)
    assert torch.equal(head(support, query, CosineSimilarity()), head(support, query))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.3, 25.0])
def test_a_support_of_equal_items_gives_finite_logits(head: Callable[..., Tensor], dtype: torch.dtype, value: float):
    _, query = clouds(5, 1, 8)
    logits = head(torch.full((3, 5, 4, 8), value, dtype=dtype), query.to(dtype))
    assert torch.isfinite(logits).all()
    if value == 0:
        torch.testing.assert_close(logits, logits[:, :, :1].expand_as(logits))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(5, 50, 64), (20, 20, 64), (50, 10, 64), (5, 20, 2)])
def test_float32_support_of_many_more_items_than_dimensions(head: Callable[..., Tensor], size: tuple[int, int, int]):
    """The matrix of all pairs of support items is then singular but for rounding."""
    support, query = clouds(*size, count=2)
    logits = head(support.float(), query.float())
    double = head(support, query)
    assert torch.isfinite(logits).all()
    assert (logits - double).abs().max() < 1e-2 * double.abs().max()


@pytest.mark.parametrize("head", HEADS)
def test_float32_support_of_classes_whose_items_coincide(head: Callable[..., Tensor]):
    """What a well trained network makes of its classes, give or take."""
    support, query = clouds(20, 5, 8, count=2)
    support = support[:, :, :1].expand_as(support)
    logits = head(support.float(), query.float())
    double = head(support, query)
    assert torch.isfinite(logits).all()
    assert (logits - double).abs().max() < 1e-2 * double.abs().max()


@pytest.mark.parametrize("head", [ridge_regression, logistic_regression])
@pytest.mark.parametrize("size", [(5, 1, 64), (5, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_penalty_that_is_taken_can_be_solved(
    head: Callable[..., Tensor], size: tuple[int, int, int], dtype: torch.dtype
):
    support, query = clouds(*size)
    assert torch.isfinite(head(support.to(dtype), query.to(dtype), penalty=LEAST_PENALTY)).all()


@pytest.mark.parametrize("head", HEADS)
def test_one_way_and_one_query(head: Callable[..., Tensor]):
    support, query = clouds(1, 3, 4)
    assert head(support, query[:, :1]).shape == (3, 1, 1)
    assert torch.isfinite(head(support, query)).all()


@pytest.mark.parametrize("head", [ridge_regression, logistic_regression])
@pytest.mark.parametrize("penalty", [0.0, -1.0, 1e-9, float("nan")])
def test_a_penalty_of_nothing_is_refused(head: Callable[..., Tensor], penalty: float):
    with pytest.raises(ValueError, match=f"expected a penalty of at least {LEAST_PENALTY}, got {penalty}; raise it"):
        head(*clouds(3, 2, 4), penalty=penalty)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0])
def test_wrong_steps_are_refused(steps: object):
    with pytest.raises(ValueError, match="expected steps to be an integer of at least 1"):
        logistic_regression(*clouds(3, 2, 4), steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [ridge_regression, cosine_classifier])
def test_gradients_flow_to_support_and_queries(head: Callable[..., Tensor]):
    support, query = (part.requires_grad_() for part in clouds(2, 2, 3, norm=None, count=2))
    assert torch.autograd.gradcheck(lambda s, q: head(s, q[:, :3]), (support, query))
