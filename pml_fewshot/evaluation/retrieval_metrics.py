"""Retrieval metrics of each query, from which of its ranked neighbors are of its class; and NMI and AMI of a bank."""

import re

import torch
from torch import Tensor

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.search import Ranking

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
WHOLE_RANKING = ("mean_average_precision", "mean_reciprocal_rank")
CLUSTERING = ("NMI", "AMI")
RECALL = re.compile(r"recall_at_([1-9][0-9]*)")
NAMES = (*METRICS, *WHOLE_RANKING, *CLUSTERING, "recall_at_1", "recall_at_<k>")


def neighbors_needed(metric: str, largest_class: int, num_references: int) -> int:
    """How many neighbors a metric depends on where the largest class has that many right answers."""
    if recall := RECALL.fullmatch(metric):
        return int(recall[1])
    if metric in WHOLE_RANKING:
        return num_references
    return 1 if metric == "precision_at_1" else largest_class


def measure(metric: str, match: Tensor, relevant: Tensor) -> Tensor:
    """(N,) float64 value of one metric for each query.

    `match` (N, k) says whether the neighbor at each rank is of the query's class, which has `relevant` (N,) references.
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

    "NMI" is the mutual information over the mean of the two entropies, "AMI" adjusts it for chance (Vinh et al. 2010).
    Rows are normalized where `ranking` does so.
    """
    import faiss
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    scores = {"NMI": normalized_mutual_info_score, "AMI": adjusted_mutual_info_score}
    rows = ranking.prepare(bank.embeddings).cpu().contiguous().numpy()
    clusters = len(torch.unique(bank.labels))
    # as PML: 20 rounds, faiss's own seed, at most 256 items a cluster; few in one are not worth faiss's warnings
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": 256}
    k_means = faiss.Kmeans(rows.shape[1], clusters, niter=20, seed=1234, **limits)
    k_means.train(rows)
    cluster = k_means.index.search(rows, 1)[1][:, 0]
    return {metric: float(scores[metric](bank.labels.cpu().numpy(), cluster)) for metric in metrics}
