"""reproduce: a finished run is evaluated again from its weights; do the same figures come out?"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.table import STORED, ResultRow, ResultTable
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.experiment.config import OPTIONS, Device, ExperimentConfig
from pml_fewshot.experiment.run import evaluate, prepare
from pml_fewshot.experiment.run_folder import PLACE, RunFolder, check_data, check_same, environment_changes, read_config
from pml_fewshot.io.checkpoint import load_checkpoint, load_embedder
from pml_fewshot.training.state import history_of, load_trained


@dataclass(frozen=True)
class Reproduction:
    """What came of evaluating a run again."""

    table: ResultTable
    """the figures as they come out now"""
    differences: list[str]
    """a line for each stored figure, or file of weights, that is not the same; none is success"""
    changes: list[str]
    """what is another version, commit, device or number of threads than in the run"""

    def __str__(self) -> str:
        count = f"{len(self.differences)} differences" if self.differences else "every one is the same"
        changed = [f"changed since: {change}" for change in self.changes]
        return "\n".join([str(self.table), *changed, *self.differences, f"{len(self.table.rows)} figures: {count}"])


def reproduce(
    folder: str | Path, config: ExperimentConfig, data_root: str | Path | None = None, device: Device = "auto"
) -> Reproduction:
    """Evaluates the weights of a finished run again, on the same episodes, and compares every figure.

    Nothing in the folder is changed, and nothing in it is run: the experiment is yours, and must be the folder's but
    for what the command line changes (steps, seed and other numbers), which comes from the folder.

    Args:
        folder, config: of the run.
        data_root: where the data are now; where the config says when None.
        device: auto: CUDA where there is one. Another one than the run's may change the last digits.

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
    check_data(prepared.splits, stored, folder)
    state = load_checkpoint(folder / "last.pt")
    load_trained(prepared.trainer, state)
    differences = []
    for name, part in prepared.trainer.exports().items():
        weights = {key: value.clone() for key, value in part.state_dict().items()}
        load_embedder(folder / name, part)
        if any(not torch.equal(weights[key], value) for key, value in part.state_dict().items()):
            differences.append(f"{name} has other weights than last.pt")
    table = evaluate(prepared, history_of(state))
    differences += _differences(ResultTable.read(folder).rows, table.rows)
    return Reproduction(table, differences, environment_changes(stored, prepared.device))


def with_stored_options(config: ExperimentConfig, stored: Mapping[str, Any]) -> ExperimentConfig:
    """The config with the numbers that the command line may have changed, as a run's description has them."""

    def as_stored(spec: Any, then: Mapping[str, Any]) -> Any:
        return replace(spec, **{each.name: then[each.name] for each in fields(spec) if each.name in then})

    options: dict[str, Any] = {name: stored[name] for name in OPTIONS if name in stored and name not in PLACE}
    options["train_spec"] = as_stored(config.train_spec, stored["train_spec"])
    options["eval_specs"] = tuple(as_stored(config.eval_specs[0], each) for each in stored["eval_specs"])
    return replace(config, **options)


def find_config(folder: str | Path, module: str = "") -> ExperimentConfig:
    """The experiment of a run folder, from a module of the reader's: a config at its top, or in a list there.

    Args:
        folder: of the run.
        module: that has the config; when empty the one that the run recorded, if that is one of `experiments`.

    Raises:
        UsageError: there is no such module, it lies in the run folder, or none of its configs has the run's name.
    """
    stored = read_config(Path(folder))
    name, wanted = module or str(stored["module"]), stored["config"].get("name")
    if not module and not re.fullmatch(r"experiments(\.[a-z_]\w*)+", name, re.ASCII):
        raise UsageError(f"expected a run of a module of experiments, got one of {name!r}; name the module to use")
    for end in [match.start() for match in re.finditer(r"\.|$", name)]:  # a package is imported to look below it
        _check_outside(name[:end], Path(folder))
    values = list(vars(importlib.import_module(name)).values())
    values += [each for value in values if isinstance(value, list | tuple) for each in value]
    configs = {each.name: each for each in values if isinstance(each, ExperimentConfig)}
    if wanted not in configs:
        raise UsageError(f"expected a config named {wanted!r} in {name}, got {sorted(configs)}; name another module")
    return configs[wanted]


def _check_outside(module: str, folder: Path) -> None:
    """Raises a UsageError when there is no such module, or it lies in the run folder, which may be a stranger's."""
    spec = importlib.util.find_spec(module)
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
    if spec is None or any(Path(each).resolve().is_relative_to(folder.resolve()) for each in places if each):
        got = "one in the run folder" if spec is not None else "none"
        raise UsageError(f"expected a module {module} of your own, got {got}; work in the checkout that has it")


def _differences(then: Sequence[ResultRow], now: Sequence[ResultRow]) -> list[str]:
    found = [f"{len(then)} figures are stored, {len(now)} come out now"] if len(then) != len(now) else []
    for before, after in zip(then, now, strict=False):
        for field in STORED:
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new:
                found.append(f"{after.method}, {after.figure} {after.ways or ''}: {field.name} {old} stored, {new} now")
    return found


def _command(
    folder: Annotated[Path, tyro.conf.Positional],
    experiment: Annotated[str, tyro.conf.Positional] = "",
    data_root: Path | None = None,
    device: Device = "auto",
) -> int:
    """Evaluates a finished run again and says whether every figure comes out the same.

    Exit codes: 0 all are the same, 1 not, or an error.

    Args:
        folder: the run folder
        experiment: module of its config, like experiments.quickstart; the one that the run recorded when not given
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        device: auto: CUDA where there is one
    """
    reproduction = reproduce(folder, find_config(folder, experiment), data_root, device)
    print(reproduction)
    return 1 if reproduction.differences else 0


def main() -> None:
    with one_line_errors():
        sys.exit(tyro.cli(_command))
