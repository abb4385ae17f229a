"""Siamese networks on Omniglot's official split, 28 x 28: all 659 evaluation characters at once, and ten look-alikes.

    python -m experiments.omniglot_siamese_official --data-root ../shared/data

Measured, seed 0, 95 % intervals, 5,000 steps in 16.3 minutes on one to two CPU cores:

    all 659 characters at once, 5 shots  75.23 +- 0.18  (20 episodes of 9,885 queries; a published walk-through: 15)
    the first ten characters, 5 shots    85.63 +- 0.04  (10,000 episodes; that walk-through: 70)
    5-way 1-shot   97.69 +- 0.07         P@1          75.57 +- 0.73
    5-way 5-shot   99.28 +- 0.03         R-precision  51.30 +- 0.39
    20-way 1-shot  92.52 +- 0.07         MAP@R        40.97 +- 0.44
    20-way 5-shot  97.52 +- 0.03         (10,000 episodes of all 659 characters; 13,180 images among themselves)

The goal was 80 % of all characters and 90 % of the ten: not reached. Each training character counts as four classes,
turned by 0 to 270 degrees. Without them (3,500 steps) it is 65.2 and 80.7 %; with a linear layer to 128 dimensions
behind the trunk (2,500 steps) 62.9 and 79.5 %; with every image distorted (3,600 steps) 70.7 and 79.4 %. Of
the 75.2 % network, other heads by the same similarity have 77.1 % (nearest prototype) and 69.0 % (best pair) of all
characters, and prototypes by squared Euclid 81.0 and 87.2 %.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments import omniglot_siamese
from pml_fewshot import (
    Conv4,
    Embedder,
    EpisodeSpec,
    ExperimentConfig,
    PairVerificationLoss,
    ResultTable,
    SiameseTrainer,
    Splits,
    WeightedL1Similarity,
    benchmark,
    load_omniglot,
    main,
    soft_nearest_neighbour,
)


def rotated_for_training(root: Path) -> Splits:
    """The official split; each training character turned by 0, 90, 180 and 270 degrees makes four classes."""
    splits = load_omniglot(root, split="official", rotations=False)
    return Splits(splits.train.rotated(), None, splits.test)


def judge_characters(
    trainer: SiameseTrainer, splits: Splits, config: ExperimentConfig, of_all: int = 20, of_ten: int = 10_000
) -> ResultTable:
    """All evaluation characters at once with 5 shots, and the first ten of them, of one alphabet, with 5 shots.

    An episode of all of them is 9,885 queries: each character's 20 drawings are its 5 shots and 15 queries.
    """
    everything, first_ten = splits.test, splits.test.of_classes(range(10))
    table = ResultTable()
    for name, characters, most in (("all characters", everything, of_all), ("first ten characters", first_ten, of_ten)):
        specs = [EpisodeSpec(len(characters.class_names), 5, 15)]
        episodes = min(most, config.num_episodes)
        table.rows += benchmark({name: trainer}, characters, specs, None, episodes, config.seed, timed=False).rows
    return table


CONFIG = replace(
    omniglot_siamese.CONFIG,
    name="omniglot_siamese_official",
    data=rotated_for_training,
    trainer=partial(
        SiameseTrainer,
        embedder=partial(Embedder, trunk=partial(Conv4, in_channels=1, last_relu=False)),
        # a small MLP in place of the weighted sum, which has 75 % of all characters where this has 81
        loss=partial(
            PairVerificationLoss,
            distance=partial(WeightedL1Similarity, hidden=64),
            balanced=False,
            negative_weight=1 / 3,
        ),
        head=soft_nearest_neighbour,
    ),
    train_on_validation=False,
    steps=6_000,
    judge_more=judge_characters,
)

if __name__ == "__main__":
    main(CONFIG)
