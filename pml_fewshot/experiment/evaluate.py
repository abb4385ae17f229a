"""evaluate: the table of an experiment."""

from pml_fewshot.data.dataset import Splits
from pml_fewshot.embedders.modes import eval_mode
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.state import History


def evaluate(
    config: ExperimentConfig,
    trainer: FewShotTrainer,
    splits: Splits,
    tester: RetrievalTester | None,
    history: History,
) -> ResultTable:
    """The table of a trained experiment: its test episodes, retrieval and extra evaluations."""
    table = benchmark(
        {config.name: trainer},
        splits,
        config.eval_specs,
        tester,
        config.num_episodes,
        config.eval_seed,
        timed=False,  # a run that is repeated gives the same files
        note="; ".join(notes_on_training(config, history)),
    )
    if config.extra_evaluations is not None:
        with eval_mode(trainer):
            table.rows += config.extra_evaluations(trainer, splits, config).rows
    return table


def notes_on_training(config: ExperimentConfig, history: History) -> list[str]:
    """What a reader of any figure must know of the training."""
    notes = ["trained on train and val classes"] if config.train_on_validation else []
    if history.skipped:
        notes.append(f"{history.skipped:,} of {history.steps:,} training steps skipped")
    return notes
