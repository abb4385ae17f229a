"""MAML on miniImageNet, 5-way 1-shot, Ravi-Larochelle split. Finn et al. 2017, table 1: 48.70 % with all 600 images of
each class (transductive batch norm).

    python -m experiments.mini_imagenet_maml --data-root ../shared/data
"""

from functools import partial

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.omniglot_maml import judge_inductive
from pml_fewshot import Conv4, EpisodeSpec, ExperimentConfig, MAMLTrainer, RandomAffine, load_mini_imagenet, main

CONFIG = ExperimentConfig(
    name="mini_imagenet_maml",
    data=load_mini_imagenet,
    trainer=partial(
        MAMLTrainer,
        # 32 filters as in the paper, against overfitting: 800-d
        network=partial(nn.Sequential, partial(Conv4, in_channels=3, channels=32), partial(nn.Linear, 800, 5)),
        inner_lr=0.01,
        inner_steps=5,
        eval_inner_steps=10,
        learn_inner_lr="per_layer",
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(degrees=0, scale=0.1, shear=0, translate=0.05, flip=True),
    train_spec=EpisodeSpec(ways=5, shots=1, queries=5),
    tasks=4,
    eval_specs=(EpisodeSpec(5, 1, 15),),
    num_episodes=1_000,
    val_episodes=300,
    steps=2_000,
    validate_every=500,
    retrieval=None,
    judge_more=judge_inductive,
)

if __name__ == "__main__":
    main(CONFIG)
