"""main(config): an experiment from the command line."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import Device, ExperimentConfig
from pml_fewshot.experiment.run import run
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.training.interruption import TrainingDiverged, TrainingInterrupted

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume continues
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True)
class _EvalSpec:
    """Evaluate by one spec alone; what is not given comes from the experiment's first."""

    ways: int | None = None
    """classes in an episode"""
    shots: int | None = None
    """support items of each class"""
    queries: int | None = None
    """query items of each class"""


@dataclass(frozen=True)
class SharedOptions:
    """What may differ between two runs of one experiment or sweep; everything else is edited in its file."""

    steps: int
    """training steps"""
    seed: int
    """of weights, training data, augmentation and test episodes"""
    num_episodes: int
    """test episodes of each spec"""
    device: Device
    """auto: CUDA where there is one"""
    data_root: Path | None
    """folder of the data; PML_FEWSHOT_DATA, else data/, when not given"""


@dataclass(frozen=True)
class _Options(SharedOptions):
    run_dir: Path | None
    """folder of this run; a new one below runs/ when not given"""
    train_spec: EpisodeSpec | BatchSpec
    """size of a training episode or batch"""
    eval_spec: _EvalSpec = field(default_factory=_EvalSpec)
    resume: bool = False
    """continue the run in --run-dir, or start it; with more --steps train a finished one longer"""


def main(config: ExperimentConfig) -> ResultTable:
    """Runs the experiment with what the command line changes of it (`--help` lists the options).

    Exit codes: 0, 1 after an error, 75 when Ctrl-C or SIGTERM interrupted a run that --resume continues, 130 when
    there was nothing yet to resume.
    """
    names = [each.name for each in fields(_Options) if each.name not in ("eval_spec", "resume")]
    options = tyro.cli(
        _Options,
        default=_Options(**{name: getattr(config, name) for name in names}),
        description=f"Runs the experiment {config.name}.",
        config=(tyro.conf.AvoidSubcommands,),  # train_spec is of the experiment's own class
    )
    with one_line_errors():
        changes: dict[str, Any] = {name: getattr(options, name) for name in names}
        given = {name: value for name, value in vars(options.eval_spec).items() if value is not None}
        if given:
            changes["eval_specs"] = (replace(config.eval_specs[0], **given),)
        return run(replace(config, **changes), options.resume)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program after a user's mistake or an interruption by a line on stderr and an exit code.

    All other errors keep their traceback. SIGTERM is taken as Ctrl-C: while training after the current step, else at
    once.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles no signals elsewhere
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        yield
    except (UsageError, TrainingDiverged) as error:
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(RESUMABLE)
    except KeyboardInterrupt:
        print("interrupted before there was anything to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
