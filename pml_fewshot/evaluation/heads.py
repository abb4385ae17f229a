"""Heads: classifiers of episodes by similarity to their support, batched over episodes.

Each maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W), by any PML distance, in float32 at least, and
keeps no state. The part fitted to the support alone is a separate function (`fit`), which accepts classes of different
sizes and returns a function that scores queries repeatedly: FewShotClassifier uses heads this way. Heads that fit a
linear classifier are in linear_heads.py.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.distances.episodic_distance import similarity_batch
from pml_fewshot.embedders.modes import in_float32, plainly
from pml_fewshot.evaluation.search import Ranking
from pml_fewshot.evaluation.support import Support

Head = Callable[[Tensor, Tensor, BaseDistance | None], Tensor]
Scores = Callable[[Tensor], Tensor]  # queries (E, N, D) to logits (E, N, W)
F = TypeVar("F", bound=Callable[..., Any])


def fitted_by(fit: Callable[..., Scores]) -> Callable[[F], F]:
    """Marks a head with its fitting function: `fit(support: Support, distance=None, its own options) -> Scores`."""

    def mark(head: F) -> F:
        vars(head)["fit"] = fit
        return head

    return mark


def transductive(head: F) -> F:
    """Marks a head whose queries inform each other: the logits of one depend on which others are there."""
    vars(head)["transductive"] = True
    return head


class Similarities(nn.Module):
    """Similarity of queries (E, N, D) to each reference (E, R, D) of their episode, (E, N, R), larger is nearer.

    The negative of a PML distance, or a PML similarity itself; squared Euclidean when `distance` is None.
    """

    center: Tensor | None
    reference: Tensor
    squares: Tensor

    @in_float32
    def __init__(self, reference: Tensor, distance: BaseDistance | None = None) -> None:
        super().__init__()
        self.distance = distance
        # Lp distances of unnormalized embeddings do not depend on the origin
        plain_lp = distance is None or (type(distance) is LpDistance and not distance.normalize_embeddings)
        self.is_squared = distance is None or (plain_lp and distance.p == 2 and distance.power == 2)
        # for points near each other and far from the origin, squares cancel badly, and so do sums of powers
        self.register_buffer("center", reference.mean(dim=1, keepdim=True) if plain_lp else None)
        self.register_buffer("reference", reference if self.center is None else reference - self.center)
        if self.is_squared:
            self.register_buffer("squares", self.reference.square().sum(2).unsqueeze(1))

    @in_float32
    def forward(self, query: Tensor) -> Tensor:
        reference, distance = self.reference, self.distance
        if query.shape[-1] != reference.shape[-1]:
            got = f"{query.shape[-1]} and {reference.shape[-1]}"
            raise UsageError(f"expected queries and support of one width, got {got}; embed both by one network")
        query = query if self.center is None else query - self.center
        if distance is None or self.is_squared:
            # -|q - r|^2 = 2 qr - |q|^2 - |r|^2 in one batched product. vector_norm reads the queries once;
            # square().sum() would write.
            squares = torch.linalg.vector_norm(query, dim=2, keepdim=True).square() + self.squares
            stock = type(query) is type(reference) is Tensor and query.device.type == "cpu"
            if stock and not torch.is_grad_enabled() and plainly():
                # 75 x 1,600 times 1,600 x 5 takes numpy's BLAS 15 microseconds and torch's MKL 42, on an AMD EPYC
                with np.errstate(all="ignore"):  # the caller checks for non-finite values
                    products = torch.from_numpy(np.matmul(query.numpy(), reference.numpy().transpose(0, 2, 1)))
                return products.mul_(2).sub_(squares)
            return torch.baddbmm(squares, query, reference.transpose(1, 2), beta=-1, alpha=2)
        if any(map(is_lazy, distance.parameters())):
            # vmap cannot make the weights, and those made in inference mode could never be trained
            with torch.inference_mode(False), torch.no_grad():
                distance(query[0, :1].clone(), reference[0, :1].clone())
        return similarity_batch(distance, query, reference)


def fit_prototypes(support: Support, distance: BaseDistance | None = None) -> Scores:
    return Similarities(support.prototypes, distance)


@fitted_by(fit_prototypes)
@in_float32
def nearest_prototype(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the mean of each class's support (Snell et al. 2017).

    Maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); squared Euclidean when `distance` is None.
    """
    return fit_prototypes(Support.of(support), distance)(query)


def fit_nearest(support: Support, distance: BaseDistance | None = None) -> Scores:
    to_each = Similarities(support.items, distance)
    return lambda query: support.by_class(to_each(query), "amax")


@fitted_by(fit_nearest)
@in_float32
def nearest_neighbour(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the nearest support item of each class.

    Maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); squared Euclidean when distance is None.
    """
    return fit_nearest(Support.of(support), distance)(query)


def fit_mean_similarity(support: Support, distance: BaseDistance | None = None) -> Scores:
    to_each = Similarities(support.items, distance)
    return lambda query: support.by_class(to_each(query), "mean")


@fitted_by(fit_mean_similarity)
@in_float32
def mean_similarity(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by the mean of its similarities to a class's support items.

    When the similarities are logits (SiameseTrainer), it is the mean evidence that query and class belong together.
    Maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); squared Euclidean when distance is None.
    """
    return fit_mean_similarity(Support.of(support), distance)(query)


