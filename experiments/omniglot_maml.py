"""MAML on Omniglot, Vinyals split, one network for 5 and 20 ways, compared with Finn et al. 2017, table 1.

    python -m experiments.omniglot_maml --data-root ../shared/data
    python -m experiments.omniglot_maml --steps 100 --seed 3

Results are in docs/results, from `python -m experiments.reproduce_papers --only omniglot/maml`.

Trained on the training and validation characters. The paper has one network per episode size, each trained for 60,000
steps of 16 or 32 tasks. Here one network is trained for 4,000 steps of one 120-way task: more ways than at test time
help, as Snell et al. 2017 found for prototypical networks. One inner step turns its last layer into a classifier by
class means (`PrototypeHead`), its inner learning rates are learned too, one per layer (Antoniou et al. 2019, MAML++),
half of the images are slightly distorted, and the learning rate follows a cosine decay. The trunk gets wider as its
maps get smaller, which takes a tenth longer than 64 filters in every block, and mirror images are trained on as
separate characters.
"""

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
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
    main,
)

from .omniglot_strongest import load_mirrored


def evaluate_by(config: ExperimentConfig, name: str, trainer: MAMLTrainer, splits: Splits) -> ResultTable:
    """Evaluates a trainer on the episodes of a config; MAML has no embeddings to retrieve by."""
    note = "trained on train and val classes" if config.train_on_validation else ""
    sizes = config.eval_specs, None, config.num_episodes, config.eval_seed
    return benchmark({name: trainer}, splits, *sizes, timed=False, note=note)


def evaluate_inductive(trainer: MAMLTrainer, splits: Splits, config: ExperimentConfig) -> ResultTable:
    """Evaluates the same weights on the same episodes, with batch norm by the support set's statistics."""
    return evaluate_by(config, f"{config.name}, inductive", trainer.with_batch_norm("inductive"), splits)


class PrototypeHead(nn.Linear):
    """A linear layer that one inner step turns into a nearest-class-mean classifier; learning continues from there.

    For embeddings x of norm 12.5, weights w and biases b, the logits are w . x - 5 |w|^2 + b. The weights start at zero
    and the biases at -8, as if every class were rare. A step of `one_against_all` at a learning rate of 0.1 then makes
    w a tenth of the mean of the class's support embeddings, and the logits -0.05 |x - mean|^2, for any number of ways
    and shots, up to a number shared by all classes and 0.03 % of the sum of all means. A head with random initial
    weights has to unlearn them first. While the weights are zero, the inner gradient of the trunk is zero too: the
    first inner steps of training change only the head.

    Source: Triantafillou et al. 2020, "Meta-Dataset" (Proto-MAML), which sets such weights directly.
    """

    def __init__(self, dim: int, ways: int) -> None:
        super().__init__(dim, ways)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, -8.0)

    def forward(self, embeddings: Tensor) -> Tensor:
        return super().forward(12.5 * F.normalize(embeddings, dim=1)) - 5 * self.weight.square().sum(dim=1)


def one_against_all(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every class, averaged over the shots and summed over the ways.

    A class's step is equally long for any number of ways, and does not depend on the other classes while their
    probability is low.
    """
    ways = logits.shape[1]
    targets = F.one_hot(labels, ways).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") * ways / len(labels)


def evaluate_more(trainer: MAMLTrainer, splits: Splits, config: ExperimentConfig) -> ResultTable:
    """Also evaluates 20 ways on a fifth of the episodes, at 0.1 s each, and every size with inductive batch norm."""
    fewer = replace(
        config,
        eval_specs=tuple(EpisodeSpec(ways=20, shots=shots, queries=15) for shots in (1, 5)),
        num_episodes=max(2, config.num_episodes // 5),
    )
    transductive = evaluate_by(fewer, config.name, trainer, splits)
    inductive = [evaluate_inductive(trainer, splits, each) for each in (config, fewer)]
    return ResultTable([row for table in (transductive, *inductive) for row in table.rows])


CONFIG = ExperimentConfig(
    name="omniglot_maml",
    published={
        "Finn et al. 2017": {
            "5-way 1-shot": "98.7",
            "5-way 5-shot": "99.9",
            "20-way 1-shot": "95.8",
            "20-way 5-shot": "98.9",
        }
    },
    data=load_mirrored,
    trainer=partial(
        MAMLTrainer,
        network=partial(
            nn.Sequential,
            partial(Conv4, in_channels=1, channels=(32, 64, 128, 256), last_relu=False),
            partial(PrototypeHead, dim=256, ways=120),
        ),
        inner_lr=0.1,
        inner_loss=one_against_all,
        inner_steps=1,
        learn_inner_lr="per_layer",
    ),
    optimizer=partial(Adam, lr=3e-3),
    scheduler=CosineAnnealingLR,
    augment=RandomAffine(probability=0.5),
    train_spec=EpisodeSpec(ways=120, shots=1, queries=2),
    eval_specs=tuple(EpisodeSpec(ways=5, shots=shots, queries=15) for shots in (1, 5)),
    train_on_validation=True,
    steps=4_000,
    retrieval=None,
    extra_evaluations=evaluate_more,
)

if __name__ == "__main__":
    main(CONFIG)
