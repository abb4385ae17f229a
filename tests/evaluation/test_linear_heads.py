"""Linear heads: against scikit-learn, fitted episode by episode; and what their default penalties promise."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation import linear_heads
from pml_fewshot.evaluation.heads import nearest_prototype
from pml_fewshot.evaluation.linear_heads import LEAST_PENALTY, cosine_classifier, logistic_regression, ridge_regression

QUERIES = 20
HEADS: list[Callable[..., Tensor]] = [cosine_classifier, ridge_regression, logistic_regression]
FITTED = HEADS[1:]
# ways, shots, dimensions: more dimensions than support items, fewer, one shot, two ways
SIZES = [(5, 1, 16), (5, 3, 40), (4, 6, 5), (3, 10, 2), (2, 1, 8), (2, 5, 3)]


def clouds(ways: int, shots: int, dims: int, norm: float | None = 1.0, count: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping classes off the origin, in float64; every embedding of one norm, or as drawn where it is None."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centres = 0.5 + randn(count, ways, 1, dims)
    support = centres + randn(count, ways, shots, dims)
    query = (centres + 1.2 * randn(count, ways, QUERIES // ways + 1, dims)).flatten(1, 2)[:, :QUERIES]
    if norm is not None:
        support, query = (part / part.norm(dim=-1, keepdim=True) * norm for part in (support, query))
    return support, query


def items_and_classes(support: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One episode's support (W, K, D) as scikit-learn takes it."""
    return support.flatten(0, 1).numpy(), np.repeat(np.arange(support.shape[0]), support.shape[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("alpha", "norm"), [(1.0, 1.0), (0.01, 1.0), (50.0, None)])
def test_ridge_equals_scikit_learns(size: tuple[int, int, int], alpha: float, norm: float | None):
    support, query = clouds(*size, norm)
    logits = ridge_regression(support, query, penalty=alpha)
    assert logits.dtype == torch.float64
    single = ridge_regression(support.float(), query.float(), penalty=alpha)
    for e in range(len(support)):
        expected = RidgeClassifier(alpha=alpha).fit(*items_and_classes(support[e])).decision_function(query[e].numpy())
        if size[0] == 2:  # scikit-learn scores the second class only
            expected = np.stack([-expected, expected], axis=1)
        np.testing.assert_allclose(logits[e].numpy(), expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(single[e].numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("penalty", [0.01, 1.0, 20.0])
def test_logistic_equals_scikit_learns(size: tuple[int, int, int], penalty: float):
    support, query = clouds(*size)
    logits = logistic_regression(support, query, penalty=penalty)
    assert logits.dtype == torch.float64
    for e in range(len(support)):
        items, classes = items_and_classes(support[e])
        middle = items.mean(axis=0)
        # for two classes scikit-learn has one weight, the difference v of ours: |v/2|^2 + |-v/2|^2 = |v|^2 / 2
        inverse = 2 / penalty if size[0] == 2 else 1 / penalty
        exact = LogisticRegression(C=inverse, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cg")
        expected = exact.fit(items - middle, classes).decision_function(query[e].numpy() - middle)
        if size[0] == 2:
            expected = np.stack([-expected / 2, expected / 2], axis=1)
        # up to a constant a query
        ours, theirs = (each - each.mean(axis=1, keepdims=True) for each in (logits[e].numpy(), expected))
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("head", "times"), [(ridge_regression, 1.5), (logistic_regression, 0.1)])
def test_the_default_penalty_is_a_multiple_of_the_mean_squared_length_of_the_centered_support(
    head: Callable[..., Tensor], times: float, size: tuple[int, int, int]
):
    support, query = clouds(*size, norm=None)
    for e, factor in enumerate((1.0, 30.0, 0.2)):  # each episode has its own
        support[e] *= factor
        query[e] *= factor
    logits = head(support, query)
    for e in range(3):
        items = support[e].flatten(0, 1)
        penalty = times * (items - items.mean(dim=0)).square().sum(dim=1).mean().item()
        alone = head(support[e : e + 1], query[e : e + 1], penalty=penalty)[0]
        torch.testing.assert_close(logits[e], alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("head", FITTED)
@pytest.mark.parametrize("size", [(20, 1, 16), (20, 5, 16), (5, 5, 64)])
def test_by_default_the_scale_of_the_embeddings_changes_nothing(
    head: Callable[..., Tensor], size: tuple[int, int, int]
):
    support, query = (part.float() for part in clouds(*size, norm=None, count=10))
    logits = head(support, query)
    for factor in (1e-6, 0.01, 100, 1e6):
        scaled = head(support * factor, query * factor)
        assert torch.equal(scaled.argmax(dim=2), logits.argmax(dim=2))
        assert (scaled - logits).abs().max() < 1e-3 * logits.abs().max()


def accuracies(heads: list[Callable[..., Tensor]], support: Tensor, query: Tensor) -> list[float]:
    """Percent of queries (E, W, Q, D) that each head puts into their own class."""
    way = torch.arange(query.shape[1])[:, None]
    logits = [head(support, query.flatten(1, 2)).unflatten(1, query.shape[1:3]) for head in heads]
    return [100 * (each.argmax(dim=3) == way).double().mean().item() for each in logits]


def gaussians(episodes: int, ways: int, shots: int, dims: int, within: float, wide: float = 0.0) -> list[Tensor]:
    """Support and query (E, W, 10, D): normal classes, of more variance along the first four axes where `wide` is."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    items = randn(episodes, ways, 1, dims) + within * randn(episodes, ways, shots + 10, dims)
    items[..., :4] += wide * randn(episodes, ways, shots + 10, 4)
    return [items[:, :, :shots], items[:, :, shots:]]


def test_on_unit_vectors_of_many_ways_the_default_logistic_is_no_worse_than_prototypes():
    support, query = (F.normalize(part + 3, dim=3) for part in gaussians(4, 40, 5, 16, within=0.5))
    strong = partial(logistic_regression, penalty=1.0)
    prototypes, default, loses = accuracies([nearest_prototype, logistic_regression, strong], support, query)
    assert default > prototypes - 1
    assert loses < prototypes - 5


@pytest.mark.parametrize("head", FITTED)
def test_the_defaults_suit_round_classes_and_are_far_better_where_some_directions_say_nothing(
    head: Callable[..., Tensor],
):
    """50 items of 64 dimensions, which a weak penalty fits to the last, and a strong one classifies by their means."""
    prototypes, round_classes = accuracies([nearest_prototype, head], *gaussians(20, 5, 10, 64, within=1.5))
    assert round_classes > prototypes - 1
    prototypes, wide_classes = accuracies([nearest_prototype, head], *gaussians(20, 5, 10, 64, within=1.0, wide=10.0))
    assert wide_classes > prototypes + 30


@pytest.mark.filterwarnings("ignore:The number of unique classes is greater:UserWarning")
def test_the_default_steps_reach_scikit_learns_minimum_where_it_is_far():
    """40 classes of one item each, some 7 times as long as others, whose first Newton steps overshoot."""
    support, query = gaussians(4, 40, 1, 64, within=1.2)
    lengths = torch.linspace(-1, 1, 40).exp()[:, None, None]
    support, query = support * lengths, (query * lengths).flatten(1, 2)
    logits = logistic_regression(support, query)
    for e in range(4):
        items, classes = items_and_classes(support[e].double())
        middle = items.mean(axis=0)
        inverse = 10 / np.square(items - middle).sum(axis=1).mean()
        exact = LogisticRegression(C=inverse, fit_intercept=False, tol=1e-10, max_iter=10_000)
        theirs = exact.fit(items - middle, classes).decision_function(query[e].numpy() - middle)
        ours, theirs = (each - each.mean(axis=1, keepdims=True) for each in (logits[e].numpy(), theirs))
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_logistic_comes_nearer_with_each_step():
    support, query = clouds(5, 5, 16)
    one, three, best = (logistic_regression(support, query, penalty=0.01, steps=steps) for steps in (1, 3, 40))
    assert (three - best).norm() < (one - best).norm()


def test_cosine_equals_a_loop():
    scale = 0.3
    support, query = clouds(4, 3, 6, norm=None)
    logits = cosine_classifier(support, query, scale=scale)
    s, q = support.numpy(), query.numpy()
    for e, n, way in np.ndindex(3, QUERIES, 4):
        weight = sum(item / math.sqrt((item**2).sum()) for item in s[e, way]) / 3
        cosine = (weight @ q[e, n]) / math.sqrt((weight @ weight) * (q[e, n] @ q[e, n]))
        assert logits[e, n, way] == pytest.approx(scale * cosine, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(cosine_classifier(support * 30, query * 0.01, scale=scale), logits)
    assert cosine_classifier(support, support.flatten(1, 2)).max() <= 10 + 1e-9  # the default scale


@pytest.mark.parametrize("head", [*HEADS, partial(logistic_regression, penalty=0.1, steps=2)])
def test_an_episode_does_not_depend_on_the_others_of_its_batch(head: Callable[..., Tensor]):
    """Easy, hard, huge and degenerate episodes beside each other; each takes its own number of steps."""
    support, query = clouds(4, 3, 10, count=5)
    for e, factor in enumerate((1.0, 40.0, 1e-3, 5.0)):
        support[e] *= factor
        query[e] *= factor
    support[4] = support[4, 0, 0]
    together = head(support, query)
    assert torch.equal(head(support, query, CosineSimilarity()), together)  # a linear classifier has no distance
    for e in range(5):
        alone = head(support[e : e + 1], query[e : e + 1])[0]
        torch.testing.assert_close(together[e], alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("head", FITTED)
def test_a_shift_of_all_embeddings_changes_nothing(head: Callable[..., Tensor]):
    support, query = clouds(4, 3, 10)
    shift = torch.linspace(-50, 80, 10, dtype=torch.float64)
    torch.testing.assert_close(head(support + shift, query + shift), head(support, query), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_support_of_equal_items_gives_finite_logits(head: Callable[..., Tensor], value: float, dtype: torch.dtype):
    item, query = (part.to(dtype) for part in clouds(5, 1, 8))
    support = value * (1 + item[:, :1]).expand(3, 5, 7, 8)
    logits = head(support, query)
    assert torch.isfinite(logits).all()
    if value == 0 or head in FITTED:  # nothing to tell classes by, the rounding of their mean included
        torch.testing.assert_close(logits, logits[:, :, :1].expand_as(logits))
    assert torch.isfinite(head(item.transpose(1, 2), query[:, :1])).all()  # one way, one query


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("size", "collapsed"), [((5, 5, 64), False), ((5, 50, 64), False), ((5, 20, 2), False), ((20, 5, 8), True)]
)
def test_float32_is_near_float64(head: Callable[..., Tensor], size: tuple[int, int, int], collapsed: bool):
    """The Gram matrix of items that coincide (a well trained network's), or of more than dimensions, is singular."""
    support, query = clouds(*size, count=2)
    support = support[:, :, :1].expand_as(support) if collapsed else support
    logits, double = head(support.float(), query.float()), head(support, query)
    assert logits.dtype == torch.float32
    assert (logits - double).abs().max() < 1e-2 * double.abs().max()


@pytest.mark.parametrize("head", FITTED)
def test_the_least_penalty_can_be_solved_and_a_smaller_one_is_refused(head: Callable[..., Tensor]):
    for shots in (1, 5):
        support, query = clouds(5, shots, 64)
        assert torch.isfinite(head(support.float(), query.float(), penalty=LEAST_PENALTY)).all()
    for penalty in (0.0, 1e-9, float("nan")):
        with pytest.raises(UsageError, match=f"expected a penalty of at least {LEAST_PENALTY}, got {penalty}; raise"):
            head(support, query, penalty=penalty)
    with pytest.raises(UsageError, match="expected steps to be an integer of at least 1"):
        logistic_regression(support, query, steps=0)


@pytest.mark.parametrize("head", FITTED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_an_episode_that_cannot_be_fitted_gives_nan_beside_others(head: Callable[..., Tensor], value: float):
    support, query = clouds(5, 1, 16)
    whole = head(support, query)
    support[1, 2, 0, 3] = value
    found = head(support, query)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=1e-7, atol=1e-9)


def test_a_matrix_that_has_no_factor_is_nan():
    given = torch.tensor([[[4.0, 2.0], [2.0, 2.0]], [[1.0, 2.0], [2.0, 1.0]]])
    found = linear_heads._cholesky(given)
    assert torch.equal(found[0], torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    assert found[1].isnan().all()


@pytest.mark.parametrize("head", [ridge_regression, cosine_classifier])
def test_gradients_flow_to_support_and_queries(head: Callable[..., Tensor]):
    support, query = (part.requires_grad_() for part in clouds(2, 2, 3, norm=None, count=2))
    assert torch.autograd.gradcheck(lambda s, q: head(s, q[:, :3]), (support, query))
