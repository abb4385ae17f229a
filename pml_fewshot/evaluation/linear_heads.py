"""Heads that fit a linear classifier to each episode's support, for all episodes of a chunk at once.

Each maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); `distance` is only there to match other heads.
The fits are in float64 and in the space of the S support items, with S unknowns per class, where D is larger.

A penalty applies to the squared norm of the weights, so its effect depends on the length of the embeddings: 1.0 is
strong for embeddings of length 1 (at 40 ways and 5 shots 8 points below prototypes, on letters with a trained network)
and weak for those of length 20. The defaults, None, are constants times the mean squared length of an episode's
centered support items: scaling all embeddings by a constant changes nothing.
"""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.embedders.modes import in_float32
from pml_fewshot.evaluation.heads import fitted_by
from pml_fewshot.evaluation.support import Support

# Times the mean squared length of the centered support; chosen on 15 banks, synthetic and real, raw and normalized, at
# 2 to 40 ways and 1 to 10 shots (`python -m experiments.head_penalties` measures yours). Against the better of
# prototypes and cosines, normalized and at 5 or 10 shots, logistic regression is at worst 0.6 points below (1.0 with a
# hundredth of the constant, 5.8 with ten times it) and up to 69 above, where classes are wide in a few directions.
# Ridge is at worst 0.3 below at up to 5 ways; at 40 it is 4 below on Omniglot, where no penalty does better, and up to
# 79 above on wide classes. A penalty by each episode's leave-one-out errors is no better overall than ridge's constant.
RIDGE_PENALTY = 1.5
LOGISTIC_PENALTY = 0.1
LEAST_PENALTY = 1e-8  # keeps the normal equations solvable
SHORTENINGS = 8  # of a Newton step that raises the loss, to 0.3 of its length each


