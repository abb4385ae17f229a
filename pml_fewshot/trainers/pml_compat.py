"""Workarounds for pytorch-metric-learning (PML) 2.9: a new release of it is one diff in this file.

Its samplers draw from a global generator; only that is left to `sampling.batch_stream`.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor, nn

from pml_fewshot.checks import UsageError

WITHOUT_LABELS = (losses.ManifoldLoss, losses.SelfSupervisedLoss, losses.VICRegLoss)
WITH_LABELS = (losses.BaseMetricLossFunction, losses.MultipleLosses, losses.CrossBatchMemory)  # all others, and ours
WITH_MEMORY = losses.CrossBatchMemory | losses.DynamicSoftMarginLoss
REMEMBERED = "remembered"


def distance_of(loss: object) -> BaseDistance | None:
    """The distance of a PML loss, of the loss within a wrapper, or of the first of MultipleLosses."""
    if hasattr(loss, "distance"):
        return loss.distance
    within = getattr(loss, "loss", None) or getattr(loss, "losses", None)
    if isinstance(within, nn.ModuleDict | nn.ModuleList):
        within = next(within.children(), None)
    return distance_of(within) if isinstance(within, nn.Module) else None


def num_classes(part: nn.Module) -> int:
    """Number of classes that a PML loss has weights for; 0 for any other module."""
    if isinstance(part, losses.NormalizedSoftmaxLoss):  # it and ProxyNCALoss store no number
        return part.W.shape[1]
    if isinstance(part, losses.ProxyNCALoss):
        return len(part.proxies)
    if isinstance(part, losses.MarginLoss):  # one margin, or one for each class
        return part.beta.numel() if part.beta.numel() > 1 else 0
    return getattr(part, "num_classes", 0) if isinstance(part, losses.BaseMetricLossFunction) else 0


def check_batch(loss: nn.Module, size: int, largest_label: int) -> None:
    """Raises a UsageError when a loss has no weights for a batch's largest label, or no memory for its size."""
    for part in loss.modules():
        if 0 < (classes := num_classes(part)) <= largest_label:
            raise UsageError(
                f"expected labels below {classes}, the num_classes of {type(part).__name__}, got label {largest_label};"
                f" give it num_classes={largest_label + 1}, len(splits.train.class_names), or more"
            )
        if isinstance(part, losses.CrossBatchMemory) and size > part.memory_size:
            wanted = f"batches of at most {part.memory_size}, the memory_size of CrossBatchMemory"
            raise UsageError(f"expected {wanted}, got {size} items; make the memory larger, of several batches")


WIDTHS = {"W": 0, "fc": 0, "proxies": 1, "embedding_memory": 1}  # PML's weights and memories, and their axis of D


def check_width(loss: nn.Module, width: int) -> None:
    """Raises a UsageError when a loss has class weights or a memory for embeddings of another width."""
    for part in loss.modules() if isinstance(loss, nn.Module) else ():
        for name, axis in WIDTHS.items():
            weight = getattr(part, name, None)
            if isinstance(part, WITH_LABELS) and isinstance(weight, Tensor) and weight.shape[axis] != width:
                wanted = f"embeddings of {weight.shape[axis]} dimensions, the embedding_size of {type(part).__name__}"
                raise UsageError(f"expected {wanted}, got {width} from the embedder; set embedding_size={width}")


def check_loss(loss: object) -> None:
    """Raises a UsageError unless it can be called as a PML loss: `loss(embeddings, labels, indices, ...)`."""
    if isinstance(loss, WITHOUT_LABELS):
        return
    if isinstance(loss, nn.Module):
        arguments = inspect.signature(loss.forward).parameters.values()
        positional = [p for p in arguments if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in arguments):
            return
        got = f"{type(loss).__name__}, which takes ({', '.join(p.name for p in arguments)})"
    else:
        got = f"{getattr(loss, '__qualname__', type(loss).__name__)}, which is no module"
    wanted = "a PML loss, a module that is called loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)"
    raise UsageError(f"expected {wanted}, got {got}; take one of PML's or ours, or derive from BaseMetricLossFunction")


