"""The loss of a task: what a MAMLTrainer is given as one, and its value for many tasks."""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import cast

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, DynamicSoftMarginLoss
from torch import Tensor, nn

from pml_fewshot.checks import require
from pml_fewshot.parts import build

TaskLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, D) and labels (B,) to a scalar: a function or a module


def built_loss(loss: TaskLoss | Callable[[], nn.Module]) -> TaskLoss:
    """What a loss describes: functions stay as they are, with or without arguments of their own; classes are called."""
    function = loss.func if isinstance(loss, partial) else loss
    built = loss if isinstance(function, FunctionType) else build(loss)
    for part in built.modules() if isinstance(built, nn.Module) else ():
        remembers = isinstance(part, CrossBatchMemory | DynamicSoftMarginLoss)
        require(not remembers, "a loss that remembers nothing of other tasks", type(part).__name__, "take another")
    return cast(TaskLoss, built)


def labels_of(items: Tensor) -> Tensor:
    """The class (B,) of each of a task's items (T, W, K, *item), flattened to (T, B, *item)."""
    return torch.arange(items.shape[1], device=items.device).repeat_interleave(items.shape[2])


def task_losses(loss: TaskLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss (T,) of each of T tasks with outputs (T, B, D) and the same labels (B,)."""
    losses = [loss(of_task, labels) for of_task in outputs]
    shape = tuple(losses[0].shape)
    require(shape == (), "a loss that is one number for a task", f"one of shape {shape}", 'use reduction="mean"')
    return torch.stack(losses)
