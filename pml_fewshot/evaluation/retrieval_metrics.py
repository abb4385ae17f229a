"""Retrieval metrics of each query, from the ranks of the neighbors of its class; and NMI and AMI of a bank."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.search import Ranking

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
WHOLE_RANKING = ("mean_average_precision", "mean_reciprocal_rank", "ndcg")
CLUSTERING = ("NMI", "AMI")
AT_K = re.compile(r"(precision|recall|cmc|ndcg)_at_([1-9][0-9]*)")
OF_K = tuple(f"{name}_at_<k>" for name in ("precision", "recall", "cmc", "ndcg"))
NAMES = (*METRICS, *WHOLE_RANKING, *CLUSTERING, *OF_K, "recall_at_1", "cmc_at_1", "ndcg_at_1")


def neighbors_needed(metric: str, largest_class: int, num_references: int) -> int:
    """Returns how many neighbors a metric needs if the largest class has that many right answers."""
    if at := AT_K.fullmatch(metric):
        return int(at[2])
    return num_references if metric in WHOLE_RANKING else largest_class


def measure(metric: str, match: Tensor, relevant: Tensor) -> Tensor:
    """Computes one metric for each query, (N,) in float64.

    `match` (N, k) says whether the neighbor at each rank is of the query's class, which has `relevant` (N,) references.
    """
    if at := AT_K.fullmatch(metric):
        metric, match = at[1], match[:, : int(at[2])]
    if metric == "precision":
        return match.double().mean(dim=1)
    if metric in ("recall", "cmc"):
        return match.any(dim=1).double()
    if metric == "mean_reciprocal_rank":
        return match.any(dim=1).double() / (match.byte().argmax(dim=1) + 1)
    rank = torch.arange(1, match.shape[1] + 1, device=match.device)
    if metric == "ndcg":
        gain = 1 / (rank + 1).double().log2()
        return match.double() @ gain / gain.cumsum(dim=0)[relevant.clamp(max=len(gain)) - 1]
    if metric != "mean_average_precision":
        match = match & (rank <= relevant.unsqueeze(1))  # only the first R ranks count
    hit = match.double()
    if metric == "r_precision":
        return hit.sum(dim=1) / relevant
    return (hit * hit.cumsum(dim=1) / rank).sum(dim=1) / relevant


def count_equal(columns: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Counts (N,) the references equal to each query in all columns, pairs (of queries (N,), of references (M,))."""
    count, code = len(columns[0][0]), torch.zeros(1, dtype=torch.int64)
    for column in columns:
        distinct, number = torch.unique(torch.cat(column), return_inverse=True)
        code = torch.unique(code * len(distinct) + number, return_inverse=True)[1]
    return torch.bincount(code[count:], minlength=len(code))[code[:count]]


def clustering_scores(bank: EmbeddingBank, metrics: tuple[str, ...], ranking: Ranking) -> dict[str, float]:
    """Clusters a bank by k-means (Euclidean, faiss, one run) into as many clusters as it has classes and compares them.

    "NMI" is the mutual information over the mean of the two entropies, "AMI" adjusts it for chance (Vinh et al. 2010).
    Rows are normalized where `ranking` does so.
    """
    import faiss
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    scores = {"NMI": normalized_mutual_info_score, "AMI": adjusted_mutual_info_score}
    rows = ranking.prepare(bank.embeddings).cpu().contiguous().numpy()
    clusters = len(torch.unique(bank.labels))
    # as in PML: 20 rounds, faiss's own seed, at most 256 items a cluster; small clusters are not worth faiss's warnings
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": 256}
    k_means = faiss.Kmeans(rows.shape[1], clusters, niter=20, seed=1234, **limits)
    k_means.train(rows)
    cluster = k_means.index.search(rows, 1)[1][:, 0]
    return {metric: float(scores[metric](bank.labels.cpu().numpy(), cluster)) for metric in metrics}
