"""evaluate: the result table of an experiment."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    """Returns the table of a trained experiment: test episodes, retrieval and extra evaluations."""
    table = benchmark(
        {config.name: trainer},
        splits,
        config.eval_specs,
        tester,
        config.num_episodes,
        config.eval_seed,
        timed=False,  # a repeated run writes the same files
        note="; ".join(notes_on_training(config, trainer, history)),
    )
    if config.extra_evaluations is not None:
        with eval_mode(trainer):
            table.rows += config.extra_evaluations(trainer, splits, config).rows
    return table


def notes_on_training(config: ExperimentConfig, trainer: FewShotTrainer, history: History) -> list[str]:
    """What a reader of any figure must know about the training."""
    notes = ["trained on train and val classes"] if config.train_on_validation else []
    if history.processes > 1:
        embedder = trainer.embedder or nn.Identity()
        normalizes = any(isinstance(module, _BatchNorm) for module in embedder.modules())
        statistics = ", batch norm over " + ("all of them" if config.sync_batch_norm else "the share of each")
        notes.append(f"trained by {history.processes} processes{statistics if normalizes else ''}")
    if history.skipped:
        notes.append(f"{history.skipped:,} of {history.steps:,} training steps skipped")
    return notes