def check_supports_ref_emb(loss: nn.Module) -> None:
    """Raises a UsageError naming the loss if it does not accept a support set, or handles it wrongly."""
    kind: Any = type(loss)  # (mypy does not know that classes of modules can be hashed)
    if why := _why_no_ref_emb(kind):
        raise _not_on_episodes(loss, why)
    check_no_classes_kept(loss)


def check_no_classes_kept(loss: nn.Module) -> None:
    """Raises a UsageError naming the part of a loss that keeps something about each class from step to step.

    The labels of an episode are positions in it: the next episode's class 0 is another class.
    """
    for part in loss.modules():
        if isinstance(part, losses.CrossBatchMemory) or num_classes(part):
            raise _not_on_episodes(part, "it keeps something of each class, and an episode's labels are places in it")


@cache
def _why_no_ref_emb(kind: Any) -> str:
    if issubclass(kind, losses.ThresholdConsistentMarginLoss):  # otherwise it would train, on wrong pairs
        return "PML looks the support's indices up among the queries"
    arguments = inspect.signature(kind.forward).parameters
    if missing := [name for name in ("labels", "ref_emb", "ref_labels") if name not in arguments]:
        return f"its forward has no argument {missing[0]}"
    # A loss refuses by calling one of these; finding the call works before the first step and without error texts.
    calls = kind.compute_loss.__code__.co_names if issubclass(kind, losses.BaseMetricLossFunction) else ()
    refused = {"ref_not_supported": "ref_emb", "labels_not_supported": "labels"}
    return next((f"it takes no {argument}" for call, argument in refused.items() if call in calls), "")


def _not_on_episodes(loss: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"expected a loss that compares queries with a support set (PML's ref_emb), got {type(loss).__name__}: {why}; "
        "train it on batches, MetricTrainer with train_spec=BatchSpec(classes, per_class), or take a loss of pairs"
    )


def patch(parts: Iterable[nn.Module]) -> None:
    """Adds hooks to the parts of a loss where PML falls short.

    NCALoss is zero for a batch without two items of a class, where PML's is NaN. `state_dict()` holds what losses
    remember, so that a run can resume: for CrossBatchMemory, the position of the next batch and whether the memory is
    full; for DynamicSoftMarginLoss, the running histogram, which is detached from the last step's graph, in which
    the next backward pass would fail.
    """
    for part in parts:
        if isinstance(part, losses.NCALoss) and not isinstance(part, losses.ProxyNCALoss):  # which has proxies
            part.register_forward_hook(_zero_without_pairs)
        if isinstance(part, losses.DynamicSoftMarginLoss):
            part.register_forward_pre_hook(_detach_histogram)
        if isinstance(part, WITH_MEMORY):
            part.register_state_dict_post_hook(_add)
            part.register_load_state_dict_pre_hook(_take)


def _zero_without_pairs(loss: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor:
    if len(args) != 3:  # (embeddings, labels, mined): with a support set or a memory there is something to compare with
        return value
    labels = args[1]
    pairs = (labels.unsqueeze(1) == labels).sum() - len(labels)
    return torch.where(pairs > 0, value, torch.zeros_like(value))  # does not wait for a GPU


def _detach_histogram(loss: Any, args: tuple[Any, ...]) -> None:
    loss.hist_ = loss.hist_.detach()


def _add(loss: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    of_memory = isinstance(loss, losses.CrossBatchMemory)
    remembered = torch.tensor([loss.queue_idx, int(loss.has_been_filled)]) if of_memory else loss.hist_.detach().clone()
    state[prefix + REMEMBERED] = remembered


def _take(loss: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    remembered = state.pop(prefix + REMEMBERED, None)
    if remembered is None:  # two trainers share the loss, and its state was taken already
        return
    if isinstance(loss, losses.CrossBatchMemory):
        loss.queue_idx, loss.has_been_filled = int(remembered[0]), bool(remembered[1])
    else:
        loss.hist_ = remembered.clone()
