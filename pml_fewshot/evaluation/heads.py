"""Heads: stateless classifiers of episodes over embeddings, batched over episodes.

Each maps support (E, W, K, D) and query (E, N, D) to logits (E, N, W).
"""

from collections.abc import Callable

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor

# head(support, query, distance) -> logits
Head = Callable[[Tensor, Tensor, BaseDistance | None], Tensor]


def nearest_prototype(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the mean of each class's support (Snell et al. 2017).

    Args:
        support: (E, W, K, D)
        query: (E, N, D)
        distance: any PML distance; squared Euclid when None.

    Returns:
        Logits (E, N, W).
    """
    return similarities(query, support.mean(dim=2), distance)


def nearest_neighbour(support: Tensor, query: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Scores each query by its similarity to the nearest support item of each class.

    Arguments and result as in `nearest_prototype`; the two are the same at one shot.
    """
    episodes, ways, shots, dims = support.shape
    each = similarities(query, support.reshape(episodes, ways * shots, dims), distance)  # (E, N, W*K)
    return each.unflatten(2, (ways, shots)).amax(dim=3)


def similarities(query: Tensor, reference: Tensor, distance: BaseDistance | None = None) -> Tensor:
    """Similarity of each query (E, N, D) to each reference (E, R, D) of its episode, (E, N, R), larger is nearer."""
    if distance is None or _is_squared_euclid(distance):
        # |q - r|^2 = |q|^2 - 2 qr + |r|^2 in one batched product. It cancels badly where embeddings lie far from the
        # origin and near each other, so the mean of each episode's references is taken off first.
        centre = reference.mean(dim=1, keepdim=True)
        query, reference = query - centre, reference - centre
        squares = query.square().sum(2, keepdim=True) + reference.square().sum(2).unsqueeze(1)
        return torch.baddbmm(squares, query, reference.transpose(1, 2), beta=-1, alpha=2)
    if distance.collect_stats:  # PML then calls .item(), which vmap cannot
        values = torch.stack([distance(q, r) for q, r in zip(query, reference, strict=True)])
    else:
        values = torch.vmap(distance)(query, reference)
    return values if distance.is_inverted else -values


def _is_squared_euclid(distance: BaseDistance) -> bool:
    plain = type(distance) is LpDistance and not distance.normalize_embeddings
    return plain and distance.p == 2 and distance.power == 2
