"""Retrieval metrics of each query from which of its ranked neighbours are of its class."""

import re

import torch
from torch import Tensor

from pml_fewshot.checks import check_choice

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
WHOLE_RANKING = ("mean_average_precision", "mean_reciprocal_rank")
CLUSTERING = ("NMI", "AMI")
RECALL = re.compile(r"recall_at_([1-9][0-9]*)")


def check_metric(metric: str) -> None:
    """Raises a ValueError that suggests the nearest name unless the metric is known."""
    if not RECALL.fullmatch(metric):
        check_choice("metric", metric, (*METRICS, *WHOLE_RANKING, *CLUSTERING, "recall_at_1", "recall_at_<k>"))


def neighbours_needed(metric: str, largest_class: int, gallery_size: int) -> int:
    """How many neighbours a metric looks at where the largest class has that many right answers."""
    if recall := RECALL.fullmatch(metric):
        return int(recall[1])
    if metric in WHOLE_RANKING:
        return gallery_size
    return 1 if metric == "precision_at_1" else largest_class


def measure(metric: str, match: Tensor, relevant: Tensor) -> Tensor:
    """(N,) float64 value of one metric for each query.

    Args:
        metric: its name.
        match: (N, k) bool, whether the neighbour at each rank is of the query's class.
        relevant: (N,) R, the number of references of the query's class, each above 0.
    """
    if metric == "precision_at_1":
        return match[:, 0].double()
    if recall := RECALL.fullmatch(metric):
        return match[:, : int(recall[1])].any(dim=1).double()
    if metric == "mean_reciprocal_rank":
        return match.any(dim=1).double() / (match.byte().argmax(dim=1) + 1)
    rank = torch.arange(1, match.shape[1] + 1, device=match.device)
    if metric != "mean_average_precision":
        match = match & (rank <= relevant.unsqueeze(1))  # only the first R ranks count
    hit = match.double()
    if metric == "r_precision":
        return hit.sum(dim=1) / relevant
    return (hit * hit.cumsum(dim=1) / rank).sum(dim=1) / relevant


def count_relevant(query_labels: Tensor, gallery_labels: Tensor, same: bool) -> Tensor:
    """(N,) number of references of each query's class, itself not counted where both sets are the same."""
    classes, counts = torch.unique(gallery_labels, return_counts=True)
    place = torch.searchsorted(classes, query_labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[place] == query_labels, counts[place], 0) - int(same)
