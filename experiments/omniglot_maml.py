"""MAML on Omniglot, 5-way 1-shot. Finn et al. 2017, table 1: 98.7 % (transductive batch norm).

python -m experiments.omniglot_maml --data-root ../shared/data
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
    load_omniglot,
    main,
)


def judge_inductive(trainer: MAMLTrainer, splits: Splits, config: ExperimentConfig) -> ResultTable:
    """The same weights on the same episodes, with batch norm by the support set's statistics."""
    methods = {f"{config.name}, inductive": trainer.with_batch_norm("inductive")}
    return benchmark(methods, splits.test, config.eval_specs, None, config.num_episodes, config.seed, timed=False)


CONFIG = ExperimentConfig(
    name="omniglot_maml",
    data=partial(load_omniglot, split="vinyals", rotations=True),
    trainer=partial(
        MAMLTrainer,
        network=partial(nn.Sequential, partial(Conv4, in_channels=1), partial(nn.Linear, 64, 5)),
        inner_lr=0.4,
        inner_steps=1,
        eval_inner_steps=3,
        learn_inner_lr="per_layer",
    ),
    optimizer=partial(Adam, lr=1e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=5, shots=1, queries=5),
    tasks=4,
    eval_specs=(EpisodeSpec(5, 1, 15),),
    train_on_validation=True,
    steps=18_000,
    retrieval=None,
    judge_more=judge_inductive,
)

if __name__ == "__main__":
    main(CONFIG)
