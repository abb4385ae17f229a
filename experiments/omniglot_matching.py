"""Matching networks with cosine on Omniglot, Vinyals split. Vinyals et al. 2016 (table 1): 98.1 % at 5-way 1-shot.

python -m experiments.omniglot_matching --data-root ../shared/data
python -m experiments.omniglot_matching --steps 200 --seed 3
"""

from functools import partial

from pytorch_metric_learning.distances import CosineSimilarity
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pml_fewshot import (
    Conv4,
    Embedder,
    EpisodeSpec,
    ExperimentConfig,
    MatchingLoss,
    MatchingTrainer,
    RandomAffine,
    load_omniglot,
    main,
)

CONFIG = ExperimentConfig(
    name="omniglot_matching",
    data=partial(load_omniglot, split="vinyals", rotations=True),
    trainer=partial(
        MatchingTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1)),
        loss=partial(MatchingLoss, distance=CosineSimilarity, scale=10.0, learn_scale=True),  # swap here
        miner=None,
        turns=6,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=60, shots=1, queries=5),
    eval_specs=(EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15), EpisodeSpec(20, 1, 15), EpisodeSpec(20, 5, 15)),
    train_on_validation=True,
    steps=6_000,
)

if __name__ == "__main__":
    main(CONFIG)
