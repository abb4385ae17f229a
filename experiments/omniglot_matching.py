"""Matching networks with cosine on Omniglot, Vinyals split, compared with Vinyals et al. 2016, table 1.

    python -m experiments.omniglot_matching --data-root ../shared/data
    python -m experiments.omniglot_matching --steps 200 --seed 3

Results are in docs/results, from `python -m experiments.reproduce_papers --only omniglot/matching`.

Trained on the training and validation characters. Unlike in the paper, the cosine has a learned scale, because a
softmax over a bounded similarity cannot get sharp; the trunk has no final ReLU, which would make all cosines positive;
and an episode has 60 ways, with its images used for six episodes (`support_rotations`).
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
    published={
        "Vinyals et al. 2016": {
            "5-way 1-shot": "98.1",
            "5-way 5-shot": "98.9",
            "20-way 1-shot": "93.8",
            "20-way 5-shot": "98.5",
        }
    },
    data=partial(load_omniglot, split="vinyals", rotations=True),
    trainer=partial(
        MatchingTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1, last_relu=False)),
        loss=partial(MatchingLoss, distance=CosineSimilarity, scale=10.0, learn_scale=True),  # swap here
        miner=None,
        support_rotations=6,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=60, shots=1, queries=5),
    eval_specs=tuple(EpisodeSpec(ways=ways, shots=shots, queries=15) for ways in (5, 20) for shots in (1, 5)),
    train_on_validation=True,
    steps=4_000,
)

if __name__ == "__main__":
    main(CONFIG)
