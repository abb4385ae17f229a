"""Which batches a PML loss can learn from: checks that name the loss, say why not, and what to use."""

import inspect

from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    CrossBatchMemory,
    MarginLoss,
    NormalizedSoftmaxLoss,
    ProxyNCALoss,
    ThresholdConsistentMarginLoss,
)
from torch import Tensor, nn

from pml_fewshot.checks import require


def check_takes_support(loss: nn.Module) -> None:
    """Raises a ValueError naming the loss when it has no place for a support set, or takes it wrongly."""
    if isinstance(loss, ThresholdConsistentMarginLoss):  # else it would train, on wrong pairs
        raise not_on_episodes(loss, "PML looks the support's indices up among the queries")
    arguments = inspect.signature(type(loss).forward).parameters
    missing = [name for name in ("labels", "ref_emb", "ref_labels") if name not in arguments]
    if missing:
        raise not_on_episodes(loss, f"its forward has no argument {missing[0]}")
    if isinstance(loss, MarginLoss):  # the only one that takes a support set and has something of each class
        check_no_classes_kept(loss)


def check_no_classes_kept(loss: nn.Module) -> None:
    """Raises a ValueError naming the part of a loss that keeps something of each class from step to step.

    The labels of an episode are places in it: the next episode's class 0 is another class.
    """
    for part in loss.modules():
        if isinstance(part, CrossBatchMemory) or num_classes(part):
            raise not_on_episodes(part, "it keeps something of each class, and an episode's labels are places in it")


def not_on_episodes(loss: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"expected a loss that compares queries with a support set (PML's ref_emb), got {type(loss).__name__}: {why}; "
        "train it on ordinary batches, MetricTrainer with train_spec=BatchSpec(classes, per_class), or take a loss of "
        "pairs, triplets or prototypes"
    )


def check_batch(loss: nn.Module, labels: Tensor) -> None:
    """Raises a ValueError when a label has no weights in a classification loss, or a memory cannot hold the batch."""
    for part in loss.modules():
        classes = num_classes(part)
        if classes and len(labels):
            largest = int(labels.max())
            require(
                largest < classes,
                f"labels below {classes}, the num_classes of {type(part).__name__}",
                str(largest),
                f"give it the number of training classes (at least {largest + 1}), len(splits.train.class_names)",
            )
        if isinstance(part, CrossBatchMemory):
            require(
                len(labels) <= part.memory_size,
                f"batches of at most {part.memory_size}, the memory_size of CrossBatchMemory",
                str(len(labels)),
                "make the memory larger, of several batches",
            )


def num_classes(part: nn.Module) -> int:
    """For how many classes a PML loss has weights; 0 for any other module."""
    if not isinstance(part, BaseMetricLossFunction):
        return 0
    if isinstance(part, NormalizedSoftmaxLoss):  # it and ProxyNCALoss keep no number
        return part.W.shape[1]
    if isinstance(part, ProxyNCALoss):
        return len(part.proxies)
    if isinstance(part, MarginLoss):  # one margin, or one for each class
        return part.beta.numel() if part.beta.numel() > 1 else 0
    return getattr(part, "num_classes", 0)
