"""The report of several runs side by side, and the command that draws reports of one run or several."""

import os
import sqlite3
import webbrowser
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.evaluation.table_formats import ResultRow, arrange, layout
from pml_fewshot.experiment.command_line import one_line_errors
from pml_fewshot.experiment.comparison import PairedDifference, compare_runs, labels_of
from pml_fewshot.experiment.config import Device
from pml_fewshot.experiment.prepare import for_evaluation, load_data
from pml_fewshot.experiment.run_folder import check_data, finished_config, read_config
from pml_fewshot.experiment.run_report import REPORT, only_shown, records, report_run, subject_of, training_charts
from pml_fewshot.experiment.stored_config import find_config
from pml_fewshot.experiment.trained import trained_with_config, with_data_root
from pml_fewshot.report.page import Chart, Section, escaped, paragraph, section_of, table, write_report
from pml_fewshot.report.result_plots import plot_intervals
from pml_fewshot.report.subject import Subject


def draw_runs(folders: Sequence[Path], to: Path, failures: Mapping[str, str]) -> None:
    """Draws the report of a sweep that has just ended; a failure is shown and costs only the report."""
    with only_shown(to):
        print(f"report: {report_runs(folders, to, to.resolve().name, failures)}")


def report_runs(folders: Sequence[Path], to: Path, title: str, failures: Mapping[str, str] | None = None) -> Path:
    """Writes one report of several runs, finished or not, with their tables, paired differences and curves.

    Args:
        folders: run folders.
        to: folder for the report.
        title: title of the report.
        failures: reasons why other runs have no figures, by name.
    """
    failed, names, finished = dict(failures or {}), {}, []
    for folder in folders:
        try:
            names[folder] = str(read_config(folder)["config"]["name"])
            finished_config(folder)
            ResultTable.read(folder)
            finished.append(folder)
        except UsageError as error:  # an unfinished or damaged run must not cost the others
            failed.setdefault(names.get(folder, str(folder)), str(error))
    labels = dict(zip(names, labels_of(list(names.values()), list(names)), strict=True))
    comparison = compare_runs(finished) if len(finished) > 1 else None
    found = comparison.table if comparison else ResultTable.read(finished[0]) if finished else ResultTable()
    cells, conditions = layout(found.rows, failed)
    results = table(cells[0], cells[1:], "results") + "".join(paragraph(each, "quiet") for each in conditions)
    sections = [Section("Results", results, _figures(found.rows))]
    if comparison:
        sections.append(Section("Paired differences to the best", charts=_differences(comparison.paired)))
        lines = "".join(f"<li>{escaped(line)}</li>" for line in comparison.changes)
        sections.append(Section("Configs differ in", f"<ul>{lines}</ul>" if lines else paragraph("nothing")))
    recorded = {label: folder for folder, label in labels.items() if _can_be_read(folder)}
    sections += section_of("Training", lambda: training_charts(recorded))
    sections.append(Section("Runs", "".join(_link(label, folder, to) for folder, label in labels.items())))
    return write_report(to, title, sections, f"{len(folders)} runs side by side")


def _can_be_read(folder: Path) -> bool:
    """Whether the records of a run are intact."""
    try:
        records(folder, "train", "loss")
    except sqlite3.DatabaseError:
        return False
    return True


def _link(label: str, folder: Path, to: Path) -> str:
    name, commands = escaped(label), read_config(folder).get("commands", ())
    address = quote(Path(os.path.relpath(folder / REPORT, to)).as_posix())
    shown = f'<a href="{address}">{name}</a>' if (folder / REPORT).exists() else f"{name} (no report)"
    return f'<h3 dir="auto">{shown}</h3>' + "".join(f"<pre>{escaped(line)}</pre>" for line in commands)


def _figures(rows: Sequence[ResultRow]) -> list[Chart]:
    """One picture for each column of the table, with the best on top."""
    columns, lines = arrange(rows)
    charts = []
    for number, (column, title) in enumerate(columns.items()):
        own = sorted(((n, f[column]) for n, f in lines.items() if column in f), key=lambda line: -line[1].value)
        values = {name: (100 * row.value, 100 * row.ci95) for name, row in own}
        if len(values) > 1:
            charts.append(_intervals(f"figure-{number + 1}", title, values, f"{title}, %"))
    return charts


def _differences(paired: Sequence[PairedDifference]) -> list[Chart]:
    charts = []
    for number, (title, best) in enumerate(dict.fromkeys((each.title, each.best) for each in paired)):
        own = [each for each in paired if (each.title, each.best) == (title, best)]
        values = {each.method: (100 * each.found.difference, 100 * each.found.ci95) for each in own}
        name = f"{title}: minus {best}"
        charts.append(_intervals(f"difference-{number + 1}", name, values, "points", zero=True))
    return charts


def _intervals(
    name: str, title: str, values: Mapping[str, tuple[float, float]], unit: str, zero: bool = False
) -> Chart:
    ends = ", ".join(f"{each} {mean:.2f} +- {half:.2f}" for each, (mean, half) in values.items())
    draw = partial(plot_intervals, values, unit, zero)
    rows = [(each, *pair) for each, pair in values.items()]
    alt = f"Dots with 95 % intervals, in {unit}: {ends}."
    return Chart(name, title, alt, draw, (5.4, 1.0 + 0.55 * len(values)), ("run", unit, "+-"), rows)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run folder, else the run folders directly below it, as in a sweep."""
    if (folder / "config.json").is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob("*/config.json"))
    if not below:
        there = "an empty folder" if folder.is_dir() and not any(folder.iterdir()) else "none"
        got = f"{there} (no config.json in it or directly below it)" if folder.exists() else "nothing there"
        raise MissingFileError(f"expected a run or a folder of runs at {folder}, got {got}; name the folder of a run")
    return below


def trained_subject(folder: Path, experiment: str, device: Device, data_root: Path | None) -> Subject | str:
    """The run's trained method on its test classes, or the reason why they are unavailable."""
    try:
        config = find_config(folder, experiment)
        trainer, config = trained_with_config(folder, config, device)
        loaded = load_data(with_data_root(config, data_root))
        check_data(loaded, read_config(folder), folder)
    except (UsageError, OSError) as error:
        return str(error)
    return subject_of(trainer, for_evaluation(config, loaded), config)


def _command(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    experiment: str = "",
    to: Path | None = None,
    open: bool = False,
    data_root: Path | None = None,
    device: Device = "auto",
) -> None:
    """Draws the report of a run, report.html in its folder; several runs, or a folder of runs, share one report.

    Args:
        runs: run folders, or a folder that contains them, as of a sweep
        experiment: module of a run's config, like experiments.quickstart; the one that it recorded when not given
        to: folder for the report of several runs; the one that contains them all when not given
        open: show it in the browser
        data_root: folder of the data; PML_FEWSHOT_DATA, else data/, when not given
        device: auto: CUDA if available
    """
    if not runs:
        raise UsageError("expected the folder of a run, got none; python -m pml_fewshot.report RUN")
    folders = list(dict.fromkeys(path.resolve() for given in runs for path in runs_in(given)))
    if len(folders) == 1 and to is None:
        path = report_run(folders[0], trained_subject(folders[0], experiment, device, data_root))
    else:
        place = to or Path(os.path.commonpath([folder.parent for folder in folders]))
        path = report_runs(folders, place, f"{place.resolve().name or 'runs'}: {len(folders)} runs")
    print(path)
    if open:
        webbrowser.open(path.resolve().as_uri())


def main() -> None:
    with one_line_errors():
        tyro.cli(_command)
