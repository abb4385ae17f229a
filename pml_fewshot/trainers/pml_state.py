"""keep_pml_state: what some of PML's losses remember between steps and leave out of their state_dict."""

from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, DynamicSoftMarginLoss
from torch import Tensor, nn

REMEMBERED = "remembered"


def keep_pml_state(module: nn.Module) -> None:
    """Makes `module.state_dict()` hold what its losses remember, and loading give it back, so that a run can resume.

    Of CrossBatchMemory the place that the next batch goes to, and whether the memory is full (its buffers are kept by
    PML); of DynamicSoftMarginLoss the running histogram.
    """
    for part in module.modules():
        if isinstance(part, CrossBatchMemory | DynamicSoftMarginLoss):
            part.register_state_dict_post_hook(_add)
            part.register_load_state_dict_pre_hook(_take)


def cut_graph_of_last_step(module: nn.Module) -> None:
    """DynamicSoftMarginLoss (PML 2.9) keeps the last step's graph in its histogram: the next backward would fail."""
    for part in module.modules():
        if isinstance(part, DynamicSoftMarginLoss):
            part.hist_ = part.hist_.detach()


def _add(loss: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    if isinstance(loss, CrossBatchMemory):
        state[prefix + REMEMBERED] = torch.tensor([loss.queue_idx, int(loss.has_been_filled)])
    else:
        state[prefix + REMEMBERED] = loss.hist_.detach().clone()  # type: ignore[operator]


def _take(loss: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    remembered = state.pop(prefix + REMEMBERED, None)
    if remembered is None:  # two trainers share the loss, and its state was taken already
        return
    if isinstance(loss, CrossBatchMemory):
        loss.queue_idx, loss.has_been_filled = int(remembered[0]), bool(remembered[1])
    else:
        loss.hist_ = remembered.clone()
