"""Retrieval metrics of each query, from which of its ranked neighbors are of its class; and NMI and AMI of a bank."""

import re

import torch
from torch import Tensor

from pml_fewshot.checks import check_choice
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.search import Ranking

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
WHOLE_RANKING = ("mean_average_precision", "mean_reciprocal_rank")
CLUSTERING = ("NMI", "AMI")
RECALL = re.compile(r"recall_at_([1-9][0-9]*)")

K_MEANS_ROUNDS = 20  # as many as PML's AccuracyCalculator makes
K_MEANS_SEED = 1234  # faiss's own default, and so that of PML's figures


def check_metric(metric: str) -> None:
    """Raises a UsageError that suggests the nearest name unless the metric is known."""
    if not RECALL.fullmatch(metric):
        check_choice("metric", metric, (*METRICS, *WHOLE_RANKING, *CLUSTERING, "recall_at_1", "recall_at_<k>"))


def neighbors_needed(metric: str, largest_class: int, num_references: int) -> int:
    """How many neighbors a metric depends on where the largest class has that many right answers."""
    if recall := RECALL.fullmatch(metric):
        return int(recall[1])
    if metric in WHOLE_RANKING:
        return num_references
    return 1 if metric == "precision_at_1" else largest_class


def measure(metric: str, match: Tensor, relevant: Tensor) -> Tensor:
    """(N,) float64 value of one metric for each query.

    Args:
        metric: its name.
        match: (N, k) bool, whether the neighbor at each rank is of the query's class.
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


def count_relevant(query_labels: Tensor, reference_labels: Tensor, leave_one_out: bool) -> Tensor:
    """(N,) number of references of each query's class, less the query itself with `leave_one_out`."""
    classes, counts = torch.unique(reference_labels, return_counts=True)
    position = torch.searchsorted(classes, query_labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[position] == query_labels, counts[position], 0) - int(leave_one_out)


def clustering_scores(bank: EmbeddingBank, metrics: tuple[str, ...], ranking: Ranking) -> dict[str, float]:
    """Clusters a bank by k-means (Euclid, faiss, one run) into as many clusters as it has classes and compares them.

    Args:
        bank: embeddings and their classes.
        metrics: "NMI" (mutual information over the mean of the two entropies), "AMI" (adjusted for chance, Vinh et al.
            2010), or both, from one clustering.
        ranking: decides whether rows are normalized first, as for the neighbors.
    """
    import faiss
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    scores = {"NMI": normalized_mutual_info_score, "AMI": adjusted_mutual_info_score}
    rows = ranking.prepare(bank.embeddings).cpu().contiguous().numpy()
    clusters = len(torch.unique(bank.labels))
    # as in PML, one run over at most 256 items a cluster; clusters of few items are not worth faiss's warnings
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": 256}
    k_means = faiss.Kmeans(rows.shape[1], clusters, niter=K_MEANS_ROUNDS, seed=K_MEANS_SEED, **limits)
    k_means.train(rows)
    cluster = k_means.index.search(rows, 1)[1][:, 0]
    return {metric: float(scores[metric](bank.labels.cpu().numpy(), cluster)) for metric in metrics}
