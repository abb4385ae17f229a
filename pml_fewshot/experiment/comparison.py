"""compare_runs: figures of finished runs, the best first, with their config differences and paired differences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.statistics import Comparison, average
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.evaluation.table_formats import ResultRow, arrange
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.experiment.run_folder import PLACE, finished_config
from pml_fewshot.experiment.trained import EVALUATIONS


@dataclass(frozen=True)
class RunComparison:
    """Result of comparing runs; str() shows all of it."""

    table: ResultTable
    """all figures, the best run first, plus the means of runs that differ only in their seeds"""
    changes: list[str]
    """one line for each value in which the configs differ"""
    paired: list["PairedDifference"]
    """for each run and figure, the difference from the best run on the same episodes or queries"""

    @property
    def differences(self) -> list[str]:
        """One line for each paired difference."""
        return [str(each) for each in self.paired]

    def __str__(self) -> str:
        parts = [str(self.table)]
        for title, lines in (("configs differ in", self.changes), ("paired differences to the best", self.differences)):
            parts.append("\n".join([f"{title}:", *(f"- {line}" for line in lines)]) if lines else f"{title}: none")
        return "\n\n".join(parts)


@dataclass(frozen=True)
class PairedDifference:
    """Difference between a run and the best one in a figure."""

    title: str
    method: str
    best: str
    found: Comparison

    def __str__(self) -> str:
        return f"{self.title}: {self.method} minus {self.best}: {self.found}"


def compare_runs(folders: Sequence[str | Path]) -> RunComparison:
    """Compares finished runs, including the evaluations added to them afterwards.

    Runs with the same name are distinguished by their folders. Differences are paired, on the same episodes (or
    queries of the same data), so that the difficulty of an episode cancels out.

    Raises:
        MissingFileError: (a FileNotFoundError) a folder without a run.
        UsageError: fewer than two runs, a run given twice or not finished, or damaged files.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        got = ", ".join(map(str, paths)) or "none"
        raise UsageError(f"expected two or more different runs, got {got}; name their folders")
    stored = [finished_config(path) for path in paths]
    names = [each["config"]["name"] for each in stored]
    labels = labels_of(names, paths)
    rows = {label: _rows(path, name, label) for label, path, name in zip(labels, paths, names, strict=True)}
    configs = {label: dict(_flat(each["config"])) for label, each in zip(labels, stored, strict=True)}
    everything = [row for own in rows.values() for row in own] + _means(rows, configs)
    return RunComparison(ResultTable(everything).best_first(), _changes(configs), _differences(rows))


def labels_of(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Labels of runs: the name, followed by the folder if names repeat, or by the whole path if labels still repeat."""
    pairs = list(zip(names, paths, strict=True))
    shown = [f"{name} ({path.resolve().name})" if names.count(name) > 1 else name for name, path in pairs]
    return [
        f"{name} ({path})" if shown.count(label) > 1 else label
        for label, (name, path) in zip(shown, pairs, strict=True)
    ]


def _rows(path: Path, name: str, label: str) -> list[ResultRow]:
    rows = ResultTable.read(path).rows
    if (path / EVALUATIONS / "figures.csv").exists():
        rows += ResultTable.read(path / EVALUATIONS).rows
    renamed = {name: label, **{row.method: f"{label}: {row.method}" for row in rows if row.method != name}}
    return [replace(row, method=renamed[row.method]) for row in rows]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a described config with their places, such as "trainer.loss.temperature"."""
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    if not inner:
        yield path, value
    for name, each in inner.items():
        # (a partial is described as {"call": its class, "with": its arguments}, an object with its class as "object")
        step = "" if name in ("with", "call", "object") else str(name)
        yield from _flat(each, ".".join(filter(None, (path, step))))


def _changes(configs: dict[str, dict[str, Any]]) -> list[str]:
    places = dict.fromkeys(place for config in configs.values() for place in config)
    lines = []
    for place in places:
        values = {label: config.get(place, "nothing") for label, config in configs.items()}
        if place not in PLACE and len(set(map(repr, values.values()))) > 1:
            lines.append(f"{place}: " + ", ".join(f"{value} ({label})" for label, value in values.items()))
    return lines


def _key(row: ResultRow) -> tuple[str, ...]:
    """A key that is equal for figures on the same episodes or of the same queries."""
    return row.column, row.protocol, row.episodes_hash


def _differences(rows: dict[str, list[ResultRow]]) -> list[PairedDifference]:
    together: dict[Any, dict[str, ResultRow]] = {}
    for own in rows.values():
        for row in own:
            if row.values is not None:
                together.setdefault(_key(row), {}).setdefault(row.method, row)
    found = []
    for figures in together.values():
        best = max(figures.values(), key=lambda row: row.value)
        (title,) = arrange([best])[0].values()
        for row in figures.values():
            if row is not best and row.values is not None and best.values is not None:
                average_difference = average([row.values - best.values])
                comparison = Comparison(*average_difference, len(row.values), row.ways is None)
                found.append(PairedDifference(title, row.method, best.method, comparison))
    return found


def _means(rows: dict[str, list[ResultRow]], configs: dict[str, dict[str, Any]]) -> list[ResultRow]:
    """For runs that differ only in their seeds, a row for each figure that all of them have."""
    groups: dict[str, dict[Any, str]] = {}
    for label, config in configs.items():
        same = {place: value for place, value in config.items() if place not in ("seed", *PLACE)}
        groups.setdefault(repr(same), {})[config.get("seed")] = label  # (a copy of a run is not another training)
    means = []
    for labels in [list(group.values()) for group in groups.values() if len(group) > 1]:
        # the rest of a row's name, after the run's label, distinguishes several figures on the same episodes
        keyed = [{(*_key(row), row.method[len(label) :], row.ranking): row for row in rows[label]} for label in labels]
        name = configs[labels[0]]["name"]  # shared by all of them, so they are labeled "name (place)"
        shown = f"mean of {name} ({', '.join(label[len(name) + 2 : -1] for label in labels)})"
        for key, first in keyed[0].items():
            values = [own[key].values for own in keyed if key in own]
            if len(values) == len(labels) and all(each is not None for each in values):
                value, ci95 = average(values)  # type: ignore[arg-type]
                method = shown + first.method[len(labels[0]) :]
                means.append(replace(first, method=method, value=value, ci95=ci95, trained=len(labels), values=None))
    return means


def _command(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Compares finished runs: all figures, the best first, differences between the configs, and paired differences.

    Args:
        runs: the run folders
    """
    print(compare_runs(runs))


def main() -> None:
    with one_line_errors():
        tyro.cli(_command)
