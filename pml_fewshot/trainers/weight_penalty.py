"""L2 and L1 penalties on weights, as parts of the loss."""

import torch
from torch import Tensor, nn


def weight_penalty(trainer: nn.Module, l2: float, l1: float) -> Tensor:
    """l2 * sum of squares + l1 * sum of magnitudes of the filters and matrices of the embedder (MAML's network)."""
    part = getattr(trainer, "embedder", getattr(trainer, "network", trainer))
    weights = [p for p in part.parameters() if p.ndim > 1]
    return torch.stack([l2 * w.square().sum() + l1 * w.abs().sum() for w in weights]).sum()
