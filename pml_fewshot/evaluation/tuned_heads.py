"""Heads that tune a classifier's weights by gradient steps, for all episodes of a chunk at once.

The weights (E, W, D), one row per class, start at the prototypes, so nothing is random, and are updated by Adam (Kingma
and Ba 2015). The gradients are written out: with 80 items of 640 dimensions, a step of an episode takes 40 microseconds
on one core, nearly all of it in two matrix products. Adam works coordinate by coordinate: each episode's steps are
independent, and they leave the span of the items, which has fewer coordinates.

Internally, logits are (E, W, M) for M items: a softmax over the second-to-last axis is several times as fast as over
the last.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.embedders.modes import in_float32
from pml_fewshot.evaluation.heads import Scores, fitted_by, transductive
from pml_fewshot.evaluation.linear_heads import CosineScores, LinearScores
from pml_fewshot.evaluation.support import Support

Similarity = Literal["squared", "euclidean", "cosine"]
MOMENTS = (0.9, 0.999)  # of Adam
EPSILON = 1e-8  # that Adam adds to a root
LEAST_LOG = -87.0  # of a share, below which float32 has none


class Logits(Protocol):
    """Logits of M items from the weights, and their backward pass."""

    def __call__(self, weights: Tensor) -> Tensor:
        """(E, W, D) to (E, W, M)"""

    def backward(self, gradient: Tensor) -> Tensor:
        """Turns a loss's gradient (E, W, M) by the last call's logits into that (E, W, D) by the weights."""


def columns_of(items: Tensor) -> Tensor:
    """Transposes items (E, M, D) to (E, D, M): a copy where products with it are twice as fast, at few dimensions."""
    return items.mT.contiguous() if items.shape[2] <= 128 else items.mT  # (else two copies would not stay in the cache)


class SquaredLogits:
    """Minus half the squared Euclidean distance, times the temperature; up to a constant for each item."""

    def __init__(self, items: Tensor, start: Tensor, temperature: float) -> None:
        # relative to the classes' middle: for points near each other and far from the origin, squares cancel badly
        self.center, self.temperature = start.mean(dim=1, keepdim=True), temperature
        self.items = items - self.center
        self.columns = columns_of(self.items)

    def __call__(self, weights: Tensor) -> Tensor:
        self.weights = weights - self.center
        squares = self.weights.square().sum(dim=2, keepdim=True)
        factor = self.temperature
        return torch.baddbmm(squares, self.weights, self.columns, beta=-factor / 2, alpha=factor)

    def backward(self, gradient: Tensor) -> Tensor:
        pulls = gradient @ self.items - gradient.sum(dim=2, keepdim=True) * self.weights
        return pulls.mul_(self.temperature)


class EuclideanLogits:
    """Minus the Euclidean distance, times the temperature."""

    def __init__(self, items: Tensor, start: Tensor, temperature: float) -> None:
        self.items, self.start, self.temperature = items, start, temperature
        self.columns = columns_of(items)
        # exact: with one shot a class starts on its item, and steps of 1e-4 are lost in the rounding of products
        self.squares = torch.cdist(start, items, compute_mode="donot_use_mm_for_euclid_dist").square()

    def __call__(self, weights: Tensor) -> Tensor:
        self.weights, moved = weights, weights - self.start
        along = torch.baddbmm((moved * self.start).sum(dim=2, keepdim=True), moved, self.columns, beta=-1)
        squares = self.squares + moved.square().sum(dim=2, keepdim=True) - 2 * along
        self.distances = squares.clamp_(min=0).sqrt_()
        return -self.temperature * self.distances

    def backward(self, gradient: Tensor) -> Tensor:
        shares = (gradient / self.distances).masked_fill_(self.distances == 0, 0)  # where there is no direction
        return (shares @ self.items - shares.sum(dim=2, keepdim=True) * self.weights).mul_(self.temperature)


class CosineLogits:
    """The cosine, times the temperature."""

    def __init__(self, items: Tensor, start: Tensor, temperature: float) -> None:
        self.items, self.temperature = F.normalize(items, dim=2), temperature
        self.columns = columns_of(self.items)

    def __call__(self, weights: Tensor) -> Tensor:
        self.lengths = weights.norm(dim=2, keepdim=True).clamp_(min=1e-12)
        self.directions = weights / self.lengths
        return torch.bmm(self.directions, self.columns).mul_(self.temperature)

    def backward(self, gradient: Tensor) -> Tensor:
        pulls = gradient @ self.items
        along = (pulls * self.directions).sum(dim=2, keepdim=True)
        return (pulls - along * self.directions).mul_(self.temperature / self.lengths)


LOGITS: dict[str, Callable[[Tensor, Tensor, float], Logits]] = {
    "squared": SquaredLogits,
    "euclidean": EuclideanLogits,
    "cosine": CosineLogits,
}


def descend(logits: Logits, slope: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float) -> Tensor:
    """Returns the weights (E, W, D) after steps of Adam, as torch.optim.Adam takes them on each episode's own loss.

    Args:
        logits: of the items.
        slope: gradient of the loss by the logits (E, W, M), written over the logits or to a tensor of its own.
        start: the initial weights.
        steps: number of steps.
        rate: the learning rate.
    """
    weights = start.clone()
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    first, second = MOMENTS
    for step in range(1, steps + 1):
        gradient = logits.backward(slope(logits(weights)))
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (1 - second**step) ** 0.5  # of a mean of squares that starts at zero
        weights.addcdiv_(mean, square.sqrt().add_(EPSILON * root), value=-rate * root / (1 - first**step))
    return weights


def information_slope(
    labels: Tensor, ways: int, support_weight: float, marginal_weight: float, conditional_weight: float, alpha: float
) -> Callable[[Tensor], Tensor]:
    """Returns the gradient, by logits (E, W, S + N), of `alpha_tim`'s loss; `labels` (S,) are of the first S items."""
    count = len(labels)
    is_class = F.one_hot(labels, ways).T

    def weighed(logs: Tensor, weight: float) -> Tensor:
        """Derivative of `weight` times the entropy of alpha by the shares with these logarithms, up to a constant."""
        if alpha == 1:
            return logs * -weight
        # shares^(alpha - 1) minus 1, a constant that would cancel badly where alpha is near 1
        return (logs.clamp(min=LEAST_LOG) * (alpha - 1)).expm1_().mul_(weight * alpha / (1 - alpha))

    def slope(logits: Tensor) -> Tensor:
        logs = logits.log_softmax(dim=1)
        shares = logs.exp()
        gradient = torch.empty_like(logits)
        torch.sub(shares[:, :, :count], is_class, out=gradient[:, :, :count]).mul_(support_weight / count)
        if shares.shape[2] > count:
            query = shares[:, :, count:]
            one = 1 / query.shape[2]
            pulls = weighed(logs[:, :, count:], conditional_weight * one)
            if marginal_weight:
                # for a class without any query: the logarithm of 0 times 0
                marginal = query.mean(dim=2, keepdim=True).clamp_(min=torch.finfo(query.dtype).tiny)
                pulls = pulls - weighed(marginal.log(), marginal_weight * one)
            torch.mul(query, pulls - (query * pulls).sum(dim=1, keepdim=True), out=gradient[:, :, count:])
        return gradient

    return slope


