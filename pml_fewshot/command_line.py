"""main(config): an experiment from the command line."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro

from pml_fewshot.batches import BatchSpec
from pml_fewshot.checks import require
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.exit_codes import one_line_errors
from pml_fewshot.experiment import run
from pml_fewshot.experiment_config import Device, ExperimentConfig


@dataclass(frozen=True)
class _EvalSpec:
    """Judge by one spec alone; what is not given is taken from the experiment's first."""

    ways: int | None = None
    """classes in an episode"""
    shots: int | None = None
    """support items of each class"""
    queries: int | None = None
    """query items of each class"""


@dataclass(frozen=True)
class _Options:
    """What may differ between two runs of one experiment; everything else is edited in its file."""

    steps: int
    """training steps"""
    seed: int
    """of weights, training episodes, augmentation and test episodes"""
    device: Device
    """auto: CUDA where there is one"""
    data_root: Path | None
    """folder of the data; PML_FEWSHOT_DATA, else data/, when not given"""
    run_dir: Path | None
    """folder of this run; a new one below runs/ when not given"""
    num_episodes: int
    """test episodes of each spec"""
    resume: bool
    """go on with the run in --run-dir from its last checkpoint"""
    eval_spec: _EvalSpec


@dataclass(frozen=True)
class _EpisodeOptions(_Options):
    """Options of an experiment that trains on episodes."""

    train_spec: EpisodeSpec


@dataclass(frozen=True)
class _BatchOptions(_Options):
    """Options of an experiment that trains on ordinary batches."""

    train_spec: BatchSpec


def main(config: ExperimentConfig) -> ResultTable:
    """Runs the experiment with what the command line changes of it (`--help` lists the options).

    Exit codes: 0, 1 after an error, 75 when Ctrl-C or SIGTERM interrupted a run that --resume goes on with, 130 when
    there was nothing yet to go on with.
    """
    with one_line_errors():
        return run(*_changed(config))


def _changed(config: ExperimentConfig) -> tuple[ExperimentConfig, bool]:
    """The config as the command line changes it, and whether to resume."""
    options_class = _BatchOptions if isinstance(config.train_spec, BatchSpec) else _EpisodeOptions
    kept = {f.name: getattr(config, f.name) for f in fields(options_class) if hasattr(config, f.name)}
    default = options_class(eval_spec=_EvalSpec(), resume=False, **kept)
    options = tyro.cli(options_class, default=default, description=f"Runs the experiment {config.name}.")
    require(
        not options.resume or (options.run_dir is not None and (options.run_dir / "config.txt").exists()),
        "the folder of a run to go on with",
        str(options.run_dir),
        "name it with --run-dir, or leave --resume out",
    )
    changes: dict[str, Any] = {name: getattr(options, name) for name in kept}
    given = {name: value for name, value in vars(options.eval_spec).items() if value is not None}
    if given:
        changes["eval_specs"] = (replace(config.eval_specs[0], **given),)
    return replace(config, **changes), options.resume
