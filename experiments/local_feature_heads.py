"""Does comparing feature maps pay on one's trunk? Heads for maps beside the prototype head, on the same episodes.

    python -m experiments.local_feature_heads --embedder RUN/embedder.safetensors --data-root ../shared/data
    python -m experiments.local_feature_heads --bank FILE --nodes 25

RUN is one of mini_imagenet_protonet, or of another experiment whose embedder is Conv4 on miniImageNet; FILE holds
feature maps, flattened channels first. FRN's penalty is chosen on the validation classes (of a bank: --penalty).
`--structured N` adds DeepEMD's structured prototypes at 5 shots on N episodes, about 2 s each.
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
    compare,
    feature_map_reconstruction,
    load_bank,
    load_embedder,
    load_mini_imagenet,
    nearest_neighbour,
    nearest_prototype,
)
from pml_fewshot.checks import UsageError
from pml_fewshot.distances.local_neighbors import LocalNeighborSimilarity
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.evaluation.structured import structured_classifier
from pml_fewshot.experiment.command_line import one_line_errors

PENALTIES = (-2.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0)


def banks(embedder: Path, data_root: Path) -> tuple[EmbeddingBank, EmbeddingBank]:
    """The validation and the test images of miniImageNet, by the Conv4 in a file."""
    network, splits = Embedder(Conv4(in_channels=3)), load_mini_imagenet(data_root)
    load_embedder(embedder, network)
    if splits.val is None:
        raise UsageError("expected validation classes to choose FRN's penalty on, got none; give --bank and --penalty")
    return network.encode(splits.val), network.encode(splits.test)


def choose_penalty(bank: EmbeddingBank, nodes: int, spec: EpisodeSpec) -> float:
    """The logarithm of FRN's penalty that is best on 500 episodes of other classes."""

    def accuracy(log_penalty: float) -> float:
        head = partial(feature_map_reconstruction, nodes=nodes, log_penalty=log_penalty)
        return EpisodicEvaluator(spec, 500, seed=1, head=head).evaluate(bank).mean

    return max(PENALTIES, key=accuracy)


def main(
    bank: Path | None = None,
    embedder: Path | None = None,
    data_root: Path = Path("data"),
    nodes: int = 25,
    penalty: float = 0.0,
    shots: tuple[int, ...] = (1, 5),
    num_episodes: int = 2_000,
    structured: int = 0,
    seed: int = 0,
) -> None:
    """Prints a table for each number of shots.

    Args:
        bank: feature maps and labels.
        embedder: weights of a Conv4 for color images, where no bank is given.
        data_root: folder of miniImageNet.
        nodes: of a feature map.
        penalty: logarithm of FRN's penalty, for a bank.
        shots: support items of each of 5 classes.
        num_episodes: of 15 queries a class.
        structured: episodes for DeepEMD's structured prototypes, with more than one shot; none at 0.
        seed: of the episodes.
    """
    if bank is not None:
        validation, tested = None, load_bank(bank)
    elif embedder is not None:
        validation, tested = banks(embedder, data_root)
    else:
        raise UsageError("expected embeddings of feature maps, got none; give --bank FILE or --embedder FILE")
    emd = EarthMoversDistance(nodes)
    for spec in (EpisodeSpec(ways=5, shots=k, queries=15) for k in shots):
        alpha = penalty if validation is None else choose_penalty(validation, nodes, spec)
        heads: dict[str, Head] = {
            "nearest prototype, squared Euclid": nearest_prototype,
            "nearest prototype, earth mover's": partial(nearest_prototype, distance=emd),
            **({"nearest map, earth mover's": partial(nearest_neighbour, distance=emd)} if spec.shots > 1 else {}),
            "nearest prototype, 3 local neighbors": partial(nearest_prototype, distance=LocalNeighborSimilarity(nodes)),
            f"reconstruction, penalty exp({alpha:g})": partial(
                feature_map_reconstruction, nodes=nodes, log_penalty=alpha
            ),
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
            few = EpisodicEvaluator(spec, structured, seed, head=partial(nearest_prototype, distance=emd)).evaluate(
                tested
            )
            tuned = partial(structured_classifier, distance=emd)
            paired = compare(EpisodicEvaluator(spec, structured, seed, head=tuned).evaluate(tested), few)
            print(f"\nstructured prototypes minus prototypes by the earth mover's distance: {paired}")
    print(f"\n{num_episodes:,} episodes, seed {seed}, inductive, +- 95 % intervals")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with one_line_errors():
        tyro.cli(main)