class CosineScores(nn.Module):
    """Logits (E, N, W) of queries (E, N, D): the cosine to each class's weight (E, W, D), times `scale`."""

    weights: Tensor

    def __init__(self, weights: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.scale = scale

    @in_float32
    def forward(self, query: Tensor) -> Tensor:
        return self.scale * F.normalize(query, dim=2) @ self.weights.transpose(1, 2)


class LinearScores(nn.Module):
    """Logits (E, N, W) of queries (E, N, D): (query - center (E, 1, D)) @ weights (E, D, W) + bias (W,)."""

    center: Tensor
    weights: Tensor
    bias: Tensor

    def __init__(self, center: Tensor, weights: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("weights", weights.to(center))
        self.register_buffer("bias", bias.to(center))

    @in_float32
    def forward(self, query: Tensor) -> Tensor:
        return (query - self.center) @ self.weights + self.bias


def fit_cosine(support: Support, distance: BaseDistance | None = None, scale: float = 10.0) -> CosineScores:
    return CosineScores(F.normalize(support.means(F.normalize(support.items, dim=2)), dim=2), scale)


@fitted_by(fit_cosine)
@in_float32
def cosine_classifier(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, scale: float = 10.0
) -> Tensor:
    """Scores by the cosine to each class's weight, the mean of its normalized support (Qi et al. 2018, imprinting).

    The accuracy does not depend on the logits' `scale`.
    """
    return fit_cosine(Support.of(support), distance, scale)(query)


def fit_ridge(support: Support, distance: BaseDistance | None = None, penalty: float | None = None) -> LinearScores:
    _check_penalty(penalty)
    items, center, is_class = _centered(support)
    gram = items @ items.transpose(1, 2)
    targets = 2 * is_class - 1
    middle = targets.mean(dim=0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE_PENALTY * _mean_or_one(diagonal) if penalty is None else penalty
    dual = torch.cholesky_solve((targets - middle).expand(len(gram), -1, -1), _cholesky(gram))
    return LinearScores(center, items.transpose(1, 2) @ dual, middle)


@fitted_by(fit_ridge)
@in_float32
def ridge_regression(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, penalty: float | None = None
) -> Tensor:
    """Least squares onto +1 for an item's own and -1 for every other class, with an intercept (Bertinetto et al. 2019).

    The same as scikit-learn's RidgeClassifier(alpha=penalty): (X X^T + penalty I)^-1 Y over centered embeddings.

    Args:
        penalty: if None, 1.5 times the mean squared length of the centered support items (RIDGE_PENALTY).

    Raises:
        UsageError: a penalty below 1e-8.
    """
    return fit_ridge(Support.of(support), distance, penalty)(query)


def fit_logistic(
    support: Support, distance: BaseDistance | None = None, penalty: float | None = None, steps: int = 20
) -> LinearScores:
    _check_penalty(penalty)
    check_at_least_one("steps", steps)
    items, center, is_class = _centered(support)
    # rows of root (E, S, R) are the support; the weights (E, R, W) live in the same R coordinates
    in_span = items.shape[1] <= items.shape[2]
    if in_span:  # fewer coordinates than D, those of the support's own span: items items^T = root root^T
        gram = items @ items.transpose(1, 2)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        square = _mean_or_one(diagonal)
        diagonal += 1e-10 * square
        root = _cholesky(gram)
    else:
        root, square = items, _mean_or_one(items.square().sum(dim=2))
    factor = (LOGISTIC_PENALTY * square if penalty is None else torch.full_like(square, penalty))[:, :, None]
    weights = root.new_zeros(len(root), root.shape[2], is_class.shape[1])

    def loss(weights: Tensor) -> Tensor:
        log_shares = (root @ weights).log_softmax(dim=2)
        return factor[:, 0, 0] / 2 * weights.square().sum(dim=(1, 2)) - (log_shares * is_class).sum(dim=(1, 2))

    tolerance = torch.finfo(center.dtype).eps ** 0.7  # of the gradient's length, relative to the first one's
    value, first = loss(weights), None
    for _ in range(steps):
        shares = (root @ weights).softmax(dim=2)
        gradient = root.transpose(1, 2) @ (shares - is_class) + factor * weights
        length = gradient.square().sum(dim=(1, 2))
        first = length if first is None else first
        # episodes that have converged stay as they are, so that none depends on which others share its chunk
        moving = length > tolerance**2 * first
        if not moving.any():
            break
        # rough far from the minimum, where a more accurate step does not help (Eisenstat and Walker 1996)
        accuracy = torch.where(length > 0.1**2 * first, 0.1, 1e-4).to(length)[:, None, None]
        step = _newton_step(root, shares, gradient, factor, accuracy) * moving[:, None, None]
        for _ in range(SHORTENINGS):
            moved = loss(weights - step)
            worse = moved > value
            if not worse.any():
                break
            step = step * torch.where(worse, 0.3, 1.0).to(step)[:, None, None]
        else:
            step = step * ~worse[:, None, None]
        weights, value = weights - step, torch.where(moved > value, value, moved)
    if in_span:  # back to a combination of support items: weights = root^T dual
        weights = items.transpose(1, 2) @ torch.linalg.solve_triangular(root.transpose(1, 2), weights, upper=True)
    return LinearScores(center, weights, weights.new_zeros(is_class.shape[1]))


@fitted_by(fit_logistic)
@in_float32
def logistic_regression(
    support: Tensor,
    query: Tensor,
    distance: BaseDistance | None = None,
    penalty: float | None = None,
    steps: int = 20,
) -> Tensor:
    """Multinomial logistic regression by Newton's method on embeddings centered on the support, without an intercept.

    Minimizes the summed cross-entropy plus penalty / 2 times the squared norm of the weights, the same as
    scikit-learn's LogisticRegression(C=1 / penalty, fit_intercept=False) on centered embeddings (for two classes, where
    that has one weight vector instead of two, C=2 / penalty). Checking for convergence after each step waits for the
    GPU; running all steps unchecked would take longer.

    Args:
        penalty: if None, 0.1 times the mean squared length of the centered support items (LOGISTIC_PENALTY).
        steps: maximum, each shortened if a full one would raise the loss. An episode stops when it reaches float32's
            precision, by default after 6 steps at 5 ways and 8 to 10 at 40.

    Raises:
        UsageError: a penalty below 1e-8 or steps below 1.
    """
    return fit_logistic(Support.of(support), distance, penalty, steps)(query)


def _check_penalty(penalty: float | None) -> None:
    if penalty is not None and not penalty >= LEAST_PENALTY:
        raise UsageError(f"expected a penalty of at least {LEAST_PENALTY}, got {penalty}; raise it")


def _newton_step(root: Tensor, shares: Tensor, gradient: Tensor, penalty: Tensor, accuracy: Tensor) -> Tensor:
    """Solves Hessian x step = gradient by conjugate gradients, in at most R * (W - 1) or 30 iterations.

    They stop when the residual's squared length has fallen to `accuracy` (E, 1, 1) times the gradient's.
    """
    step, residual, direction = torch.zeros_like(gradient), gradient, gradient
    norm = first = residual.square().sum(dim=(1, 2), keepdim=True)
    least = torch.finfo(norm.dtype).tiny
    for _ in range(min(gradient.shape[1] * (gradient.shape[2] - 1), 30)):
        moving = norm > accuracy * first
        if not moving.any():
            break
        moved = root @ direction
        moved = shares * (moved - (shares * moved).sum(dim=2, keepdim=True))
        image = root.transpose(1, 2) @ moved + penalty * direction  # Hessian x direction
        length = norm / (direction * image).sum(dim=(1, 2), keepdim=True).clamp(min=least) * moving
        step = step + length * direction
        residual = residual - length * image
        old, norm = norm, residual.square().sum(dim=(1, 2), keepdim=True)
        direction = residual + norm / old.clamp(min=least) * direction
    return step


def _cholesky(gram: Tensor) -> Tensor:
    """Returns the factors of (E, S, S), NaN if there is none, as for NaN items: an error would wait for the GPU."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    return factor.masked_fill((failed != 0)[:, None, None], torch.nan)


def _centered(support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """Returns items (E, S, D) minus their mean in float64, the mean (E, 1, D) in their dtype, and classes (S, W)."""
    # the mean of differences to the first item: exactly zero for equal items, where their own mean is off by rounding
    first = support.items[:, :1]
    items = (support.items - first).double()
    offset = items.mean(dim=1, keepdim=True)
    items -= offset
    is_class = F.one_hot(support.labels, len(support.sizes)).to(items)
    return items, first + offset.to(first), is_class


def _mean_or_one(squares: Tensor) -> Tensor:
    """Returns the mean (E, 1) of squared lengths (E, S), or 1 if all are 0, as for a support of equal items."""
    mean = squares.mean(dim=1, keepdim=True)
    return mean.where(mean > 0, 1.0)
