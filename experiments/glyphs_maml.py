"""MAML on the built-in glyphs: train on Latin and Cyrillic letters, adapt to Greek ones, in minutes on a laptop.

python -m experiments.glyphs_maml
"""

from functools import partial

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pml_fewshot import (
    Conv4,
    EpisodeSpec,
    ExperimentConfig,
    MAMLTrainer,
    RandomAffine,
    ResultTable,
    Splits,
    benchmark,
    load_glyphs,
    main,
)


def judge_inductive(trainer: MAMLTrainer, splits: Splits, config: ExperimentConfig) -> ResultTable:
    """The same weights on the same episodes, with batch norm by the support set's statistics alone."""
    methods = {f"{config.name}, inductive": trainer.with_batch_norm("inductive")}
    return benchmark(methods, splits.test, config.eval_specs, None, config.num_episodes, config.seed, timed=False)


CONFIG = ExperimentConfig(
    name="glyphs_maml",
    data=load_glyphs,
    trainer=partial(
        MAMLTrainer,
        network=partial(nn.Sequential, partial(Conv4, in_channels=1), partial(nn.Linear, 64, 5)),
        inner_lr=0.4,
        inner_steps=1,
        eval_inner_steps=3,
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(),
    train_spec=EpisodeSpec(ways=5, shots=1, queries=5),
    tasks=16,
    eval_specs=(EpisodeSpec(5, 1, 15),),
    steps=600,
    validate_every=200,
    retrieval=None,
    judge_more=judge_inductive,
)

if __name__ == "__main__":
    main(CONFIG)