@torch.no_grad()  # the gradients are written out: nothing is recorded
def fit_tuning(
    support: Support,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 100,
    learning_rate: float = 1e-3,
) -> LinearScores | CosineScores:
    check_choice("similarity", similarity, ("squared", "cosine"))
    check_tuning(temperature, steps, learning_rate)
    slope = information_slope(support.labels, len(support.sizes), 1.0, 0.0, 0.0, 1.0)
    start = support.prototypes
    weights = descend(LOGITS[similarity](support.items, start, temperature), slope, start, steps, learning_rate)
    if similarity == "cosine":
        return CosineScores(F.normalize(weights, dim=2), temperature)
    center = start.mean(dim=1, keepdim=True)
    weights = (weights - center).mT
    return LinearScores(center, temperature * weights, -temperature / 2 * weights.square().sum(dim=1, keepdim=True))


@fitted_by(fit_tuning)
@in_float32
def fine_tuning(
    support: Tensor,
    query: Tensor,
    *,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 100,
    learning_rate: float = 1e-3,
) -> Tensor:
    """Scores by a linear classifier fitted to the support by gradient steps (Chen et al. 2019, "A Closer Look").

    This is their Baseline; by cosine, their Baseline++. The weights start at the prototypes, not at random, all support
    items are in every step, and the logits are by distance: the same as a linear layer whose bias is tied to its
    weights, as Veilleux et al. 2021 compare it. The network stays unchanged. Expects embeddings centered by the
    training mean and L2-normalized: the temperature and the rate assume that length.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        similarity: "squared", minus half the squared Euclidean distance, or "cosine".
        temperature: factor of the similarity; 15 is that of Veilleux et al. (`Baseline`, `temp`).
        steps: of Adam; 100 is that of Veilleux et al. (The code of Chen et al. goes through the support 100 times, by
            SGD with a rate of 0.01 in batches of 4.)
        learning_rate: of Adam; 1e-3 is that of Veilleux et al.

    Raises:
        UsageError: an invalid option.
    """
    return fit_tuning(Support.of(support), similarity, temperature, steps, learning_rate)(query)


