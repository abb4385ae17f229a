"""sweep: several experiments under one budget, in one table; called again, it continues where it was interrupted."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from filelock import FileLock

from pml_fewshot.checks import LockedError, UsageError, check_choice
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.command_line import one_line_errors, parse
from pml_fewshot.experiment.config import OPTIONS, ExperimentConfig
from pml_fewshot.experiment.run import run
from pml_fewshot.experiment.runs_report import draw_runs
from pml_fewshot.training.interruption import TrainingInterrupted

BUDGET = ("steps", "seed", "num_episodes", "device", "data_root")


def sweep(configs: Sequence[ExperimentConfig], folder: str | Path, only: Sequence[str] = ()) -> ResultTable:
    """Runs every experiment in a folder of its own below `folder`, and returns one table, the best first.

    The table is written after each experiment, as results.md and the rest. Called again with the same folder it reads
    what is finished, resumes what was interrupted and tries again what failed, which is a line that says why.

    Args:
        configs: the experiments.
        folder: of the sweep.
        only: names of those to run; all when empty. What is finished of the others is in the table.

    Raises:
        UsageError: two experiments have one name.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C or SIGTERM; the same call continues.
    """
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise UsageError(f"expected names that are all different, got {names}; rename the experiments")
    folder = Path(folder)
    to_run = [c for c in configs if not only or c.name in only or (folder / c.name / "figures.csv").exists()]
    failures: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    table = ResultTable()
    for number, config in enumerate(to_run, start=1):
        print(f"\n[{number} of {len(to_run)}] {config.name}", flush=True)
        try:
            run(replace(config, run_dir=folder / config.name), resume=True)
        except KeyboardInterrupt as stop:
            event = stop.event if isinstance(stop, TrainingInterrupted) else "interrupted"
            raise TrainingInterrupted(event, "the same command again continues") from stop
        except LockedError:
            elsewhere[config.name] = "another process is running it"
        except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost hours of other experiments)
            traceback.print_exc()
            failures[config.name] = f"{type(error).__name__}: {error}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # another process may run other experiments of this sweep
            finished = [name for name in names if (folder / name / "figures.csv").exists() and name not in failures]
            rows = [row for name in finished for row in ResultTable.read(folder / name).rows]
            running = {name: line for name, line in elsewhere.items() if name not in finished}
            table = ResultTable(rows, failures | running).best_first()
            table.write(folder)
    print(f"\n{table}\nwritten to {folder / 'results.md'}")
    if any(config.report for config in to_run):
        draw_runs([folder / name for name in names if (folder / name / "config.json").exists()], folder, failures)
    return table


@dataclass(frozen=True)
class _Options:
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    only: tuple[str, ...] = ()
    """names of the experiments to run; all when not given"""


def sweep_main(name: str, configs: Sequence[ExperimentConfig]) -> ResultTable:
    """Runs the sweep with what the command line changes of all its experiments (`--help` lists the options).

    `--run-dir` is the folder of the sweep, by default named by steps, episodes and seed, so that the same command again
    continues where it was interrupted. Exit codes are those of `main`.
    """
    with one_line_errors():
        options = parse(_Options(configs[0]), f"Runs {len(configs)} experiments: {name}.")
        for wanted in options.only:
            check_choice("the name of an experiment", wanted, [config.name for config in configs])
        own = options.config
        # one budget for all; of the rest what was changed
        changes = {n: getattr(own, n) for n in OPTIONS if n in BUDGET or getattr(own, n) != getattr(configs[0], n)}
        length = f"{own.steps}_steps_{own.num_episodes}_episodes_seed{own.seed}"
        folder = own.run_dir or Path("runs") / name / length
        return sweep([replace(config, **changes) for config in configs], folder, options.only)
