"""ProtoNet on Omniglot, Vinyals split. Snell et al. 2017, table 1: 98.8 / 99.7 / 96.0 % at 5-way 1-shot, 5-way 5-shot
and 20-way 1-shot. Measured: to be filled in by the first full run.

    python -m experiments.omniglot_protonet --data-root ../shared/data
    python -m experiments.omniglot_protonet --steps 200 --seed 3

Trained on the training and validation characters, as in the paper. Unlike the paper: each episode's images make six
episodes (`turns`), half of the images are a little distorted, and the learning rate falls along a cosine.
"""

from functools import partial

from pytorch_metric_learning.distances import LpDistance
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pml_fewshot import (
    Conv4,
    Embedder,
    EpisodeSpec,
    ExperimentConfig,
    ProtoNetTrainer,
    PrototypicalLoss,
    RandomAffine,
    load_omniglot,
    main,
)

CONFIG = ExperimentConfig(
    name="omniglot_protonet",
    data=partial(load_omniglot, split="vinyals", rotations=True),
    trainer=partial(
        ProtoNetTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1)),
        loss=partial(PrototypicalLoss, distance=partial(LpDistance, normalize_embeddings=False, power=2)),  # swap here
        miner=None,
        turns=6,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=60, shots=1, queries=5),  # more ways than at test, as in the paper
    eval_specs=(EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15), EpisodeSpec(20, 1, 15), EpisodeSpec(20, 5, 15)),
    train_on_validation=True,
    steps=16_000,
)

if __name__ == "__main__":
    main(CONFIG)
