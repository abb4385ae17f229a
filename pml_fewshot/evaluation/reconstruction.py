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
LEAST = 1e-30  # lower bound of that mean square, for maps of zeros


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
    """Returns a function from query nodes (E, M, C) to what the best combination of class nodes (E, S, C) leaves."""
    size, channels = rows.shape[1:]
    if size >= channels:
        inverse = penalty * ridge_inverse(rows.mT @ rows, penalty)
        return lambda query: query @ inverse
    dual = ridge_inverse(rows @ rows.mT, penalty) @ rows  # the same with S equations instead of C (Woodbury)
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
    """Scores each class by how well the nodes of its support reconstruct the query's nodes (Wertheimer et al. 2021).

    Ridge regression reconstructs each node of the query from all nodes of all support items of a class; the logit is
    minus the mean squared length of the residual. Closed form; several shots are simply more nodes.

    Args:
        support, query: (E, W, K, D) and (E, N, D) of feature maps, D = channels * nodes, channels first.
        nodes: positions of a feature map: 25 for Conv4 and ResNet12(pool=False) at 84 x 84.
        log_penalty: alpha of the paper, learned by a trained FRN: the penalty is exp(alpha) * (nodes of the class) /
            channels, so the effect of a value depends on the length of the embeddings. If None, exp(alpha) is 100 times
            the mean square of the support's channels: scaling all embeddings by a constant changes nothing. (On
            validation classes of miniImageNet, with a ProtoNet's maps, 60 is best at 1 shot and 150 at 5.)
        log_stretch: beta of the paper: the reconstruction is multiplied by exp(beta).
        scale: gamma of the paper, which scales the logits; the accuracy does not depend on it.

    Raises:
        UsageError: fewer than 2 nodes, or nodes that do not divide D.

    Source: Wertheimer, Tang and Hariharan 2021, "Few-Shot Classification with Feature Map Reconstruction Networks",
    equations 4 to 10. FRNTrainer learns the three numbers with the embedder.
    """
    return fit_reconstruction(Support.of(support), None, nodes, log_penalty, log_stretch, scale)(query)
