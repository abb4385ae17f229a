"""Do the linear heads' default penalties suit your embeddings? Next to heads without one, over ways, shots, lengths.

    python -m experiments.head_penalties                                    # built-in letters, untrained network
    python -m experiments.head_penalties --embedder RUN/embedder.safetensors      # the same, quickstart's network
    python -m experiments.head_penalties --bank FILE --shots 1 5 10 --num-episodes 1000

FILE is as in experiments.benchmark_embeddings. A fixed number as the penalty (the last column) acts differently at each
length of the embeddings; the defaults give the same figure whatever the bank is multiplied by.
"""

from functools import partial
from pathlib import Path

import torch
import tyro

from pml_fewshot import (
    Conv4,
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    cosine_classifier,
    load_bank,
    load_embedder,
    load_glyphs,
    logistic_regression,
    nearest_prototype,
    ridge_regression,
)
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.experiment.command_line import one_line_errors

HEADS: dict[str, Head] = {
    "nearest prototype": nearest_prototype,
    "cosine classifier": cosine_classifier,
    "ridge": ridge_regression,
    "logistic": logistic_regression,
    "logistic, penalty 1.0": partial(logistic_regression, penalty=1.0),
}


def glyph_bank(embedder: Path | None = None) -> EmbeddingBank:
    """Embeds the built-in test letters with the Conv4 in a file or with an untrained one."""
    torch.manual_seed(0)
    network = Embedder(Conv4(in_channels=1))
    if embedder is not None:
        load_embedder(embedder, network)
    return network.encode(load_glyphs().test)


def main(
    bank: Path | None = None,
    embedder: Path | None = None,
    ways: tuple[int, ...] = (5, 20, 40),
    shots: tuple[int, ...] = (1, 5),
    queries: int = 10,
    num_episodes: int = 200,
    seed: int = 0,
) -> None:
    """Prints the table; takes half a minute.

    Args:
        bank: embeddings and labels; the built-in letters when not given.
        embedder: weights of the Conv4 that embeds the built-in letters; untrained when not given.
        ways: classes per episode, in every combination with shots.
        shots: support items per class.
        queries: query items per class.
        num_episodes: episodes of each size.
        seed: seed of the episodes.
    """
    raw = glyph_bank(embedder) if bank is None else load_bank(bank)
    lengths = {"raw": raw, "x 0.01": EmbeddingBank(raw.embeddings * 0.01, raw.labels), "length 1": raw.normalized()}
    print("| ways | shots | embeddings |", " | ".join(HEADS), "|")
    print("| --- " * (3 + len(HEADS)) + "|")
    for spec in (EpisodeSpec(w, k, queries) for w in ways for k in shots):
        for name, scaled in lengths.items():
            results = [EpisodicEvaluator(spec, num_episodes, seed, head=h).evaluate(scaled) for h in HEADS.values()]
            figures = " | ".join(f"{100 * result.mean:.1f} +- {100 * result.ci95:.1f}" for result in results)
            print(f"| {spec.ways} | {spec.shots} | {name} | {figures} |", flush=True)
    episodes = f"{num_episodes} episodes of {queries} queries a class, seed {seed}"
    print(f"\n%, +- 95 % intervals; {episodes}; raw lengths {raw.embeddings.norm(dim=1).mean():.3g} on average")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
