"""Heads: stateless classifiers of episodes by similarity to their support, batched over episodes.

Each maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W), by any PML distance, in float32 at least. Those
that fit a linear classifier to each episode's support are in linear_heads.py.
"""

from collections.abc import Callable
from functools import partial

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor
from torch.nn.parameter import is_lazy

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.embedders.modes import in_float32
from pml_fewshot.evaluation.search import Ranking

Head = Callable[[Tensor, Tensor, BaseDistance | None], Tensor]


@in_float32
def nearest_prototype(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the mean of each class's support (Snell et al. 2017).

    Support (E, W, K, D) and query (E, N, D) give logits (E, N, W); squared Euclidean when `distance` is None.
    """
    return similarities(query, support.mean(dim=2), distance)


@in_float32
def nearest_neighbour(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the nearest support item of each class."""
    return similarities_to_each(support, query, distance).amax(dim=3)


@in_float32
def mean_similarity(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by the mean of its similarities to a class's support items.

    With logits as similarities (SiameseTrainer) it is the mean evidence that query and class belong together.
    """
    return similarities_to_each(support, query, distance).mean(dim=3)


@in_float32
def soft_nearest_neighbour(
    support: Tensor, query: Tensor, distance: BaseDistance | None = None, temperature: float = 1.0
) -> Tensor:
    """Scores each class by its share of a softmax over all support items (Vinyals et al. 2016, equation 1).

    The logits are logarithms of sums over the class of exp(similarity / temperature), so that their softmax is the
    share. A bounded similarity such as cosine wants a temperature of about 0.1, or every item counts nearly the same.
    """
    if not temperature > 0:
        raise UsageError(f"expected a temperature above 0, got {temperature}; raise it")
    return (similarities_to_each(support, query, distance) / temperature).logsumexp(dim=3)


@in_float32
def k_nearest_neighbours(support: Tensor, query: Tensor, distance: BaseDistance | None = None, k: int = 3) -> Tensor:
    """Scores each class by how many of the query's k nearest support items are of it.

    Of classes with the same number the one with the nearest item wins: the logits are the number plus a fraction that
    falls with the rank of the class's nearest item.

    Raises:
        UsageError: k below 1 or above the W * K support items.
    """
    check_at_least_one("k", k)
    ways, shots = support.shape[1:3]
    if k > ways * shots:
        raise UsageError(f"expected k of at most {ways * shots}, the support items, got {k}; lower k")
    each = similarities_to_each(support, query, distance).flatten(2)
    nearest_class = each.topk(k, dim=2).indices // shots  # (E, N, k), nearest first
    is_class = nearest_class.unsqueeze(3) == torch.arange(ways, device=each.device)  # (E, N, k, W)
    closeness = torch.arange(k, 0, -1, device=each.device).unsqueeze(1) / (k + 1)  # k / (k + 1) for the nearest
    votes = is_class.sum(dim=2) + (is_class * closeness).amax(dim=2)
    return votes.masked_fill(~each.isfinite().all(dim=2, keepdim=True), torch.nan)  # topk would rank NaN first


@in_float32
def similarities(query: Tensor, reference: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Similarity of each query (E, N, D) to each reference (E, R, D) of its episode, (E, N, R), larger is nearer.

    The negative of a PML distance, or a PML similarity itself.
    """
    # Lp distances of embeddings as they are do not depend on the origin
    plain_lp = distance is None or (type(distance) is LpDistance and not distance.normalize_embeddings)
    if plain_lp:
        center = reference.mean(dim=1, keepdim=True)
        query, reference = query - center, reference - center
    if distance is None or (plain_lp and distance.p == 2 and distance.power == 2):
        # -|q - r|^2 = 2 qr - |q|^2 - |r|^2 in one batched product. It cancels badly where embeddings lie far from the
        # origin and near each other, hence the center. vector_norm reads the queries once; square().sum() would write.
        squares = torch.linalg.vector_norm(query, dim=2, keepdim=True).square() + reference.square().sum(2).unsqueeze(1)
        return torch.baddbmm(squares, query, reference.transpose(1, 2), beta=-1, alpha=2)
    if any(map(is_lazy, distance.parameters())):
        # vmap cannot make the weights, and those made in inference mode could never be trained
        with torch.inference_mode(False), torch.no_grad():
            distance(query[0, :1].clone(), reference[0, :1].clone())
    if distance.collect_stats:  # PML then calls .item(), which vmap cannot
        values = torch.stack([distance(q, r) for q, r in zip(query, reference, strict=True)])
    else:
        values = torch.vmap(distance)(query, reference)
    return values if distance.is_inverted else -values


def name_of_head(head: object, distance: BaseDistance | None = None) -> str:
    """A head for a table: "nearest_prototype by LpDistance(p=2, power=2)", "ridge_regression(penalty=10.0)"."""
    given: list[str] = []
    while isinstance(head, partial):
        given = [*map(_shown, head.args), *(f"{name}={_shown(each)}" for name, each in head.keywords.items()), *given]
        head = head.func
    name = getattr(head, "__name__", type(head).__name__) + (f"({', '.join(given)})" if given else "")
    return name if distance is None else f"{name} by {_shown(distance)}"


def _shown(argument: object) -> str:
    return str(Ranking.of(argument)) if isinstance(argument, BaseDistance) else repr(argument)


def similarities_to_each(support: Tensor, query: Tensor, distance: BaseDistance | None) -> Tensor:
    """(E, N, W, K) similarity of each query to each support item."""
    ways, shots = support.shape[1:3]
    return similarities(query, support.flatten(1, 2), distance).unflatten(2, (ways, shots))