def fit_soft_neighbors(support: Support, distance: BaseDistance | None = None, temperature: float = 1.0) -> Scores:
    if not temperature > 0:
        raise UsageError(f"expected a temperature above 0, got {temperature}; raise it")
    to_each = Similarities(support.items, distance)
    return lambda query: support.by_class(to_each(query) / temperature, "logsumexp")


@fitted_by(fit_soft_neighbors)
@in_float32
def soft_nearest_neighbour(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, temperature: float = 1.0
) -> Tensor:
    """Scores each class by its share of a softmax over all support items (Vinyals et al. 2016, equation 1).

    The logits are logarithms of sums over the class of exp(similarity / temperature), so their softmax is the share. A
    bounded similarity such as cosine needs a temperature of about 0.1, or every item counts nearly the same.
    Maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); squared Euclidean when distance is None.

    Raises:
        UsageError: a temperature that is not above 0.
    """
    return fit_soft_neighbors(Support.of(support), distance, temperature)(query)


def count_votes(labels: Tensor, ways: int) -> Tensor:
    """Returns logits (E, N, W) from the classes (E, N, k) of each query's neighbors, nearest first, -1 for none.

    The number in each class, plus a fraction that falls with the rank of its first: k / (k + 1) for the nearest.
    """
    found, k = (labels >= 0).float(), labels.shape[2]
    closeness = found * torch.arange(k, 0, -1, device=labels.device) / (k + 1)
    labels, none = labels.clamp(min=0), found.new_zeros(*labels.shape[:2], ways)
    return none.scatter_add(2, labels, found) + none.scatter_reduce(2, labels, closeness, "amax")


def fit_votes(support: Support, distance: BaseDistance | None = None, k: int = 3) -> Scores:
    """With fewer than k items, as when examples of a classifier are left out, all of them vote."""
    check_at_least_one("k", k)
    to_each, labels = Similarities(support.items, distance), support.labels

    def votes(query: Tensor) -> Tensor:
        each = to_each(query)
        nearest = labels[each.topk(min(k, len(labels)), dim=2).indices]
        finite = each.isfinite().all(dim=2, keepdim=True)  # topk would rank NaN first
        return count_votes(nearest, len(support.sizes)).masked_fill(~finite, torch.nan)

    return votes


@fitted_by(fit_votes)
@in_float32
def k_nearest_neighbours(support: Tensor, query: Tensor, distance: BaseDistance | None = None, k: int = 3) -> Tensor:
    """Scores each class by how many of the query's k nearest support items belong to it.

    Ties go to the class with the nearest item: the logits are the number plus a fraction that falls with the rank of
    the class's nearest item.
    Maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W); squared Euclidean when distance is None.

    Raises:
        UsageError: k below 1 or above the W * K support items.
    """
    if k > (most := support.shape[1] * support.shape[2]):
        raise UsageError(f"expected k of at most {most}, the support items, got {k}; lower k")
    return fit_votes(Support.of(support), distance, k)(query)


def unwrapped(head: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a head's function and the options held by the partials around it."""
    options: dict[str, Any] = {}
    while isinstance(head, partial):
        if head.args:
            raise UsageError(f"expected a head's options by name, got {head.args!r}; write partial(head, option=value)")
        head, options = head.func, {**head.keywords, **options}
    return head, options


def parts_of(head: Any) -> list[Any]:
    """Returns a head's function and everything held by the partials around it."""
    held: list[Any] = []
    while isinstance(head, partial):
        held += [*head.args, *head.keywords.values()]
        head = head.func
    return [head, *held]


def is_transductive(head: Any) -> bool:
    """Whether a head is marked as transductive, or is a partial of one that is."""
    return getattr(parts_of(head)[0], "transductive", False)


def takes_distance(head: Any) -> bool:
    """Whether a head's third argument is the distance to compare by."""
    third = [*inspect.signature(head).parameters.values()][2:3]
    return any(p.kind != p.KEYWORD_ONLY and (p.name == "distance" or p.default is p.empty) for p in third)


def name_of_head(head: object, distance: BaseDistance | None = None) -> str:
    """Names a head for a table: "nearest_prototype by LpDistance(p=2, power=2)", "ridge_regression(penalty=10.0)"."""
    given: list[str] = []
    while isinstance(head, partial):
        given = [*map(_shown, head.args), *(f"{name}={_shown(each)}" for name, each in head.keywords.items()), *given]
        head = head.func
    name = getattr(head, "__name__", type(head).__name__) + (f"({', '.join(given)})" if given else "")
    return name if distance is None else f"{name} by {_shown(distance)}"


def _shown(argument: object) -> str:
    return str(Ranking.of(argument)) if isinstance(argument, BaseDistance) else repr(argument)
