"""feature_map_reconstruction: the head of feature map reconstruction networks (FRN)."""

from collections.abc import Callable

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pml_fewshot.distances.nodes import as_maps, check_nodes
from pml_fewshot.embedders.modes import in_float32
from pml_fewshot.evaluation.heads import Scores, fitted_by
from pml_fewshot.evaluation.support import Support
from pml_fewshot.losses.reconstruction import mean_squares, penalty_of, ridge_inverse

PENALTY = 100.0  # times the mean square of the support's channels
LEAST = 1e-30  # of which, for maps of zeros


def fit_reconstruction(
    support: Support,
    distance: BaseDistance | None = None,
    nodes: int = 25,
    log_penalty: float | Tensor | None = None,
    log_stretch: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Scores:
    check_nodes(nodes)
    maps = as_maps(support.items, nodes)  # (E, S, n, C)
    relative = PENALTY * maps.square().mean(dim=(1, 2, 3))[:, None, None].clamp(min=LEAST)
    residuals = []
    for rows in (own.flatten(1, 2) for own in maps.split(list(support.sizes), dim=1)):
        size, channels = rows.shape[1:]
        penalty = relative * size / channels if log_penalty is None else penalty_of(size, channels, log_penalty)
        residuals.append(_residual_of(rows, penalty))

    def scores(query: Tensor) -> Tensor:
        rows = as_maps(query, nodes).flatten(1, 2)  # (E, N * n, C)
        # one class after the other: the residuals of all would be N * n * W * C floats an episode
        errors = (mean_squares(rows, residual(rows), nodes, log_stretch) for residual in residuals)
        return -scale * torch.stack([*errors], dim=2)

    return scores


def _residual_of(rows: Tensor, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """What the best combination of a class's nodes (E, S, C) leaves of each node of queries, (E, M, C) -> (E, M, C)."""
    size, channels = rows.shape[1:]
    if size >= channels:
        inverse = penalty * ridge_inverse(rows.mT @ rows, penalty)
        return lambda query: query @ inverse
    dual = ridge_inverse(rows @ rows.mT, penalty) @ rows  # the same by S equations instead of C (Woodbury)
    return lambda query: query - query @ rows.mT @ dual


@fitted_by(fit_reconstruction)
@in_float32
def feature_map_reconstruction(
    support: Tensor,
    query: Tensor,
    *,
    nodes: int = 25,
    log_penalty: float | Tensor | None = None,
    log_stretch: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Scores each class by how well the nodes of its support rebuild the nodes of the query (Wertheimer et al. 2021).

    Each node of the query is rebuilt from all nodes of all support items of a class by ridge regression; the logit is
    minus the mean squared length of what is left. Closed form; several shots are simply more nodes.

    Args:
        support, query: (E, W, K, D) and (E, N, D) of feature maps, D = channels * nodes, channels first.
        nodes: positions of a feature map: 25 for Conv4 and ResNet12(pool=False) at 84 x 84.
        log_penalty: alpha of the paper: the penalty is exp(alpha) * (nodes of the class) / channels, what a trained FRN
            has learned; what a number does depends on the length of the embeddings. When None exp(alpha) is 100 times
            the mean square of the support's channels: multiplying all embeddings by a number changes nothing. (Best on
            validation classes of miniImageNet by a ProtoNet's maps at 1 and 5 shots are 60 and 150.)
        log_stretch: beta of the paper: what is rebuilt is multiplied by exp(beta).
        scale: gamma of the paper, of the logits; the accuracy does not depend on it.

    Raises:
        UsageError: fewer than 2 nodes, or nodes that do not divide D.

    Source: Wertheimer, Tang and Hariharan 2021, "Few-Shot Classification with Feature Map Reconstruction Networks",
    equations 4 to 10. FRNTrainer learns the three numbers with the embedder.
    """
    return fit_reconstruction(Support.of(support), None, nodes, log_penalty, log_stretch, scale)(query)
