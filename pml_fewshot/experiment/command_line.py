"""main(config): runs an experiment from the command line."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

import tyro

from pml_fewshot.checks import UsageError
from pml_fewshot.distributed import ProcessLost
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.experiment.run import run
from pml_fewshot.parts.describe import module_name
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.training.interruption import TrainingDiverged, TrainingInterrupted

Options = TypeVar("Options")

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume continues
INTERRUPTED = 130  # 128 + SIGINT, as in shells


@dataclass(frozen=True)
class EvalSpec:
    """Evaluate on a single spec; values not given come from the experiment's first one."""

    ways: int | None = None
    """classes per episode"""
    shots: int | None = None
    """support items of each class"""
    queries: int | None = None
    """query items of each class"""
    query_balance: float | None = None
    """alpha of a Dirichlet distribution that divides the queries among the classes; equal numbers when None"""

    def of(self, specs: tuple[EpisodeSpec, ...]) -> tuple[EpisodeSpec, ...]:
        """The experiment's specs, or only the requested one."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return (replace(specs[0], **given),) if given else specs


@dataclass(frozen=True)
class _Options:
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    eval_spec: EvalSpec = field(default_factory=EvalSpec)
    resume: bool = False
    """continue the run in --run-dir, or start it; with more --steps, train a finished run longer"""


def main(config: ExperimentConfig) -> ResultTable:
    """Runs the experiment with the changes given on the command line (`--help` lists the options).

    Exit codes: 0, 1 after an error, 75 when Ctrl-C or SIGTERM interrupted a run that --resume continues, 130 when
    there was nothing to resume yet.
    """
    with one_line_errors():
        options = parse(_Options(config), f"Runs the experiment {config.name}.")
        return run(replace(options.config, eval_specs=options.eval_spec.of(config.eval_specs)), options.resume)


def parse(default: Options, description: str) -> Options:
    """The dataclass with the command line's changes; `Fixed` fields are not options."""
    flags = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)  # (train_spec keeps the experiment's own class)
    return tyro.cli(type(default), prog=program(), default=default, description=description, config=flags)


def program() -> str:
    """The command that runs this program, for its help text; a module is not called by its file."""
    name = module_name("__main__")
    return f"python -m {name}" if name != "__main__" else sys.argv[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr and an exit code after a user's mistake or an interruption.

    Warnings take one line too, and all other errors keep their traceback. SIGTERM is treated like Ctrl-C: while
    training it takes effect after the current step, else immediately.
    """
    as_before = warnings.formatwarning
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles no signals elsewhere
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        warnings.formatwarning = _one_line
        yield
    except (UsageError, TrainingDiverged) as error:
        told = _process() and (isinstance(error, TrainingDiverged) or hasattr(error, "reported_elsewhere"))
        sys.exit(1 if told else f"{_process()}error: {error}")
    except ProcessLost as error:
        if not _process():  # if the first process is lost, torchrun names it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(RESUMABLE)
    except TrainingInterrupted as stop:
        if not _process():  # all processes have agreed to stop
            print(stop, file=sys.stderr)
        sys.exit(RESUMABLE)
    except KeyboardInterrupt:
        print("interrupted before there was anything to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        warnings.formatwarning = as_before
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _process() -> str:
    """Prefix that names the reporting process, if torchrun has started several and it is not the first."""
    return "" if (rank := os.environ.get("RANK", "0")) == "0" else f"process {rank}: "


def _one_line(message: object, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"{'warning' if category is UserWarning else category.__name__}: {message}\n"
