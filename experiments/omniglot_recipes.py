"""Ablation of the strongest recipe for Omniglot: one part changed at a time, in one table with the best first.

    python -m experiments.omniglot_recipes --data-root ../shared/data
    python -m experiments.omniglot_recipes --data-root ../shared/data --steps 100 --only "strongest recipe" "last ReLU"

Trained on the training characters of the Vinyals split and evaluated on its validation characters, so that nothing is
chosen on the test characters. After an interruption the same command continues. All variants have the same number of
steps, of 360 images each.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch.optim import Adam

from pml_fewshot import (
    Conv4,
    DenseNTXentLoss,
    DihedralViews,
    Embedder,
    ExperimentConfig,
    PrototypicalLoss,
    RandomAffine,
    RandomWarp,
    Splits,
    load_omniglot,
    swap,
)
from pml_fewshot.experiment.sweep import sweep_main

from . import omniglot_protonet, omniglot_strongest


def load_plain(root: Path) -> Splits:
    """Loads the training characters, and the validation characters in place of the test characters."""
    splits = load_omniglot(root, split="vinyals", rotations=True)
    return Splits(splits.train, splits.val, None)  # type: ignore[arg-type]


def load_mirrored(root: Path) -> Splits:
    """Loads the same, with the mirror images of training characters as additional classes."""
    splits = load_plain(root)
    return Splits(splits.train.with_mirrors_as_classes(), splits.val, None)  # type: ignore[arg-type]


def embedder(trunk: "partial[Conv4]") -> "partial[Embedder]":
    return partial(Embedder, trunk=partial(DihedralViews, trunk=trunk, shift=1))


TRUNK = partial(Conv4, in_channels=1, channels=(32, 64, 128, 256), last_relu=False)
BUDGET = {"train_on_validation": False, "steps": 700, "num_episodes": 4_000, "retrieval": None, "published": None}
CONFIG = replace(omniglot_strongest.CONFIG, name="omniglot_recipes", data=load_mirrored, **BUDGET)  # type: ignore[arg-type]
PROTONET = replace(omniglot_protonet.CONFIG, data=load_plain, **BUDGET)  # type: ignore[arg-type]
EUCLID = partial(LpDistance, normalize_embeddings=False, power=2)


def changed(name: str, **parts: object) -> ExperimentConfig:
    return swap(CONFIG, name=name, **parts)


CONFIGS = [
    replace(CONFIG, name="strongest recipe"),
    replace(CONFIG, name="no mirror images", data=load_plain),
    replace(CONFIG, name="stronger distortions", augment=RandomWarp(16, 0.16, 8, 0.08, probability=0.7, warp=0.06)),
    replace(CONFIG, name="distortions that do not bend", augment=RandomAffine(probability=0.5)),
    replace(CONFIG, name="no distortions", augment=None),
    replace(CONFIG, name="learning rate 0.001", optimizer=partial(Adam, lr=1e-3)),
    changed("no views at test time", embedder=partial(Embedder, trunk=TRUNK)),
    changed("no shifts at test time", embedder=partial(Embedder, trunk=partial(DihedralViews, trunk=TRUNK))),
    changed("64 filters in all blocks", embedder=embedder(partial(TRUNK, channels=64))),
    changed("last ReLU", embedder=embedder(partial(TRUNK, last_relu=True))),
    changed("temperature 0.1", loss=partial(DenseNTXentLoss, temperature=0.1, distance=CosineSimilarity)),
    changed(
        "Multi-Similarity",
        loss=partial(MultiSimilarityLoss, alpha=2, beta=50, base=0.5, distance=CosineSimilarity),
        miner=partial(MultiSimilarityMiner, epsilon=0.1, distance=CosineSimilarity),
    ),
    replace(PROTONET, name="ProtoNet, length 1, learned scale"),
    swap(
        PROTONET,
        name="ProtoNet, learned scale",
        loss=partial(PrototypicalLoss, distance=EUCLID, scale=0.1, learn_scale=True),
    ),
    swap(
        PROTONET,
        name="ProtoNet as in the paper",
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1)),
        loss=partial(PrototypicalLoss, distance=EUCLID),
    ),
]

if __name__ == "__main__":
    sweep_main(CONFIG.name, CONFIGS)
