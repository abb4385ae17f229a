"""Times the evaluation of an embedder against other libraries, side by side in one process. One command, one table.

    pip install -c constraints.txt -e '.[bench]'
    python -m experiments.speed.evaluation_speed --data-root ../shared/data
    python -m experiments.speed.evaluation_speed --data-root DIR --embedder runs/mine/embedder.safetensors

Every contender runs once first: that warms it up, and its figures must agree with ours. Then they take turns (ours, a
peer, the next peer, ours, ...) for `repeats` rounds; figures are medians over the rounds. Nothing else should run on
the machine. Ours evaluates on `episodes` episodes; peers are slower, so they run fewer and are compared by their rate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch import nn
from tqdm import tqdm

from experiments.speed import peers
from experiments.speed.side_by_side import Row, check_accuracy, check_equal, conditions, median_seconds, random_images
from pml_fewshot import (
    Conv4,
    Embedder,
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    FewShotDataset,
    ProtoNetTrainer,
    RetrievalTester,
    load_embedder,
    load_omniglot,
)
from pml_fewshot.environment import keep_freed_memory

SPEC = EpisodeSpec(ways=5, shots=1, queries=15)
SNELL, LEARN2LEARN, OURS = "Snell's way", "learn2learn's way", "given our Conv4"
PACKAGES = ("torch", "easyfsl", "pytorch-metric-learning", "faiss-cpu", "numpy")


# --- data -------------------------------------------------------------------------------------------------------------


def characters(data_root: Path) -> FewShotDataset:
    """Omniglot's 423 test classes of 20 images, 28 x 28."""
    return load_omniglot(data_root, rotations=False).test


# --- the comparisons --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """How much each contender does."""

    repeats: int
    episodes: int
    peer_episodes: int
    peer_feature_episodes: int
    workers: int = 0


class Subject:
    """A dataset and an embedder in the forms that ours and the peers accept, made before any clock runs."""

    def __init__(self, dataset: FewShotDataset, embedder: Embedder) -> None:
        self.dataset = dataset
        self.embedder = embedder.eval()
        self.plain = peers.plain_conv4(embedder)
        self.trainer = ProtoNetTrainer(embedder).eval()
        self.bank = self.trainer.bank(dataset)
        self.labels = dataset.labels.tolist()
        self.floats = dataset.floats(torch.arange(len(dataset)))
        self.in_memory = peers.InMemory(self.floats, self.labels)
        self.size = f"{len(dataset):,} images of {' x '.join(map(str, dataset.item_shape[1:]))}"

    def ours_and_easyfsl(self, counts: Counts) -> dict[str, Callable[[], Any]]:
        """Returns ours and easyfsl, from images and from ready embeddings."""
        evaluator = EpisodicEvaluator(SPEC, counts.episodes)
        features = peers.easyfsl_features(self.bank, self.labels, self.dataset.class_names)
        images, of_features, workers = counts.peer_episodes, counts.peer_feature_episodes, counts.workers
        return {
            "ours": lambda: evaluator.evaluate(self.trainer, self.dataset),
            "easyfsl": peers.easyfsl_episodes(self.in_memory, self.plain, SPEC, images, workers),
            f"easyfsl, {OURS}": peers.easyfsl_episodes(self.in_memory, self.embedder, SPEC, images, workers),
            "ours, bank": lambda: evaluator.evaluate(self.trainer, self.dataset, self.bank),
            "easyfsl, features": peers.easyfsl_episodes(features, nn.Identity(), SPEC, of_features, workers),
        }

    def other_peers(self, counts: Counts) -> dict[str, Callable[[], Any]]:
        """Returns the peers that run on small images only, and our retrieval."""
        dataset, episodes = self.dataset, counts.peer_episodes
        by_class = [self.floats[dataset.labels == c] for c in range(len(dataset.class_names))]
        names = [dataset.class_names[label] for label in self.labels]
        generator = torch.Generator().manual_seed(0)
        return {
            SNELL: lambda: peers.snell_way(self.plain, by_class, SPEC, episodes, generator),
            f"{SNELL}, {OURS}": lambda: peers.snell_way(self.embedder, by_class, SPEC, episodes, generator),
            LEARN2LEARN: lambda: peers.learn2learn_way(self.plain, self.in_memory, SPEC, episodes, generator),
            "easyfsl, embedding": peers.easyfsl_embedding(self.plain, self.floats, names),
            "our retrieval": lambda: RetrievalTester().test(EmbeddingBank(self.trainer.bank(dataset), dataset.labels)),
            "PML's tester": peers.pml_retrieval(self.plain, self.in_memory),
        }

    def images_row(self, peer: str, seconds: Mapping[str, float], counts: Counts, wanted: str = "") -> Row:
        what = f"{self.size} to the interval of {counts.episodes:,} episodes"
        theirs = counts.peer_episodes / seconds[peer]
        return Row(
            what, counts.episodes / seconds["ours"], f"{peer}, {counts.peer_episodes:,} episodes", theirs, wanted
        )

    def bank_row(self, seconds: Mapping[str, float], counts: Counts, wanted: str) -> Row:
        what = f"{counts.episodes:,} episodes from a ready {self.bank.shape[1]:,}-d bank"
        theirs = counts.peer_feature_episodes / seconds["easyfsl, features"]
        peer = f"easyfsl from its FeaturesDataset, {counts.peer_feature_episodes:,} episodes"
        return Row(what, counts.episodes / seconds["ours, bank"], peer, theirs, wanted)


