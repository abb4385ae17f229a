"""This library's strongest recipe for Omniglot, inductive; Vinyals split, 28 x 28.

    python -m experiments.omniglot_strongest --data-root ../shared/data
    python -m experiments.omniglot_strongest --steps 200 --seed 3

Results are in docs/results, from `python -m experiments.reproduce_papers --only omniglot/strongest`.

It consists of pytorch-metric-learning's NT-Xent loss with a learned temperature, on batches of 60 classes with 6 images
each, in which every image is compared with the other 359; a Conv4 whose blocks get wider as their maps get smaller,
without its final ReLU; mirror images of the rotated characters as separate classes, in training; half of the images
slightly distorted and bent (RandomWarp); Adam with cosine decay; and at test time the concatenated embeddings of an
image, its quarter turns and their mirror images, each the mean over shifts by a pixel (DihedralViews), which turns one
network into eight.

Chosen on the validation characters: `python -m experiments.omniglot_recipes` shows what each part contributes.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from pytorch_metric_learning.distances import CosineSimilarity
from torch.optim import Adam

from pml_fewshot import (
    Conv4,
    DenseNTXentLoss,
    DihedralViews,
    Embedder,
    MetricTrainer,
    RandomWarp,
    Splits,
    load_omniglot,
    main,
)

from . import omniglot_metric


def load_mirrored(root: Path) -> Splits:
    """Loads the Vinyals split, with the mirror images of characters to train on as additional classes."""
    splits = load_omniglot(root, split="vinyals", rotations=True)
    val = None if splits.val is None else splits.val.with_mirrors_as_classes()
    return Splits(splits.train.with_mirrors_as_classes(), val, splits.test)


CONFIG = replace(
    omniglot_metric.CONFIG,
    name="omniglot_strongest",
    published={
        "Antoniou et al. 2019, MAML++": {
            "5-way 1-shot": "99.47",
            "5-way 5-shot": "99.85",
            "20-way 1-shot": "97.65",
            "20-way 5-shot": "99.33",
        }
    },
    data=load_mirrored,
    trainer=partial(
        MetricTrainer,
        embedder=partial(
            Embedder,
            trunk=partial(
                DihedralViews,
                trunk=partial(Conv4, in_channels=1, channels=(32, 64, 128, 256), last_relu=False),
                shift=1,
            ),
        ),
        loss=partial(DenseNTXentLoss, temperature=0.1, learn_temperature=True, distance=CosineSimilarity),
    ),
    optimizer=partial(Adam, lr=3e-3),
    augment=RandomWarp(probability=0.5),
    steps=24_000,
)

if __name__ == "__main__":
    main(CONFIG)
