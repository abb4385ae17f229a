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


def fit_reconstruction(
    support: Support,
    distance: BaseDistance | None = None,
    nodes: int = 25,
    log_penalty: float | Tensor = 0.0,
    log_stretch: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Scores:
    check_nodes(nodes)
    maps = as_maps(support.items, nodes)  # (E, S, n, C)
    residuals = [_residual_of(own.flatten(1, 2), log_penalty) for own in maps.split(list(support.sizes), dim=1)]

    def scores(query: Tensor) -> Tensor:
        rows = as_maps(query, nodes).flatten(1, 2)  # (E, N * n, C)
        # one class after the other: the residuals of all would be N * n * W * C floats an episode
        errors = (mean_squares(rows, residual(rows), nodes, log_stretch) for residual in residuals)
        return -scale * torch.stack([*errors], dim=2)

    return scores


def _residual_of(rows: Tensor, log_penalty: float | Tensor) -> Callable[[Tensor], Tensor]:
    """What the best combination of a class's nodes (E, S, C) leaves of each node of queries, (E, M, C) -> (E, M, C)."""
    size, channels = rows.shape[1:]
    penalty = penalty_of(size, channels, log_penalty)
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
    log_penalty: float | Tensor = 0.0,
    log_stretch: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Scores each class by how well the nodes of its support rebuild the nodes of the query (Wertheimer et al. 2021).

    Each node of the query is rebuilt from all nodes of all support items of a class by ridge regression; the logit is
    minus the mean squared length of what is left. Closed form; several shots are simply more nodes.

    Args:
        support, query: (E, W, K, D) and (E, N, D) of feature maps, D = channels * nodes, channels first.
        nodes: positions of a feature map: 25 for Conv4 and ResNet12(pool=False) at 84 x 84.
        log_penalty: alpha of the paper: the penalty is exp(alpha) * (nodes of the class) / channels. Its effect depends
            on the length of the embeddings: at 0, where the paper's training begins, channels should have a mean square
            of about 1.
        log_stretch: beta of the paper: what is rebuilt is multiplied by exp(beta).
        scale: gamma of the paper, of the logits; the accuracy does not depend on it.

    Raises:
        UsageError: fewer than 2 nodes, or nodes that do not divide D.

    Source: Wertheimer, Tang and Hariharan 2021, "Few-Shot Classification with Feature Map Reconstruction Networks",
    equations 4 to 10. FRNTrainer learns the three numbers with the embedder.
    """
    return fit_reconstruction(Support.of(support), None, nodes, log_penalty, log_stretch, scale)(query)
