"""reproduce: evaluates a finished run again from its weights and compares the figures."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pml_fewshot.checks import MissingFileError
from pml_fewshot.evaluation.table import STORED, ResultRow, ResultTable
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.experiment.config import Device, ExperimentConfig
from pml_fewshot.experiment.evaluate import evaluate
from pml_fewshot.experiment.prepare import prepare
from pml_fewshot.experiment.run_folder import RunFolder, check_data, check_same, environment_changes, read_config
from pml_fewshot.experiment.stored_config import find_config, with_stored_options
from pml_fewshot.io.checkpoint import load_checkpoint, load_embedder
from pml_fewshot.training.state import history_of, restore_trained


@dataclass(frozen=True)
class Reproduction:
    """Result of evaluating a run again."""

    table: ResultTable
    """the figures of the new evaluation"""
    differences: list[str]
    """one line for each stored figure or weights file that differs; empty on success"""
    changes: list[str]
    """changes of version, commit, device or number of threads since the run"""

    def __str__(self) -> str:
        count = f"{len(self.differences)} differences" if self.differences else "every one is the same"
        changed = [f"changed since: {change}" for change in self.changes]
        return "\n".join([str(self.table), *changed, *self.differences, f"{len(self.table.rows)} figures: {count}"])


def reproduce(
    folder: str | Path, config: ExperimentConfig, data_root: str | Path | None = None, device: Device = "auto"
) -> Reproduction:
    """Evaluates the weights of a finished run again, on the same episodes, and compares every figure.

    Nothing in the folder is changed or executed: you supply the experiment, which must match the folder's except for
    what the command line changes (steps, seed and other numbers), which comes from the folder.

    Args:
        folder, config: the run folder and the run's config.
        data_root: where the data are now; the config's location when None.
        device: auto: CUDA if available. A device other than the run's may change the last digits.

    Raises:
        MissingFileError: (a FileNotFoundError) the folder lacks config.json, last.pt, the weights or figures.csv.
        UsageError: one of them is damaged, or the config or the data are not the run's.
    """
    folder = Path(folder)
    stored = read_config(folder)
    config = with_stored_options(config, stored["config"])
    if not RunFolder(folder, config, stored).finished:
        raise MissingFileError(f"expected a finished run in {folder}, got one without a table; finish it with --resume")
    check_same(config, stored, folder, may_change=())
    root = Path(data_root) if data_root is not None else config.data_root
    prepared = prepare(replace(config, data_root=root, device=device))
    check_data(prepared.loaded, stored, folder)
    state = load_checkpoint(folder / "last.pt")
    restore_trained(prepared.trainer, state)
    differences = []
    for name, part in prepared.trainer.exports().items():
        weights = {key: value.clone() for key, value in part.state_dict().items()}
        load_embedder(folder / name, part)
        if any(not torch.equal(weights[key], value) for key, value in part.state_dict().items()):
            differences.append(f"{name} has other weights than last.pt")
    table = evaluate(prepared.config, prepared.trainer, prepared.splits, prepared.tester, history_of(state))
    differences += _differences(ResultTable.read(folder).rows, table.rows)
    return Reproduction(table, differences, environment_changes(stored, prepared.device))


def _differences(then: Sequence[ResultRow], now: Sequence[ResultRow]) -> list[str]:
    found = [f"{len(then)} figures are stored, {len(now)} come out now"] if len(then) != len(now) else []
    for before, after in zip(then, now, strict=False):
        for field in STORED:
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new and not (old != old and new != new):  # for NMI's interval both are NaN
                found.append(f"{after.method}, {after.figure} {after.ways or ''}: {field.name} {old} stored, {new} now")
    return found


def _command(
    folder: Annotated[Path, tyro.conf.Positional],
    experiment: Annotated[str, tyro.conf.Positional] = "",
    data_root: Path | None = None,
    device: Device = "auto",
) -> int:
    """Evaluates a finished run again and reports whether every figure is the same.

    Exit codes: 0 if all are the same, 1 if not, or after an error.

    Args:
        folder: the run folder
        experiment: module of its config, like experiments.quickstart; the one that the run recorded when not given
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        device: auto: CUDA if available
    """
    reproduction = reproduce(folder, find_config(folder, experiment), data_root, device)
    print(reproduction)
    return 1 if reproduction.differences else 0


def main() -> None:
    with one_line_errors():
        sys.exit(tyro.cli(_command))
