"""Times transductive heads against easyfsl's on the same features, side by side in one process.

    pip install -c constraints.txt -e '.[bench]'
    python -m experiments.speed.transductive_speed

Synthetic overlapping classes, 5-way 15-query. Each head has the hyperparameters and steps of easyfsl's method. easyfsl
classifies one episode at a time, on one thread (two would wait for each other in its small operations); ours runs as
the evaluator calls a head: chunks of 2**20 floats, one in each of two threads. The two take turns for `rounds` rounds;
figures are medians. Queries that the two predict differently are counted.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from pml_fewshot import alpha_tim, bd_cspn, fine_tuning, laplacian_shot, pt_map, transductive_fine_tuning
from pml_fewshot.checks import import_extra
from pml_fewshot.environment import keep_freed_memory, one_thread_each
from pml_fewshot.evaluation.episodic import CPU_CHUNK
from pml_fewshot.experiment.command_line import one_line_errors

TIM = partial(alpha_tim, alpha=1.0, conditional_weight=0.1, similarity="cosine", temperature=10.0, steps=50)
TUNED = partial(fine_tuning, similarity="cosine", temperature=1.0, steps=200, learning_rate=1e-4)
# easyfsl's name: our head with its settings, how many of its episodes take less than a second
PAIRS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "BDCSPN": (partial(bd_cspn, scale=1.0), 200),
    "LaplacianShot": (partial(laplacian_shot, scale=1.0), 100),
    "TransductiveFinetuning": (
        partial(transductive_fine_tuning, similarity="euclidean", temperature=1.0),
        10,
    ),
    "TIM": (TIM, 5),
    "PTMAP": (partial(pt_map, center=False, steps=10), 3),
    "Finetune": (TUNED, 3),
}


def episodes(count: int, shots: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns L2-normalized support (E, 5, K, D) and query (E, 75, D)."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    spread = (dims / 16) ** 0.5  # equally hard at any number of dimensions
    items = F.normalize(randn(count, 5, 1, dims) + spread * randn(count, 5, shots + 15, dims), dim=3)
    return items[:, :, :shots].contiguous(), items[:, :, shots:].flatten(1, 2)


def ours(head: Callable[..., Tensor], support: Tensor, query: Tensor, threads: int) -> Tensor:
    """(E, N, W)"""
    chunk = max(1, CPU_CHUNK // (support[0].numel() + query[0].numel()))

    @torch.no_grad()
    def score(start: int) -> Tensor:
        return head(support[start : start + chunk], query[start : start + chunk])

    with ThreadPoolExecutor(threads) as pool, one_thread_each():
        return torch.cat(list(pool.map(score, range(0, len(support), chunk))))


def theirs(method: Callable[[], torch.nn.Module], support: Tensor, query: Tensor) -> Tensor:
    """(E, N, W)"""
    labels = torch.arange(support.shape[1]).repeat_interleave(support.shape[2])
    scores = []
    with torch.no_grad(), one_thread_each():
        for own, rows in zip(support, query, strict=True):
            classifier = method()
            classifier.process_support_set(own.flatten(0, 1), labels)  # type: ignore[operator]
            scores.append(classifier(rows))
    return torch.stack(scores)


def main(dims: tuple[int, ...] = (64, 640), shots: tuple[int, ...] = (1, 5), rounds: int = 5, threads: int = 2) -> None:
    """Prints the table.

    Args:
        dims: numbers of dimensions.
        shots: support items of each class.
        rounds: how often each is timed.
        threads: threads in which ours runs.
    """
    methods = import_extra("bench", "to compare with", "easyfsl.methods")
    keep_freed_memory()
    print("| head | D | shots | easyfsl, ms | here, ms | times | predicted differently |")
    print("| --- " * 7 + "|")
    for size in dims:
        for count in shots:
            many = episodes(max(200, 4 * CPU_CHUNK // ((count + 15) * 5 * size)), count, size)
            for name, (head, few) in PAIRS.items():
                support, query = many
                if name == "PTMAP":  # underflows where squared distances of the roots are above 6
                    support, query = (each.relu() * (64 / size) ** 0.5 for each in many)
                method = getattr(methods, name)
                taken: tuple[list[float], list[float]] = ([], [])
                for turn in range(rounds + 1):  # the first turn warms both up
                    start = time.perf_counter()
                    peer = theirs(method, support[:few], query[:few])
                    middle = time.perf_counter()
                    own = ours(head, support, query, threads)
                    end = time.perf_counter()
                    if turn:
                        taken[0].append((middle - start) / few)
                        taken[1].append((end - middle) / len(support))
                slow, fast = (1000 * statistics.median(each) for each in taken)
                other = (peer.argmax(dim=2) != own[:few].argmax(dim=2)).double().mean().item()
                cells = f"{slow:.2f} | {fast:.4f} | {slow / fast:.0f} | {100 * other:.2f} %"
                print(f"| {name} | {size} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
