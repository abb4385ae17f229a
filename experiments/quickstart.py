"""ProtoNet on the built-in glyphs: train on Latin and Cyrillic letters, test on Greek ones, in minutes on a laptop.

    python -m experiments.quickstart
    python -m experiments.quickstart --steps 100 --seed 1

Measured on 303 Greek letters (30 of which look like a training letter), 10,000 episodes with 15 queries per class, seed
0, 95 % intervals: 98.45 +- 0.07 at 5-way 1-shot, 99.43 +- 0.05 at 5-way 5-shot, 93.91 +- 0.07 at 20-way 1-shot; P@1
77.57 +- 1.05, MAP@R 46.60 +- 0.71. 600 steps in 1.1 to 1.7 minutes on 2 CPU cores. (Last digits depend on the CPU.)
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
    load_glyphs,
    main,
)

CONFIG = ExperimentConfig(
    name="quickstart",
    data=load_glyphs,
    trainer=partial(
        ProtoNetTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1)),
        loss=partial(PrototypicalLoss, distance=partial(LpDistance, normalize_embeddings=False, power=2)),
        miner=None,
        support_rotations=6,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(),
    train_spec=EpisodeSpec(ways=60, shots=1, queries=5),
    eval_specs=tuple(EpisodeSpec(ways=ways, shots=shots, queries=15) for ways, shots in ((5, 1), (5, 5), (20, 1))),
    steps=600,
    validate_every=200,
)

if __name__ == "__main__":
    main(CONFIG)
