"""Does comparing feature maps pay off on your trunk? Heads for maps and the prototype head, on the same episodes.

    python -m experiments.local_feature_heads --embedder RUN/embedder.safetensors --data-root ../shared/data
    python -m experiments.local_feature_heads --bank FILE --nodes 25

RUN is a run of mini_imagenet_protonet or of another experiment whose embedder is Conv4 on miniImageNet; FILE holds
feature maps, flattened with the channels first. `--structured N` adds DeepEMD's structured prototypes at more than one
shot on N episodes, about 2 s each.
"""

from functools import partial
from pathlib import Path

import torch
import tyro

from pml_fewshot import (
    Conv4,
    EarthMoversDistance,
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    LocalNeighborSimilarity,
    compare,
    feature_map_reconstruction,
    load_bank,
    load_embedder,
    load_mini_imagenet,
    nearest_neighbour,
    nearest_prototype,
    structured_classifier,
)
from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.experiment.command_line import one_line_errors


def bank_of(embedder: Path, data_root: Path) -> EmbeddingBank:
    """Embeds the test images of miniImageNet with the Conv4 in a file."""
    network = Embedder(Conv4(in_channels=3))
    load_embedder(embedder, network)
    return network.encode(load_mini_imagenet(data_root).test)


def main(
    bank: Path | None = None,
    embedder: Path | None = None,
    data_root: Path = Path("data"),
    nodes: int = 25,
    shots: tuple[int, ...] = (1, 5),
    num_episodes: int = 2_000,
    structured: int = 0,
    seed: int = 0,
) -> None:
    """Prints a table for each number of shots.

    Args:
        bank: feature maps and labels.
        embedder: weights of a Conv4 for color images, when no bank is given.
        data_root: folder of miniImageNet.
        nodes: nodes per feature map.
        shots: support items for each of the 5 classes.
        num_episodes: episodes with 15 queries per class.
        structured: episodes for DeepEMD's structured prototypes, at more than one shot; 0 for none.
        seed: seed of the episodes.
    """
    if bank is not None:
        tested = load_bank(bank)
    elif embedder is not None:
        tested = bank_of(embedder, data_root)
    else:
        raise UsageError("expected embeddings of feature maps, got none; give --bank FILE or --embedder FILE")
    emd = EarthMoversDistance(nodes)
    for spec in (EpisodeSpec(ways=5, shots=k, queries=15) for k in shots):
        heads: dict[str, Head] = {
            "nearest prototype, squared Euclidean": nearest_prototype,
            "nearest prototype, earth mover's": partial(nearest_prototype, distance=emd),
            **({"nearest map, earth mover's": partial(nearest_neighbour, distance=emd)} if spec.shots > 1 else {}),
            "nearest prototype, 3 local neighbors": partial(nearest_prototype, distance=LocalNeighborSimilarity(nodes)),
            "feature map reconstruction": partial(feature_map_reconstruction, nodes=nodes),
        }
        print(f"\n| {spec} | accuracy, % | minus the first, points |\n| --- | --- | --- |")
        first = None
        for name, head in heads.items():
            result = EpisodicEvaluator(spec, num_episodes, seed, head=head).evaluate(tested)
            first = first or result
            paired = compare(result, first)
            difference = f"{100 * paired.difference:+.2f} +- {100 * paired.ci95:.2f}" if result is not first else ""
            print(f"| {name} | {100 * result.mean:.2f} +- {100 * result.ci95:.2f} | {difference} |", flush=True)
        if structured and spec.shots > 1:
            tuned = (partial(structured_classifier, distance=emd), partial(nearest_prototype, distance=emd))
            paired = compare(*(EpisodicEvaluator(spec, structured, seed, head=head).evaluate(tested) for head in tuned))
            print(f"\nstructured prototypes minus prototypes by the earth mover's distance: {paired}")
    print(f"\n{num_episodes:,} episodes, seed {seed}, inductive, +- 95 % intervals")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with one_line_errors():
        tyro.cli(main)
