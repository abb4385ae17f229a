"""ProtoNet on miniImageNet, Ravi-Larochelle split, compared with Snell et al. 2017.

    python -m experiments.mini_imagenet_protonet --data-root ../shared/data

Results are in docs/results, from `python -m experiments.reproduce_papers --only mini_imagenet/protonet`, with 150 of
the 600 images of each class. The paper's table 2 reports 49.42 +- 0.78 % at 5-way 1-shot (30-way training) and 68.20 +-
0.66 % at 5-way 5-shot (20-way training), with all images.

Unlike in the paper, the squared distance is scaled by 0.05 in the softmax: with 1,600 dimensions it starts in the
hundreds, where the unscaled softmax is one-hot and learns slowly (2,000 steps without the scale: 35.6 / 53.6 %). Each
episode's images are used for two episodes (`support_rotations`), and the learning rate follows a cosine decay.
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
    load_mini_imagenet,
    main,
)

CONFIG = ExperimentConfig(
    name="mini_imagenet_protonet",
    published={"Snell et al. 2017": {"5-way 1-shot": "49.42 +- 0.78", "5-way 5-shot": "68.20 +- 0.66"}},
    data=load_mini_imagenet,
    trainer=partial(
        ProtoNetTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=3)),
        loss=partial(PrototypicalLoss, distance=partial(LpDistance, normalize_embeddings=False, power=2), scale=0.05),
        miner=None,
        support_rotations=2,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(degrees=0, scale=0.1, shear=0, translate=0.05, flip=True),
    train_spec=EpisodeSpec(ways=20, shots=5, queries=5),  # fewer queries than the paper's 15: more steps in an hour
    eval_specs=(EpisodeSpec(ways=5, shots=1, queries=15), EpisodeSpec(ways=5, shots=5, queries=15)),
    steps=1_800,
    validate_every=200,
)

if __name__ == "__main__":
    main(CONFIG)
