"""Does transductive inference pay off, and what is left of it when classes have unequal numbers of queries?

    python -m experiments.transductive_heads                                  # built-in letters, untrained network
    python -m experiments.transductive_heads --embedder runs/quickstart/embedder.safetensors
    python -m experiments.transductive_heads --queries 15 --data-root ../shared/data --embedder RUN/embedder.safetensors
    python -m experiments.transductive_heads --bank FILE --train-bank FILE --shots 5

Evaluates every head on the same episodes of one bank, with its difference from the nearest prototype. Unbalanced
episodes have as many queries in total, divided among the classes at random (Dirichlet; Veilleux et al. 2021). A run of
mini_imagenet_protonet or the like (a Conv4 for color images) is evaluated on miniImageNet's test classes. FILE is as in
experiments.benchmark_embeddings.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from pml_fewshot import (
    Conv4,
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    alpha_tim,
    bd_cspn,
    compare,
    cosine_classifier,
    fine_tuning,
    laplacian_shot,
    load_bank,
    load_embedder,
    load_glyphs,
    load_mini_imagenet,
    logistic_regression,
    nearest_prototype,
    pt_map,
    ridge_regression,
    transductive_fine_tuning,
)
from pml_fewshot.environment import keep_freed_memory
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.heads import is_transductive, name_of_head
from pml_fewshot.experiment.command_line import one_line_errors

AnyHead = Callable[..., Tensor]
INDUCTIVE: tuple[AnyHead, ...] = (
    nearest_prototype,
    cosine_classifier,
    ridge_regression,
    logistic_regression,
    fine_tuning,
)
TIM = partial(alpha_tim, alpha=1.0, support_weight=0.1, conditional_weight=0.1)  # the authors' setting
TRANSDUCTIVE: tuple[AnyHead, ...] = (bd_cspn, laplacian_shot, transductive_fine_tuning, alpha_tim, TIM, pt_map)
RAW = (pt_map,)  # transforms the embeddings itself


def banks(
    bank: Path | None, train_bank: Path | None, embedder: Path | None, data_root: Path | None
) -> tuple[EmbeddingBank, EmbeddingBank | None]:
    """Returns the bank to evaluate, and that of the training classes if there is one."""
    if bank is not None:
        return load_bank(bank), None if train_bank is None else load_bank(train_bank)
    torch.manual_seed(0)
    splits = load_glyphs() if data_root is None else load_mini_imagenet(data_root)
    network = Embedder(Conv4(in_channels=splits.test.images.shape[1]))
    if embedder is not None:
        load_embedder(embedder, network)
    return network.encode(splits.test), network.encode(splits.train)


def timed(
    head: Callable[..., Tensor], spec: EpisodeSpec, bank: EmbeddingBank, count: int, seed: int
) -> tuple[EpisodicResult, float]:
    """Returns a result and the episodes per second."""
    start = time.perf_counter()
    result = EpisodicEvaluator(spec, count, seed, head=head).evaluate(bank)
    return result, count / (time.perf_counter() - start)


def figures(result: EpisodicResult, base: EpisodicResult) -> str:
    """Formats the accuracy and its difference from the base as two columns."""
    against = compare(result, base)
    difference = "" if result is base else f"{100 * against.difference:+.2f} +- {100 * against.ci95:.2f}"
    return f"{100 * result.mean:.2f} +- {100 * result.ci95:.2f} | {difference}"


def main(
    bank: Path | None = None,
    train_bank: Path | None = None,
    embedder: Path | None = None,
    data_root: Path | None = None,
    ways: int = 5,
    shots: tuple[int, ...] = (1, 5),
    queries: int = 3,
    alpha: float = 2.0,
    num_episodes: int = 1000,
    seed: int = 0,
) -> None:
    """Prints the table.

    Args:
        bank: embeddings and labels; the built-in letters when not given.
        train_bank: embeddings of other classes, whose mean is subtracted.
        embedder: weights of the Conv4 that embeds; untrained when not given.
        data_root: folder of miniImageNet; the built-in letters when not given.
        ways: classes per episode.
        shots: support items per class.
        queries: query items per class, on average if unbalanced: one class may then have them all, and letters have 20
            images; 15 is usual.
        alpha: parameter of the Dirichlet distribution; 2 in the paper; larger is closer to balanced.
        num_episodes: episodes of each size.
        seed: seed of the episodes.
    """
    sizes = {}
    for count in shots:
        even = EpisodeSpec(ways, count, queries)
        sizes[count] = (even, replace(even, query_balance=alpha))
    keep_freed_memory()
    raw, training = banks(bank, train_bank, embedder, data_root)
    ready = (raw if training is None else raw.centered(training.mean())).normalized()
    print("| shots | head | protocol | balanced | minus prototype | unbalanced | minus prototype | episodes/s |")
    print("| --- " * 8 + "|")
    for count, specs in sizes.items():
        bases = [timed(nearest_prototype, spec, ready, num_episodes, seed) for spec in specs]
        for head in (*INDUCTIVE, *TRANSDUCTIVE):
            own = raw if head in RAW else ready
            results = bases
            if head is not nearest_prototype:
                results = [timed(head, spec, own, num_episodes, seed) for spec in specs]
            cells = [figures(result, base) for (result, _), (base, _) in zip(results, bases, strict=True)]
            protocol = "transductive" if is_transductive(head) else "inductive"
            protocol = f"{protocol}, {queries} queries a class or Dirichlet({alpha:g})"
            speed = 2 / sum(1 / each for _, each in results)
            print(f"| {count} | {name_of_head(head)} | {protocol} | {' | '.join(cells)} | {speed:,.0f} |", flush=True)
    rows = "length 1" if training is None else "minus the mean of the training classes, length 1"
    print(f"\n{ways}-way, {num_episodes:,} episodes, seed {seed}; %, 95 % intervals; paired differences")
    print(f"embeddings: {rows}; of pt_map as they are, which transforms them itself")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
