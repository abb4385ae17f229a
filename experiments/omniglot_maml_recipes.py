"""Ablation of MAML on Omniglot: one part changed at a time, in one table with the best first.

    python -m experiments.omniglot_maml_recipes --data-root ../shared/data
    python -m experiments.omniglot_maml_recipes --data-root ../shared/data --steps 100 --only "first order" "two shots"

As in `omniglot_recipes`, trained on the training characters and evaluated on the validation characters, and after an
interruption the same command continues. The base has no second derivatives, which saves a third to a half of the time.
"""

from dataclasses import replace
from functools import partial

from torch import nn

from pml_fewshot import Conv4, EpisodeSpec, RandomWarp, swap
from pml_fewshot.experiment.sweep import sweep_main

from .omniglot_maml import CONFIG as MAML
from .omniglot_maml import PrototypeHead
from .omniglot_recipes import load_mirrored, load_plain

CONFIG = swap(
    replace(
        MAML,
        data=load_mirrored,
        train_on_validation=False,
        steps=1_000,
        num_episodes=4_000,
        extra_evaluations=None,
        published=None,
    ),
    name="omniglot_maml_recipes",
    first_order=True,
)
NARROW = partial(
    nn.Sequential,
    partial(Conv4, in_channels=1, channels=64, last_relu=False),
    partial(PrototypeHead, dim=64, ways=120),
)

CONFIGS = [
    replace(CONFIG, name="first order"),
    replace(CONFIG, name="no mirror images", data=load_plain),
    replace(CONFIG, name="bent images", augment=RandomWarp(probability=0.5)),
    replace(CONFIG, name="two shots", train_spec=EpisodeSpec(ways=120, shots=2, queries=2)),
    replace(CONFIG, name="five shots, 60 ways", train_spec=EpisodeSpec(ways=60, shots=5, queries=2)),
    replace(CONFIG, name="exponential average of the weights", ema=0.99),
    swap(CONFIG, name="three inner steps at test time", eval_inner_steps=3),
    swap(CONFIG, name="64 filters in all blocks", network=NARROW),
]

if __name__ == "__main__":
    sweep_main(CONFIG.name, CONFIGS)
