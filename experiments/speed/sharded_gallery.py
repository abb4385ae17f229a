"""Builds galleries from a memory-mapped bank with one worker and several, and prints their time, memory and recall.

    python -m experiments.speed.sharded_gallery                # 1,000,000 x 64: about six minutes of each core
    python -m experiments.speed.sharded_gallery --items 10_000_000 --shards 32 --indexes "IVF4096,SQ8|nprobe=512"

L2-normalized rows lie around random centers, one for every 20 rows, and the queries around the same centers. Each
worker is a process; workers, exact search and queries use one thread unless OMP_NUM_THREADS is set. A worker's own
memory is what the system cannot reclaim (RssAnon); pages of mapped files, which it can, are resident too. Both are read
ten times a second.
"""

import multiprocessing
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the workers, which inherit it

import numpy as np
import torch
import tyro

from experiments.speed.side_by_side import conditions
from pml_fewshot import Gallery, load_bank
from pml_fewshot.evaluation.search import Ranking, exact_search
from pml_fewshot.evaluation.sharded_gallery import PLAN, build_gallery

INDEXES = ("ivf|nprobe=512", "ivfpq|nprobe=1024", "IVF4096,SQ8|nprobe=512", "IVF4096,PQ32|nprobe=512")
ROWS = 2**18  # rows made at a time
NEIGHBORS = 10


def write_bank(path: Path, items: int, dims: int, queries: int) -> torch.Tensor:
    """Writes a .npy of rows with labels next to it, a block at a time, and returns queries (N, dims)."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(max(10, items // 20), dims, generator=generator)

    def block(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(len(centers), (count,), generator=generator)
        rows = centers[labels] + torch.randn(count, dims, generator=generator)
        return torch.nn.functional.normalize(rows, dim=1), labels

    rows = np.lib.format.open_memmap(path, "w+", np.float32, (items, dims))
    labels = np.empty(items, np.int64)
    for start in range(0, items, ROWS):
        part, labels[start : start + ROWS] = block(min(ROWS, items - start))
        rows[start : start + ROWS] = part
    rows.flush()
    np.save(path.with_name(f"{path.stem}_labels.npy"), labels)
    return block(queries)[0]


def build(bank: str, folder: str, index: str, shards: int, gate: Any, done: Any) -> None:
    """One worker: reads the bank and waits for the others, so that imports are not timed."""
    name, parameters = index.split("|")
    own = load_bank(bank)
    gate.wait()
    build_gallery(own, folder, name, parameters, shards=shards)
    done.wait()


def memory(pid: int | None) -> tuple[float, float]:
    """Returns the MB of a process's own memory and of all that is resident; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS"))
    own, resident = (int(match[1]) * 1024 / 1e6 if match else 0 for match in found)
    return own, resident


def cpu_seconds(pid: int | None) -> float:
    """CPU seconds of a process in user and system mode: unlike the clock, hardly affected by other programs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def measured(bank: Path, folder: Path, index: str, workers: int, shards: int) -> dict[str, Any]:
    """Seconds of a build, once all workers have opened the bank, and of its training; MB of the largest worker."""
    context = multiprocessing.get_context("spawn")
    gate, done = (context.Barrier(workers + 1) for _ in range(2))
    given = (str(bank), str(folder), index, shards, gate, done)
    started = [context.Process(target=build, args=given) for _ in range(workers)]
    for each in started:
        each.start()
    while gate.n_waiting < workers and all(each.is_alive() for each in started):
        time.sleep(0.1)
    if not all(each.is_alive() for each in started):
        raise SystemExit("a worker has ended before the build; its error stands above")
    before, used = max(memory(each.pid)[0] for each in started), [cpu_seconds(each.pid) for each in started]
    gate.wait()
    start, began, own, resident = time.perf_counter(), time.time(), 0.0, 0.0
    while done.n_waiting < workers:
        held = [memory(each.pid) for each in started]
        own, resident = max(own, *(each[0] for each in held)), max(resident, *(each[1] for each in held))
        if not all(each.is_alive() for each in started):
            raise SystemExit("a worker has ended during the build; its error stands above")
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    cpu = [cpu_seconds(each.pid) - first for each, first in zip(started, used, strict=True)]
    done.wait()
    for each in started:
        each.join()
    training = (folder / PLAN).stat().st_mtime - began  # with the bank's checksum before it
    return {"seconds": seconds, "training": training, "cpu": cpu, "before": before, "own": own, "resident": resident}


def main(
    items: int = 1_000_000,
    dims: int = 64,
    queries: int = 1000,
    shards: int = 8,
    workers: tuple[int, ...] = (1, 2),
    indexes: tuple[str, ...] = INDEXES,
    folder: Path | None = None,
) -> None:
    """Prints the table.

    Args:
        items: number of references.
        dims: dimensions of each reference.
        queries: queries for the recall and the time of a search.
        shards: shards of every gallery.
        workers: numbers of processes, one round each.
        indexes: indexes as "description|parameters".
        folder: place for the bank and one gallery at a time, up to three times the bank's size; temporary when None.
    """
    print("\n".join(f"- {line}" for line in conditions(("torch", "faiss-cpu", "numpy"))), flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "bank.npy"
        query = write_bank(path, items, dims, queries)
        bank = load_bank(path)
        start = time.perf_counter()
        exact = exact_search(query, bank.embeddings, NEIGHBORS, Ranking("euclidean"))
        rate = queries / (time.perf_counter() - start)
        about = f"{items:,} x {dims}, {path.stat().st_size / 1e6:,.0f} MB; {queries:,} queries, {shards} shards"
        print(f"\n{about}; exact search: {rate:,.0f} queries/s\n")
        head = (
            "index",
            "workers",
            "build, s",
            "training, s",
            "CPU s of each worker",
            "own memory, MB",
            "before, MB",
            "with mapped pages, MB",
        )
        print(
            f"| {' | '.join((*head, 'disk, MB', 'recall@1', 'recall@10', 'queries/s'))} |\n|{'---|' * 12}", flush=True
        )
        for index in indexes:
            for count in workers:
                built = Path(name) / "gallery"
                took = measured(path, built, index, count, shards)
                gallery = Gallery.load(built)
                gallery.rank(query[:100], NEIGHBORS)
                start = time.perf_counter()
                found = gallery.rank(query, NEIGHBORS)
                rate = queries / (time.perf_counter() - start)
                recall = gallery.recall(query, bank, NEIGHBORS)
                if recall.at_1 != (found[:, 0] == exact[:, 0]).double().mean().item():
                    raise AssertionError(f"{index}: {recall} is not what was found")
                size = sum(file.stat().st_size for file in built.rglob("*") if file.is_file()) / 1e6
                computed = ", ".join(f"{each:.0f}" for each in sorted(took["cpu"]))
                seconds = f"{took['seconds']:.1f} | {took['training']:.1f} | {computed}"
                megabytes = " | ".join(f"{took[name]:,.0f}" for name in ("own", "before", "resident"))
                found_share = f"{recall.at_1:.3f} | {recall.at_k:.3f}"
                cells = (str(gallery), str(count), seconds, megabytes, f"{size:,.0f}", found_share, f"{rate:,.0f}")
                print(f"| {' | '.join(cells)} |", flush=True)
                shutil.rmtree(built)


if __name__ == "__main__":
    tyro.cli(main)
