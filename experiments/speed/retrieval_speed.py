"""Times retrieval against pytorch-metric-learning's calculator and raw faiss. One command, three tables.

    pip install -c constraints.txt -e '.[bench]'
    python -m experiments.speed.retrieval_speed

Every contender runs in a separate process, taking turns for `repeats` rounds; figures are medians. faiss's OpenBLAS may
mistake the processor for an older one, so PML and faiss run as installed and with the kernels that pml_fewshot chooses.
Takes about 25 minutes on 2 cores, mostly for building the graph index of the large gallery.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.speed.retrieval_worker import clusters
from experiments.speed.side_by_side import conditions

PACKAGES = ("torch", "pytorch-metric-learning", "faiss-cpu", "numpy", "scikit-learn")
SAME_FIGURE = 1e-6  # neighbors whose distances differ by less than float32 resolves may change places
INDEXES = ("hnsw|efSearch=48", "ivfpq|nprobe=1024", "IVF4096,SQ8|nprobe=512")


def work(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the measurements of one process."""
    command = [sys.executable, "-m", "experiments.speed.retrieval_worker", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(contenders: dict[str, list[str]], arguments: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Returns the medians of each contender's measurements over `repeats` rounds."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, own in contenders.items():
            rounds[name].append(work([*own, *arguments]))
    return {
        name: runs[0] | {key: statistics.median(run[key] for run in runs) for key in ("seconds", "extra_mb")}
        for name, runs in rounds.items()
    }


def among_itself(what: str, kind: str, size: tuple[int, int, int, float], repeats: int) -> None:
    """Prints the table of one set searched among itself, and raises if our figures and PML's differ."""
    items, dims, classes, noise = size
    arguments = [f"--items={items}", f"--dims={dims}", f"--classes={classes}", f"--noise={noise}"]
    contenders = {
        "ours": [f"--contender=ours{kind}"],
        "PML as installed": [f"--contender=pml{kind}", "--as-installed"],
        "PML, fast kernels": [f"--contender=pml{kind}"],
    }
    if not kind:
        contenders["faiss's neighbors alone, as installed"] = ["--contender=faiss", "--as-installed"]
        contenders["faiss's neighbors alone, fast kernels"] = ["--contender=faiss"]
    measured = take_turns(contenders, arguments, repeats)
    ours = measured["ours"]
    print(f"\n{what} of {items:,} x {dims} embeddings, {classes:,} classes: {ours['figures']}\n")
    print("| | seconds | times ours | extra memory, MB | times ours | faiss's BLAS core |\n|---|---|---|---|---|---|")
    for name, run in measured.items():
        memory = f"{run['extra_mb']:,.0f} | {run['extra_mb'] / max(ours['extra_mb'], 1):.1f}"
        times = run["seconds"] / ours["seconds"]
        print(f"| {name} | {run['seconds']:.2f} | {times:.2f} | {memory} | {run['blas']} |", flush=True)
        for metric, value in (run["figures"] or {}).items():
            if abs(value - ours["figures"][metric]) > SAME_FIGURE:
                raise AssertionError(f"{name}: {metric} {value}, ours {ours['figures'][metric]}: not the same search")


def large_gallery(items: int, queries: int, indexes: Sequence[str], repeats: int) -> None:
    """Prints the table of approximate indexes against exact search."""
    with tempfile.TemporaryDirectory() as folder:
        bank = clusters(items + queries, 128, max(10, items // 20), 1.0)
        for name, part in (("gallery", slice(0, items)), ("query", slice(items, None))):
            np.save(Path(folder) / f"{name}.npy", bank.embeddings[part].numpy())
            np.save(Path(folder) / f"{name}_labels.npy", bank.labels[part].numpy())
        del bank
        arguments = [f"--folder={folder}", f"--queries={queries}"]
        built = {index: work([f"--contender={index}", *arguments, "--build"]) for index in indexes}
        contenders = {"exact": ["--contender=exact"], "faiss flat": ["--contender=faiss"]}
        measured = take_turns(contenders | {index: [f"--contender={index}"] for index in indexes}, arguments, repeats)
    faiss_rate = queries / measured["faiss flat"]["seconds"]
    print(f"\n{queries:,} queries into a gallery of {items:,} x 128, {items // 20:,} clusters, cosine, 10 neighbors\n")
    print("| | queries/s | times faiss flat | recall@1 | build, s | peak memory, MB |\n|---|---|---|---|---|---|")
    for name, run in measured.items():
        rate, made = queries / run["seconds"], built.get(name)
        memory = max(run["peak_mb"], made["peak_mb"] if made else 0)
        title, build = (made["index"], f"{made['seconds']:.0f}") if made else (name, "")
        print(f"| {title} | {rate:,.0f} | {rate / faiss_rate:.1f} | {run['recall']:.4f} | {build} | {memory:,.0f} |")


def main(
    repeats: int = 3,
    items: int = 60_502,
    gallery: int = 1_000_000,
    queries: int = 10_000,
    indexes: tuple[str, ...] = INDEXES,
) -> None:
    """Prints the tables.

    Args:
        repeats: rounds in which the contenders take turns.
        items: items of the set searched among itself; the size of Stanford Online Products' test set.
        gallery: items of the large gallery; 0 leaves it out.
        queries: queries into the large gallery.
        indexes: indexes of the large gallery, as "description|parameters".
    """
    print("\n".join(f"- {line}" for line in (*conditions(PACKAGES), f"medians of {repeats} rounds")), flush=True)
    among_itself("P@1, R-precision and MAP@R", "", (items, 512, max(2, items * 11_318 // 60_502), 2.0), repeats)
    clustered = min(items, 10_000)
    among_itself("NMI and AMI", "-clustering", (clustered, 512, max(2, clustered * 1887 // 10_000), 2.0), repeats)
    if gallery:
        large_gallery(gallery, queries, indexes, repeats)


if __name__ == "__main__":
    tyro.cli(main)
