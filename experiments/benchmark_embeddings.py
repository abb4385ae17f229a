"""Evaluates embeddings from any tool: few-shot accuracy and retrieval in one table, within seconds.

    python -m experiments.benchmark_embeddings --bank FILE
    python -m experiments.benchmark_embeddings --bank test.npz --train-bank train.npz --normalize --cosine
    python -m experiments.benchmark_embeddings --bank test.npy --reference gallery.npy --index hnsw

FILE is .npy (labels in FILE_labels.npy, or --labels), .npz, .pt or .safetensors with embeddings (M, D) and labels (M,).
Each head is a row of the table; all are evaluated on the same episodes.
"""

from functools import partial
from pathlib import Path

import tyro
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance

from pml_fewshot import (
    EpisodeSpec,
    ResultTable,
    RetrievalTester,
    benchmark,
    cosine_classifier,
    load_bank,
    logistic_regression,
    nearest_neighbour,
    nearest_prototype,
    ridge_regression,
)
from pml_fewshot.checks import MissingFileError
from pml_fewshot.evaluation.heads import Head, k_nearest_neighbours, soft_nearest_neighbour
from pml_fewshot.experiment.command_line import one_line_errors, program


def heads(distance: BaseDistance, fewest: int = 3) -> dict[str, Head]:
    """Returns classifiers that compare by the distance, and linear ones fitted to each support set.

    Args:
        distance: used by the classifiers that compare.
        fewest: support items in the smallest episode.
    """
    temperature = 0.1 if distance.is_inverted else 1.0  # a bounded similarity needs a low temperature to be sharp
    k = min(3, fewest)
    return {
        "nearest prototype": partial(nearest_prototype, distance=distance),
        "soft nearest neighbor": partial(soft_nearest_neighbour, distance=distance, temperature=temperature),
        "nearest neighbor": partial(nearest_neighbour, distance=distance),
        f"{k} nearest neighbors": partial(k_nearest_neighbours, distance=distance, k=k),
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
    """Evaluates a file of embeddings with seven few-shot classifiers and retrieval, and prints the table.

    Args:
        bank: embeddings and labels to evaluate.
        labels: file with the labels, if they are not in the bank's file.
        reference: gallery for retrieval; when not given, the bank itself, where no item finds itself.
        train_bank: embeddings of the training classes; their mean is subtracted (SimpleShot).
        normalize: L2-normalize the embeddings.
        cosine: compare by cosine similarity; by Euclidean distance when not given.
        ways: classes per episode, in every combination with shots.
        shots: support items per class.
        queries: query items per class.
        num_episodes: episodes of each size.
        seed: seed of the episodes.
        metrics: retrieval metrics; also recall_at_<k>, mean_average_precision, mean_reciprocal_rank, NMI, AMI.
        index: retrieval index: flat (exact), ivf, ivfpq, hnsw, or a description for faiss's index factory.
        write: existing folder to write the table's files to.
    """
    if write is not None and not write.is_dir():
        raise MissingFileError(f"expected an existing folder to write to, got {write}; make it first")
    test, gallery = load_bank(bank, labels), load_bank(reference) if reference else None
    if train_bank:
        mean = load_bank(train_bank).embeddings.mean(dim=0)
        test, gallery = test.centered(mean), gallery.centered(mean) if gallery else None
    if normalize:
        test, gallery = test.normalized(), gallery.normalized() if gallery else None
    distance = CosineSimilarity() if cosine else LpDistance(normalize_embeddings=False, power=2)
    tester = RetrievalTester(metrics, index=index, distance=distance)
    specs = [EpisodeSpec(ways=w, shots=k, queries=queries) for w in ways for k in shots]
    table = ResultTable()
    for name, head in heads(distance, min(ways) * min(shots)).items():
        # retrieval does not depend on the head, so only the first row has it
        retrieval = tester if not table.rows else None
        table.rows += benchmark(
            {name: test}, None, specs, retrieval, num_episodes, seed, head, gallery, note=str(bank)
        ).rows
    print(table)
    if write:
        table.write(write)
    return table


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog=program())