def check_episodic(subject: Subject, first: Mapping[str, Any], counts: Counts) -> None:
    """Checks the accuracies of all peers that evaluate on episodes, and prints them."""
    counted = {peer: counts.peer_episodes for peer in ("easyfsl", SNELL, LEARN2LEARN) if peer in first}
    counted["easyfsl, features"] = counts.peer_feature_episodes
    for peer, episodes in counted.items():
        check_accuracy(peer, first[peer], episodes, first["ours"])
    theirs = "; ".join(f"{peer} {100 * first[peer]:.2f} % ({n:,} episodes)" for peer, n in counted.items())
    print(f"- accuracies agree on {subject.size}: ours {first['ours']}; {theirs}")


def compare_small(subject: Subject, counts: Counts) -> list[Row]:
    """Lines A and B: small images, and their embeddings."""
    contenders = subject.ours_and_easyfsl(counts) | subject.other_peers(counts)
    first = {name: action() for name, action in contenders.items()}
    check_episodic(subject, first, counts)
    check_equal("PML's tester", first["PML's tester"], first["our retrieval"])
    torch.testing.assert_close(first["easyfsl, embedding"].embeddings, subject.bank, rtol=1e-3, atol=1e-4)

    seconds = median_seconds(contenders, counts.repeats)
    scale = counts.episodes / counts.peer_feature_episodes
    total = seconds["easyfsl, embedding"] + seconds["easyfsl, features"] * scale
    peer = f"easyfsl's features path, episodes extrapolated from {counts.peer_feature_episodes:,}"
    retrieval = f"{subject.size} to P@1, R-precision and MAP@R"
    return [
        subject.images_row("easyfsl", seconds, counts, "200"),
        subject.images_row(SNELL, seconds, counts, "200"),
        subject.images_row(f"easyfsl, {OURS}", seconds, counts),
        subject.images_row(f"{SNELL}, {OURS}", seconds, counts),
        subject.images_row(LEARN2LEARN, seconds, counts),
        Row(retrieval, seconds["our retrieval"], "PML's GlobalEmbeddingSpaceTester", seconds["PML's tester"], "", "s"),
        subject.bank_row(seconds, counts, "60, and ours 90,000 episodes/s"),
        Row(f"{subject.size}, embedded, and {counts.episodes:,} episodes", seconds["ours"], peer, total, "10", "s"),
    ]


def compare_large(subject: Subject, counts: Counts) -> list[Row]:
    """Lines C: large images, and their embeddings."""
    contenders = subject.ours_and_easyfsl(counts)
    check_episodic(subject, {name: action() for name, action in contenders.items()}, counts)
    seconds = median_seconds(contenders, counts.repeats)
    return [
        subject.images_row("easyfsl", seconds, counts, "120"),
        subject.images_row(f"easyfsl, {OURS}", seconds, counts),
        subject.bank_row(seconds, counts, "9, at best 15"),
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def main(
    data_root: Path,
    repeats: int = 5,
    episodes: int = 10_000,
    peer_episodes: int = 100,
    peer_feature_episodes: int = 1_000,
    peer_episodes_84: int = 20,
    images_84: int = 600,
    workers: int = 0,
    embedder: Path | None = None,
    system_allocator: bool = False,
) -> None:
    """Prints the table.

    Args:
        data_root: folder of Omniglot.
        repeats: rounds in which the contenders take turns.
        episodes: episodes that ours evaluates on.
        peer_episodes: episodes that a peer evaluates on, from small images.
        peer_feature_episodes: episodes that easyfsl evaluates on, from ready embeddings.
        peer_episodes_84: episodes that easyfsl evaluates on, from 84 x 84 images.
        images_84: random 84 x 84 images in each of 20 classes.
        workers: workers of easyfsl's data loader; starting them counts as its time, so give it more episodes then.
        embedder: exported Conv4 for Omniglot; untrained weights from seed 0 when None.
        system_allocator: leave glibc's allocator as it is, as the peers' users have it.
    """
    allocator_set = keep_freed_memory() if not system_allocator else False
    torch.manual_seed(0)
    small, large = Embedder(Conv4(in_channels=1)), Embedder(Conv4(in_channels=3))
    if embedder is not None:
        load_embedder(embedder, small)
    counts = Counts(repeats, episodes, peer_episodes, peer_feature_episodes, workers)
    own = f"{SPEC}; ours evaluates on {episodes:,} episodes; medians of {repeats} rounds; "
    own += f"{workers} loader workers for easyfsl; allocator keeps freed memory: {'yes' if allocator_set else 'no'}"
    print("\n".join(f"- {line}" for line in (*conditions(PACKAGES), own, *peers.NOTES)))
    with patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):  # no bars, ours or a peer's
        rows = compare_small(Subject(characters(data_root), small), counts)
        counts_84 = replace(counts, peer_episodes=peer_episodes_84)
        rows += compare_large(Subject(random_images(20, images_84, size=84, channels=3), large), counts_84)
    print("\n| what | ours | peer | peer's figure | ratio | wanted |\n|---|---|---|---|---|---|")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    tyro.cli(main)
