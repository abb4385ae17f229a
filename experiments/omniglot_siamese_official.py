"""Siamese networks on Omniglot's official split, 28 x 28: all 659 evaluation characters at once, and ten look-alikes.

python -m experiments.omniglot_siamese_official --data-root ../shared/data
"""

from dataclasses import replace
from functools import partial

from experiments import omniglot_siamese
from pml_fewshot import (
    EpisodeSpec,
    ExperimentConfig,
    ResultTable,
    SiameseTrainer,
    Splits,
    benchmark,
    load_omniglot,
    main,
)


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
    data=partial(load_omniglot, split="official", rotations=False),
    train_on_validation=False,
    steps=3_500,
    judge_more=judge_characters,
)

if __name__ == "__main__":
    main(CONFIG)
