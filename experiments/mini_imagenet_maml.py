"""First-order MAML on miniImageNet, 5-way 1-shot, Ravi-Larochelle split.

    python -m experiments.mini_imagenet_maml --data-root ../shared/data

Finn et al. 2017, table 1, report 48.07 % first order and 48.70 % second order, with all 600 images of each class
(transductive batch norm). Second order takes 3.5 times as long on a CPU, for a difference of half a point in the paper.

Measured on a copy with 150 of the 600 images of each class, 20 unseen classes, 1,000 episodes with 15 queries per
class, 10 inner steps, seed 0, 95 % intervals: 32.94 +- 0.55 transductive, 31.77 +- 0.52 inductive; 2,000 steps of 4
episodes in 64.2 minutes on one busy CPU core. This is only the beginning of training: the validation accuracy was 33.0,
34.8, 36.7 and 37.1 after 500, 1,000, 1,500 and 2,000 steps, and the paper had 60,000 steps.
"""

from functools import partial

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pml_fewshot import Conv4, EpisodeSpec, ExperimentConfig, MAMLTrainer, RandomAffine, load_mini_imagenet, main

from .omniglot_maml import evaluate_inductive

CONFIG = ExperimentConfig(
    name="mini_imagenet_maml",
    published={"Finn et al. 2017, table 1, first order, transductive": {"5-way 1-shot": "48.07 +- 1.75"}},
    data=load_mini_imagenet,
    trainer=partial(
        MAMLTrainer,
        # 32 filters as in the paper, against overfitting: 800-d
        network=partial(nn.Sequential, partial(Conv4, in_channels=3, channels=32), partial(nn.Linear, 800, 5)),
        inner_lr=0.01,
        inner_steps=5,
        eval_inner_steps=10,
        first_order=True,
        learn_inner_lr="per_layer",
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(degrees=0, scale=0.1, shear=0, translate=0.05, flip=True),
    train_spec=EpisodeSpec(ways=5, shots=1, queries=5),
    episodes_per_batch=4,
    eval_specs=(EpisodeSpec(ways=5, shots=1, queries=15),),
    num_episodes=1_000,
    val_episodes=300,
    steps=2_000,
    validate_every=500,
    retrieval=None,
    extra_evaluations=evaluate_inductive,
)

if __name__ == "__main__":
    main(CONFIG)
