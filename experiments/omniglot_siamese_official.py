"""Siamese networks on Omniglot's official split, 28 x 28: all 659 evaluation characters at once, and ten look-alikes.

python -m experiments.omniglot_siamese_official --data-root ../shared/data
"""

from dataclasses import replace
from pathlib import Path

from experiments import omniglot_siamese
from pml_fewshot import EpisodeSpec, ResultTable, SiameseTrainer, Splits, benchmark, load_omniglot, main


def rotated_for_training(root: Path) -> Splits:
    """The official split; each training character turned by 0, 90, 180 and 270 degrees makes four classes."""
    splits = load_omniglot(root, split="official", rotations=False)
    return Splits(splits.train.rotated(), None, splits.test)


def judge_characters(
    trainer: SiameseTrainer, splits: Splits, episodes_of_all: int = 20, episodes_of_ten: int = 10_000
) -> ResultTable:
    """All evaluation characters at once with 5 shots, and the first ten of them, of one alphabet, with 5 shots.

    An episode of all of them is 9,885 queries: each character's 20 drawings are its 5 shots and 15 queries.
    """
    everything, first_ten = splits.test, splits.test.of_classes(range(10))
    specs = [EpisodeSpec(len(everything.class_names), 5, 15)]
    table = benchmark({"all characters at once": trainer}, everything, specs, None, episodes_of_all, timed=False)
    specs = [EpisodeSpec(10, 5, 15)]
    table.rows += benchmark(
        {"first ten characters": trainer}, first_ten, specs, None, episodes_of_ten, timed=False
    ).rows
    return table


CONFIG = replace(
    omniglot_siamese.CONFIG,
    name="omniglot_siamese_official",
    data=rotated_for_training,
    train_on_validation=False,
    steps=5_000,
    judge_more=judge_characters,
)

if __name__ == "__main__":
    main(CONFIG)
