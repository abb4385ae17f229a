"""One contender of retrieval_speed in a separate process, with its own BLAS and memory.

Prints one line of JSON: seconds, figures, and how much the process's memory grew from its start.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

if "--as-installed" in sys.argv:
    import faiss  # noqa: F401 - before pml_fewshot, which would choose its kernels

import torch
import tyro
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from threadpoolctl import threadpool_info

from pml_fewshot import EmbeddingBank, Gallery, RetrievalTester, load_bank
from pml_fewshot.evaluation.search import Ranking, exact_search

KNN = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
CLUSTERING = ("NMI", "AMI")
NEIGHBORS = 10  # searched in the large gallery


def clusters(items: int, dims: int, classes: int, noise: float, seed: int = 0) -> EmbeddingBank:
    """Returns L2-normalized rows around `classes` random centers, with Gaussian noise of `noise` times their spread."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (items,), generator=generator)
    rows = torch.randn(items, dims, generator=generator) * noise
    rows += torch.randn(classes, dims, generator=generator)[labels]
    return EmbeddingBank(torch.nn.functional.normalize(rows, dim=1), labels)


def timed(action: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Returns an action's result, its seconds, and the MB by which the process's peak memory grew."""
    before = peak_mb()
    start = time.perf_counter()
    result = action()
    return result, {"seconds": time.perf_counter() - start, "extra_mb": peak_mb() - before, "blas": blas_core()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def blas_core() -> str:
    """Returns the processor that faiss's OpenBLAS has chosen kernels for; empty if faiss has another BLAS."""
    return "".join(
        each["architecture"] for each in threadpool_info() if "faiss" in each["filepath"] and "architecture" in each
    )


def pml(bank: EmbeddingBank, metrics: tuple[str, ...]) -> dict[str, float]:
    calculator = AccuracyCalculator(include=metrics, k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(bank.embeddings, bank.labels)


def neighbors(bank: EmbeddingBank, k: int) -> None:
    """Searches the neighbors alone, with faiss's flat index and no figures."""
    import faiss

    index = faiss.IndexFlatL2(bank.embeddings.shape[1])
    index.add(bank.embeddings.numpy())
    index.search(bank.embeddings.numpy(), k + 1)


def figures(contender: str, items: int, dims: int, classes: int, noise: float) -> Callable[[], dict[str, Any]]:
    """Returns an action that computes retrieval or clustering figures of one set among itself."""
    bank = clusters(items, dims, classes, noise)
    largest = int(torch.bincount(bank.labels).max()) - 1
    metrics = CLUSTERING if "clustering" in contender else KNN
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: dict(RetrievalTester(metrics).test(bank)),
        "pml": lambda: pml(bank, metrics),
        "faiss": lambda: neighbors(bank, largest),
    }
    # a small set first, so that libraries are loaded and threads started
    pml(EmbeddingBank(bank.embeddings[:64], bank.labels[:64] % 8), ("precision_at_1",))

    def measure() -> dict[str, Any]:
        found, about = timed(actions[contender.split("-")[0]])
        return about | {"figures": found}

    return measure


def search(contender: str, folder: Path, queries: int, build: bool) -> dict[str, Any]:
    """Searches the large gallery in `folder` for neighbors of queries; `build` makes and saves an index instead."""
    gallery, query = load_bank(folder / "gallery.npy"), load_bank(folder / "query.npy").embeddings[:queries]
    saved = folder / contender.replace(",", "_")
    if build:
        index, parameters = contender.split("|")
        made, about = timed(lambda: Gallery(gallery, index, parameters, CosineSimilarity()))
        made.save(saved)
        return about | {"peak_mb": peak_mb(), "index": str(made)}
    if contender == "exact":
        found, about = timed(lambda: exact_search(query, gallery.embeddings, NEIGHBORS, Ranking("inner product")))
        torch.save(found, folder / "exact.pt")
    elif contender == "faiss":
        import faiss

        flat = faiss.IndexFlatIP(query.shape[1])
        flat.add(gallery.embeddings.numpy())
        found, about = timed(lambda: torch.from_numpy(flat.search(query.numpy(), NEIGHBORS)[1]))
    else:
        loaded = Gallery.load(saved)
        loaded.search(query[:100], NEIGHBORS)
        found, about = timed(lambda: loaded.search(query, NEIGHBORS).indices)
    exact = torch.load(folder / "exact.pt", weights_only=True)[: len(query)]
    recall = (found[:, 0] == exact[:, 0]).double().mean().item()
    return about | {"recall": recall, "rate": len(query) / about["seconds"], "peak_mb": peak_mb()}


def main(
    contender: str,
    items: int = 0,
    dims: int = 0,
    classes: int = 0,
    noise: float = 1.0,
    folder: Path | None = None,
    queries: int = 0,
    build: bool = False,
    as_installed: bool = False,
    turns: bool = False,
) -> None:
    """Prints one line of JSON, and another for each turn.

    Args:
        contender: ours, pml or faiss, with "-clustering" for NMI and AMI; with a folder: exact, faiss or our index as
            "description|parameters".
        items: items of the set searched among itself.
        dims: dimensions of that set.
        classes: classes of that set.
        noise: noise of that set.
        folder: folder of the large gallery.
        queries: queries into the large gallery.
        build: make and save the index.
        as_installed: import faiss before this library, which would choose its kernels.
        turns: measure the set once more for each line of standard input.
    """
    if folder is None:
        measure = figures(contender, items, dims, classes, noise)
        for _ in chain([""], sys.stdin if turns else ()):
            print(json.dumps(measure()), flush=True)
    else:
        print(json.dumps(search(contender, folder, queries, build)))


if __name__ == "__main__":
    tyro.cli(main)