def fit_transductive_tuning(
    support: Support,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 25,
    learning_rate: float = 5e-5,
) -> Scores:
    check_choice("similarity", similarity, tuple(LOGITS))
    check_tuning(temperature, steps, learning_rate)
    slope = information_slope(support.labels, len(support.sizes), 1.0, 0.0, 1.0, 1.0)
    return tuned_with_queries(support, slope, similarity, temperature, steps, learning_rate)


@transductive
@fitted_by(fit_transductive_tuning)
@in_float32
def transductive_fine_tuning(
    support: Tensor,
    query: Tensor,
    *,
    similarity: Similarity = "squared",
    temperature: float = 15.0,
    steps: int = 25,
    learning_rate: float = 5e-5,
) -> Tensor:
    """Fine-tuning that also makes the queries' predictions certain (Dhillon et al. 2020, "A Baseline").

    Minimizes the support's cross-entropy plus the mean entropy of the queries' predictions. The paper tunes the whole
    network, and its code takes a step for each of the two terms in turn; here, as in easyfsl, only the classifier is
    tuned, starting at the prototypes, by steps on the sum. 25 steps of 5e-5 then move it by a thousandth of its length,
    and the result is near that of the prototypes: raise `learning_rate`. Expects embeddings centered by the training
    mean and L2-normalized.

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        similarity: "squared", minus half the squared Euclidean distance (Veilleux et al. 2021), "cosine", from which
            the paper's linear layer starts, or "euclidean", minus the distance itself.
        temperature: factor of the similarity; 15 is that of Veilleux et al. (`Entropy-min`, `temp`).
        steps: of Adam; 25 as in the code of Veilleux et al., for the paper's 25 epochs of two steps.
        learning_rate: of Adam; the paper's. easyfsl's setting: similarity="euclidean", temperature=1.

    Raises:
        UsageError: an invalid option.
    """
    return fit_transductive_tuning(Support.of(support), similarity, temperature, steps, learning_rate)(query)


def tuned_with_queries(
    support: Support,
    slope: Callable[[Tensor], Tensor],
    similarity: Similarity,
    temperature: float,
    steps: int,
    learning_rate: float,
) -> Scores:
    """Returns scores that tune the weights to the support and to the given queries together."""

    @torch.no_grad()
    def scores(query: Tensor) -> Tensor:
        start = support.prototypes
        logits = LOGITS[similarity](torch.cat([support.items, query], dim=1), start, temperature)
        weights = descend(logits, slope, start, steps, learning_rate)
        return logits(weights)[:, :, sum(support.sizes) :].mT

    return scores


def check_tuning(temperature: float, steps: int, learning_rate: float) -> None:
    check_at_least_one("steps", steps)
    check_above_zero(temperature=temperature, learning_rate=learning_rate)


def check_above_zero(**options: float) -> None:
    """Raises a UsageError unless each is a finite number above 0."""
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"expected {name} above 0 and finite, got {value}; choose another")
