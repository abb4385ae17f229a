"""Judges embeddings made by any tool: few-shot accuracy and retrieval in one table, within seconds.

    python -m experiments.benchmark_embeddings --bank FILE
    python -m experiments.benchmark_embeddings --bank test.npz --train-bank train.npz --normalize --cosine
    python -m experiments.benchmark_embeddings --bank test.npy --reference gallery.npy --index hnsw

FILE is .npy (labels in FILE_labels.npy, or --labels), .npz, .pt or .safetensors with embeddings (M, D) and labels (M,).
Every head is a line of the table, judged on the same episodes.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tyro
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from torch import Tensor

from pml_fewshot import (
    EpisodeSpec,
    ResultTable,
    RetrievalTester,
    benchmark,
    cosine_classifier,
    k_nearest_neighbours,
    load_bank,
    logistic_regression,
    nearest_neighbour,
    nearest_prototype,
    ridge_regression,
    soft_nearest_neighbour,
)
from pml_fewshot.checks import require


def heads(distance: BaseDistance, fewest: int = 3) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is judged: those that compare by the distance, and linear classifiers fitted to each support.

    Args:
        distance: that the former compare by.
        fewest: support items of the smallest episode.
    """
    k = min(3, fewest)
    return {
        "nearest prototype": partial(nearest_prototype, distance=distance),
        # a bounded similarity wants a low temperature
        "soft nearest neighbour": partial(
            soft_nearest_neighbour, distance=distance, temperature=0.1 if distance.is_inverted else 1.0
        ),
        "best pair": partial(nearest_neighbour, distance=distance),
        f"{k} nearest neighbours": partial(k_nearest_neighbours, distance=distance, k=k),
        "cosine classifier": cosine_classifier,
        "ridge regression": ridge_regression,
        "logistic regression": logistic_regression,
    }


def main(
    bank: Path,
    labels: Path | None = None,
    reference: Path | None = None,
    train_bank: Path | None = None,
    normalize: bool = False,
    cosine: bool = False,
    ways: tuple[int, ...] = (5,),
    shots: tuple[int, ...] = (1, 5),
    queries: int = 15,
    num_episodes: int = 10_000,
    seed: int = 0,
    metrics: tuple[str, ...] = ("precision_at_1", "r_precision", "mean_average_precision_at_r"),
    index: str = "flat",
    write: Path | None = None,
) -> ResultTable:
    """Prints the table.

    Args:
        bank: embeddings and labels to judge.
        labels: file of the labels where they are not in the bank's.
        reference: gallery that retrieval searches; the bank itself, each item without itself, when not given.
        train_bank: embeddings of the training classes, whose mean is taken off (SimpleShot).
        normalize: scale embeddings to length 1.
        cosine: compare by cosine similarity; by Euclid when not given.
        ways: classes in an episode; every combination with shots is judged.
        shots: support items of each class.
        queries: query items of each class.
        num_episodes: of each size.
        seed: of the episodes.
        metrics: of retrieval; also recall_at_<k>, mean_average_precision, mean_reciprocal_rank, NMI, AMI.
        index: of retrieval: flat (exact), ivf, ivfpq, hnsw, or a description of faiss's index factory.
        write: existing folder for results.csv, results.md, results.tex and figures.csv.
    """
    try:
        require(write is None or write.is_dir(), "an existing folder to write to", str(write), "make it first")
        judged = load_bank(bank, labels)
        gallery = load_bank(reference) if reference else None
        if train_bank:
            mean = load_bank(train_bank).embeddings.mean(dim=0)
            judged, gallery = judged.centred(mean), gallery.centred(mean) if gallery else None
        if normalize:
            judged, gallery = judged.normalized(), gallery.normalized() if gallery else None
        distance = CosineSimilarity() if cosine else LpDistance(normalize_embeddings=False, power=2)
        tester = RetrievalTester(metrics, index=index, distance=distance)
        specs = [EpisodeSpec(w, k, queries) for w in ways for k in shots]
        table = ResultTable()
        for name, head in heads(distance, min(ways) * min(shots)).items():
            # retrieval does not depend on the head: it stands in the first line alone
            retrieval = tester if not table.rows else None
            table.rows += benchmark(
                {name: judged}, None, specs, retrieval, num_episodes, seed, head, gallery, note=str(bank)
            ).rows
    except (ValueError, TypeError, OSError) as error:
        if not str(error).startswith("expected "):
            raise
        sys.exit(f"error: {error}")
    print(table)
    if write:
        table.write(write)
    return table


if __name__ == "__main__":
    tyro.cli(main)
