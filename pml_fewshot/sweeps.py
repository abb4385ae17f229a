"""sweep: several experiments under one budget in one table; what was interrupted goes on where it stopped."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from filelock import FileLock

from pml_fewshot.checks import check_choice, require
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.exit_codes import one_line_errors
from pml_fewshot.experiment import run
from pml_fewshot.experiment_config import Device, ExperimentConfig
from pml_fewshot.trainers.interruption import TrainingInterrupted


def sweep(configs: Sequence[ExperimentConfig], folder: str | Path, only: Sequence[str] = ()) -> ResultTable:
    """Runs every experiment in a folder of its own below `folder`, and returns one table, the best first.

    With `only` those of these names run, and of the others what is finished is in the table.

    The table is written anew after each experiment, as results.md and the rest. Called again with the same folder it
    reads what is finished, goes on with what was interrupted and tries again what failed; an experiment that fails is a
    line that says why, and the next one begins.

    Raises:
        ValueError: two experiments of one name.
    """
    names = [config.name for config in configs]
    require(len(set(names)) == len(names), "names that are all different", str(names), "rename the experiments")
    folder = Path(folder)
    to_run = [c for c in configs if not only or c.name in only or (folder / c.name / "figures.csv").exists()]
    failures: dict[str, str] = {}
    elsewhere: list[str] = []
    table = ResultTable()
    for number, config in enumerate(to_run, start=1):
        print(f"\n[{number} of {len(to_run)}] {config.name}", flush=True)
        try:
            run(replace(config, run_dir=folder / config.name), resume=True)
        except KeyboardInterrupt as stop:
            what = stop.what if isinstance(stop, TrainingInterrupted) else "interrupted"
            raise TrainingInterrupted(what, "the same command again goes on") from stop
        except BlockingIOError:
            elsewhere.append(config.name)
        except Exception as error:  # whatever it is: hours of other experiments must not be lost by one
            traceback.print_exc()
            failures[config.name] = f"{type(error).__name__}: {error}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # another process may run other experiments of this sweep
            table = _finished([c.name for c in configs], folder, failures, elsewhere)
            table.write(folder)
    print(f"\n{table}\nwritten to {folder / 'results.md'}")
    return table


def _finished(names: Sequence[str], folder: Path, failures: dict[str, str], elsewhere: Sequence[str]) -> ResultTable:
    """The figures of all that is finished, by whichever process, the best first; and what has none, and why."""
    finished = [name for name in names if (folder / name / "figures.csv").exists() and name not in failures]
    running = {name: "another process is at it" for name in elsewhere if name not in finished}
    rows = [row for name in finished for row in ResultTable.read(folder / name).rows]
    return ResultTable(rows, {**failures, **running}).best_first()


@dataclass(frozen=True)
class _Options:
    """What may differ between two sweeps; everything else is edited in the experiment's file."""

    steps: int
    """training steps of each experiment"""
    seed: int
    """of weights, training batches, augmentation and test episodes"""
    num_episodes: int
    """test episodes of each spec"""
    device: Device
    """auto: CUDA where there is one"""
    only: tuple[str, ...] = ()
    """names of the experiments to run; all when not given"""
    data_root: Path | None = None
    """folder of the data; PML_FEWSHOT_DATA, else data/, when not given"""
    folder: Path | None = None
    """folder of the sweep; runs/<name>/<steps>_steps_<episodes>_episodes_seed<seed> when not given"""


def sweep_main(name: str, configs: Sequence[ExperimentConfig]) -> ResultTable:
    """Runs the sweep with what the command line changes of it (`--help` lists the options).

    The same command again goes on where it was interrupted: its folder is named by its steps, episodes and seed. Exit
    codes are those of `main`.
    """
    first = configs[0]
    default = _Options(first.steps, first.seed, first.num_episodes, first.device)
    options = tyro.cli(_Options, default=default, description=f"Runs {len(configs)} experiments: {name}.")
    with one_line_errors():
        for wanted in options.only:
            check_choice("the name of an experiment", wanted, [config.name for config in configs])
        changes = {field: getattr(options, field) for field in ("steps", "seed", "num_episodes", "device", "data_root")}
        named = f"{options.steps}_steps_{options.num_episodes}_episodes_seed{options.seed}"
        folder = options.folder or Path("runs") / name / named
        return sweep([replace(config, **changes) for config in configs], folder, options.only)
