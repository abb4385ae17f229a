"""How well k-means clusters of embeddings agree with their classes: NMI and AMI."""

import faiss
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.blas import warn_of_slow_blas
from pml_fewshot.evaluation.ranking import Ranking

SCORES = {"NMI": normalized_mutual_info_score, "AMI": adjusted_mutual_info_score}
ROUNDS = 20  # of k-means, as many as PML's AccuracyCalculator makes
SEED = 1234  # faiss's own default, and so that of PML's figures


def clustering_scores(bank: EmbeddingBank, metrics: tuple[str, ...], ranking: Ranking) -> dict[str, float]:
    """Clusters a bank by k-means (Euclid, faiss, one run) into as many clusters as it has classes and compares them.

    Args:
        bank: embeddings and their classes.
        metrics: "NMI" (mutual information over the mean of the two entropies), "AMI" (adjusted for chance, Vinh et al.
            2010), or both, from one clustering.
        ranking: says whether rows are normalised first, as for the neighbours.
    """
    warn_of_slow_blas()
    rows = ranking.prepare(bank.embeddings).cpu().contiguous().numpy()
    clusters = len(torch.unique(bank.labels))
    # as PML has it: one run, over at most 256 items a cluster; clusters of few items are not worth faiss's warnings
    k_means = faiss.Kmeans(
        rows.shape[1], clusters, niter=ROUNDS, seed=SEED, min_points_per_centroid=1, max_points_per_centroid=256
    )
    k_means.train(rows)
    cluster = k_means.index.search(rows, 1)[1][:, 0]
    return {metric: float(SCORES[metric](bank.labels.cpu().numpy(), cluster)) for metric in metrics}
