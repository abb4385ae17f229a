"""ProtoNet on Omniglot, Vinyals split, compared with Snell et al. 2017, table 1.

    python -m experiments.omniglot_protonet --data-root ../shared/data
    python -m experiments.omniglot_protonet --steps 200 --seed 3

Results are in docs/results, from `python -m experiments.reproduce_papers --only omniglot/protonet`.

Trained on the training and validation characters, as in the paper. Unlike in the paper, embeddings are L2-normalized
before the squared distance, which has a learned scale, and the trunk has no final ReLU; each episode's images are used
for six episodes (`support_rotations`); half of the images are slightly distorted; and the learning rate follows a
cosine decay. `python -m experiments.omniglot_recipes` shows what the first two contribute.
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
    published={
        "Snell et al. 2017": {
            "5-way 1-shot": "98.8",
            "5-way 5-shot": "99.7",
            "20-way 1-shot": "96.0",
            "20-way 5-shot": "98.9",
        }
    },
    data=partial(load_omniglot, split="vinyals", rotations=True),
    trainer=partial(
        ProtoNetTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1, last_relu=False)),
        loss=partial(  # swap here
            PrototypicalLoss,
            distance=partial(LpDistance, normalize_embeddings=True, power=2),
            scale=5.0,
            learn_scale=True,
        ),
        miner=None,
        support_rotations=6,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=60, shots=1, queries=5),  # more ways than at test, as in the paper
    eval_specs=tuple(EpisodeSpec(ways=ways, shots=shots, queries=15) for ways in (5, 20) for shots in (1, 5)),
    train_on_validation=True,
    steps=8_000,
)

if __name__ == "__main__":
    main(CONFIG)
