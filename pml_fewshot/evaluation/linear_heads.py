"""Heads that fit a linear classifier to each episode's support, for all episodes of a chunk at once.

Support (E, W, K, D) and query (E, N, D) give logits (E, N, W); `distance` is not used, but there for every head's form.
All work in the space that the S = W * K support items span, with S unknowns a class instead of D, and in float64,
because the Gram matrix of linearly dependent float32 embeddings is not quite positive definite. A penalty, on the
squared norm of the weights, counts relative to the squared norms of the embeddings: normalize the bank
(`EmbeddingBank.normalized`), as is the custom (Tian et al. 2020), or choose it.
"""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one

LEAST_PENALTY = 1e-8  # keeps the normal equations solvable
SHORTENINGS = 8  # of a Newton step that raises the loss, to 0.3 of its length each


def cosine_classifier(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, scale: float = 10.0
) -> Tensor:
    """Scores by the cosine to each class's weight, the mean of its normalized support (Qi et al. 2018, imprinting).

    The accuracy does not depend on the logits' `scale`.
    """
    weights = F.normalize(F.normalize(support, dim=3).mean(dim=2), dim=2)
    return scale * F.normalize(query, dim=2) @ weights.transpose(1, 2)


def ridge_regression(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, penalty: float = 1.0
) -> Tensor:
    """Least squares onto +1 for an item's own and -1 for every other class, with an intercept (Bertinetto et al. 2019).

    The same as scikit-learn's RidgeClassifier(alpha=penalty): (X X^T + penalty I)^-1 Y over centered embeddings.

    Raises:
        UsageError: a penalty below 1e-8.
    """
    _check_penalty(penalty)
    gram, query_gram, is_class = _gram(support, query)
    targets = 2 * is_class - 1
    middle = targets.mean(dim=0)
    gram.diagonal(dim1=1, dim2=2).add_(penalty)
    dual = torch.cholesky_solve((targets - middle).expand(len(gram), -1, -1), torch.linalg.cholesky(gram))
    return query_gram @ dual.to(query_gram) + middle.to(query_gram)


def logistic_regression(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, penalty: float = 1.0, steps: int = 10
) -> Tensor:
    """Multinomial logistic regression by Newton's method on embeddings centered on the support, without an intercept.

    Minimizes the summed cross-entropy plus penalty / 2 times the squared norm of the weights, the same as
    scikit-learn's LogisticRegression(C=1 / penalty, fit_intercept=False) on centered embeddings (for two classes, where
    that has one weight vector instead of two, C=2 / penalty). Each of the `steps` is shortened where a full one would
    raise the loss; 10 reach float32's precision on normalized embeddings.

    Raises:
        UsageError: a penalty below 1e-8 or steps below 1.
    """
    _check_penalty(penalty)
    check_at_least_one("steps", steps)
    gram, query_gram, is_class = _gram(support, query)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-10 * diagonal.mean(dim=1, keepdim=True).clamp(min=1e-12)
    # gram = L L^T: rows of L (E, S, S) are the support in coordinates of its own span, where weights (E, S, W) live
    root = torch.linalg.cholesky(gram)
    weights = gram.new_zeros(*gram.shape[:2], is_class.shape[1])

    def loss(weights: Tensor) -> Tensor:
        log_shares = (root @ weights).log_softmax(dim=2)
        return penalty / 2 * weights.square().sum(dim=(1, 2)) - (log_shares * is_class).sum(dim=(1, 2))

    tolerance = torch.finfo(query.dtype).eps ** 0.7  # of the gradient's length, to that of the first
    value, first = loss(weights), None
    for _ in range(steps):
        shares = (root @ weights).softmax(dim=2)
        gradient = root.transpose(1, 2) @ (shares - is_class) + penalty * weights
        length = gradient.square().sum(dim=(1, 2))
        first = length if first is None else first
        # episodes that have converged stay as they are, so that none depends on which others share its chunk
        moving = length > tolerance**2 * first
        if not moving.any():
            break
        step = _newton_step(root, shares, gradient, penalty) * moving[:, None, None]
        for _ in range(SHORTENINGS):
            moved = loss(weights - step)
            worse = moved > value
            if not worse.any():
                break
            step = step * torch.where(worse, 0.3, 1.0).to(step)[:, None, None]
        else:
            step = step * ~worse[:, None, None]
        weights, value = weights - step, torch.where(moved > value, value, moved)
    # back to a combination of support items: weights = L^T dual
    dual = torch.linalg.solve_triangular(root.transpose(1, 2), weights, upper=True)
    return query_gram @ dual.to(query_gram)


def _check_penalty(penalty: float) -> None:
    if not penalty >= LEAST_PENALTY:
        raise UsageError(f"expected a penalty of at least {LEAST_PENALTY}, got {penalty}; raise it")


def _newton_step(root: Tensor, shares: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    """Solves Hessian x step = gradient to a hundredth by conjugate gradients, at most S * (W - 1) or 30 of them."""
    step, residual, direction = torch.zeros_like(gradient), gradient, gradient
    norm = first = residual.square().sum(dim=(1, 2), keepdim=True)
    least = torch.finfo(norm.dtype).tiny
    for _ in range(min(gradient.shape[1] * (gradient.shape[2] - 1), 30)):
        moving = norm > 1e-4 * first
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


def _gram(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of centered support items (E, S, S), of queries with them (E, N, S), and each item's class (S, W)."""
    ways, shots = support.shape[1:3]
    middle = support.flatten(1, 2).mean(dim=1, keepdim=True)
    items = support.flatten(1, 2) - middle
    exact = items.double()
    is_class = torch.eye(ways, device=items.device, dtype=exact.dtype).repeat_interleave(shots, dim=0)
    return exact @ exact.transpose(1, 2), (query - middle) @ items.transpose(1, 2), is_class
