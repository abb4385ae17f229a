"""report.html of a run: the contents of its folder, and pictures of its trained method if weights and data exist."""

import shlex
import sqlite3
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.evaluation.table_formats import layout
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.experiment.run_folder import finished_config, read_config
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.report.page import Chart, Section, definitions, escaped, paragraph, section_of, table, write_report
from pml_fewshot.report.result_plots import plot_curves
from pml_fewshot.report.subject import Subject
from pml_fewshot.report.trainer_charts import trainer_sections
from pml_fewshot.sampling.episodes import EpisodeSpec
from pml_fewshot.training.state import history_of

REPORT = "report.html"
Curves = Mapping[str, Sequence[Sequence[float]]]


def draw_report(folder: Path, trainer: Any, splits: Splits, config: ExperimentConfig) -> None:
    """Draws the report of a run that has just finished."""
    with only_shown(folder):
        print(f"report: {report_run(folder, subject_of(trainer, splits, config))}")


@contextmanager
def only_shown(folder: Path) -> Iterator[None]:
    """Shows errors raised inside and continues: the tables have been written, and the report can be drawn again."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"no report was drawn; the run is finished: python -m pml_fewshot.report {shlex.quote(str(folder))}")
    except Exception:  # noqa: BLE001 (see above)
        traceback.print_exc()
        again = f"python -m pml_fewshot.report {shlex.quote(str(folder))}"
        print(f"no report was drawn, for the reason above; {again} tries it again")


def subject_of(trainer: Any, splits: Splits, config: ExperimentConfig) -> Subject:
    """The subject of a trained experiment's report; `splits` are as evaluated."""

    def allowed(spec: EpisodeSpec) -> bool:
        try:
            trainer.check(splits, (config.train_spec, spec))
        except UsageError:
            return False
        return True

    return Subject(trainer, splits.test, config.eval_specs, config.eval_seed, allowed)


def report_run(folder: Path, subject: Subject | str) -> Path:
    """Writes the report of one run, finished or not.

    Args:
        folder: run folder.
        subject: its trained method and test classes, or the reason why there are none.
    """
    stored = read_config(folder)
    name, finished = stored["config"]["name"], is_finished(folder)
    if isinstance(subject, str):
        drawn = [Section("Pictures of the trained method", paragraph(f"Not drawn: {subject}", "quiet"))]
    else:
        drawn = trainer_sections(replace(subject, accuracies=accuracies_of(folder, name) if finished else {}))
    sections = [
        *section_of("What was run", lambda: _what_was_run(folder, stored)),
        *section_of("Results", lambda: Section("Results", (_results if finished else _progress)(folder, stored))),
        *drawn[:2],
        *section_of("Training", lambda: training_charts({name: folder})),
        *drawn[2:],
        Section("Versions and config", _versions(stored) + _config(folder)),
    ]
    kind = "Few-shot experiment" if finished else "A run that is not finished"
    about = f"{kind}, pml_fewshot {_last(stored)['pml_fewshot']}"
    return write_report(folder, name, sections, about)


def is_finished(folder: Path) -> bool:
    """Whether the table in the folder belongs to the run's current steps and evaluation."""
    try:
        finished_config(folder)
    except UsageError:
        return False
    return (folder / "figures.csv").exists()


def accuracies_of(folder: Path, method: str) -> dict[EpisodeSpec, Tensor]:
    """Episode accuracies (E,) of a method by episode size; the first ones if its table has several for one size."""
    found: dict[EpisodeSpec, Tensor] = {}
    try:
        rows = ResultTable.read(folder).rows
    except UsageError:  # missing or damaged, as the results section says
        return found
    for row in rows:
        if row.method == method and row.ways and row.shots and row.queries and row.values is not None:
            found.setdefault(EpisodeSpec(row.ways, row.shots, row.queries, row.query_balance), row.values)
    return found


def _what_was_run(folder: Path, stored: Mapping[str, Any]) -> Section:
    commands = "".join(f"<pre>{escaped(line)}</pre>" for line in stored.get("commands", ()))
    started = commands or paragraph(f"module {stored['module']}")
    return Section("What was run", started + definitions(_facts(folder, stored)))


def _last(stored: Mapping[str, Any]) -> dict[str, str]:
    return stored["sessions"][-1]


def _facts(folder: Path, stored: Mapping[str, Any]) -> list[tuple[str, object]]:
    config, facts = stored["config"], [("data", stored["data"]["train"]["shown"])]
    facts.append(("test classes", f"{stored['data']['test']['classes']:,}"))
    if (folder / "last.pt").is_file():
        history = history_of(load_checkpoint(folder / "last.pt"))
        facts.append(("trained", f"{history.steps:,} steps in {history.seconds / 60:.1f} minutes ({history.stopped})"))
        facts.append(("weights", f"of step {history.best_step or history.steps:,}"))
    facts += [("seed", config["seed"]), ("device", f"{_last(stored)['device']}, threads: {_last(stored)['threads']}")]
    return facts


def _progress(folder: Path, stored: Mapping[str, Any]) -> str:
    steps = "no checkpoint yet"
    if (folder / "last.pt").is_file():
        steps = f"{history_of(load_checkpoint(folder / 'last.pt')).steps:,} steps are in its checkpoint"
    text = f"This run has no table yet: of {stored['config']['steps']:,} steps, {steps}. --resume continues it."
    return paragraph(text, "warning")


def _results(folder: Path, stored: Mapping[str, Any]) -> str:
    found = ResultTable.read(folder)
    (head, *body), conditions = layout(found.rows, found.failures)
    papers = stored["config"].get("published") or {}
    body += [[source, *(figures.get(title, "") for title in head[1:])] for source, figures in papers.items()]
    others = [(source, *pair) for source, figures in papers.items() for pair in figures.items() if pair[0] not in head]
    notes = [*conditions, *(f"{source}, {title}: {figure}" for source, title, figure in others)]
    return table(head, body, "results") + "".join(paragraph(note, "quiet") for note in notes)


def _versions(stored: Mapping[str, Any]) -> str:
    sessions = "".join(definitions(list(each.items())) for each in stored["sessions"])
    changes = "".join(paragraph(change) for change in stored["changes"])
    data = definitions(
        [(role, f"{each['shown']}, checksum {each['checksum']}") for role, each in stored["data"].items()]
    )
    return f"{sessions}<h3>Data</h3>{data}{changes}"


def _config(folder: Path) -> str:
    path = folder / "config.txt"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else "config.txt is not there"
    return f"<details><summary>the whole config</summary><pre>{escaped(text)}</pre></details>"


def records(folder: Path, group: str, *names: str) -> list[list[float]]:
    """Columns of a run's records, steps first; rows that lack a value are left out."""
    path = folder / "logs.db"
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (group,)).fetchone():
            return []
        rows = [dict(row) for row in connection.execute(f"SELECT * FROM {group} ORDER BY step")]
    kept = [row for row in rows if all(isinstance(row.get(name), int | float) for name in names)]
    return [[row[name] for row in kept] for name in ("step", *names)] if kept else []


def training_charts(folders: Mapping[str, Path]) -> list[Chart]:
    """Training curves of one run, or of several in one picture."""
    alone = len(folders) == 1
    loss = {name: records(folder, "train", "loss") for name, folder in folders.items()}
    valid = {name: records(folder, "validation", "accuracy", "ci95") for name, folder in folders.items()}
    accuracy: dict[str, list[list[float]]] = {}
    for name, (steps, means, halves) in ((name, curve) for name, curve in valid.items() if curve):
        shown = [[100 * value for value in values] for values in (means, halves)]
        accuracy["validation episodes" if alone else name] = [steps, *shown]
    if alone and (seen := records(next(iter(folders.values())), "train", "accuracy")):
        accuracy = {"training episodes": [seen[0], [100 * value for value in seen[1]]], **accuracy}
    charts = [
        _curves("loss", "Loss", {("training" if alone else n): c for n, c in loss.items() if c}, "loss", log=True),
        _curves("accuracy", "Accuracy while training", accuracy, "accuracy, %"),
    ]
    return [chart for chart in charts if chart is not None]


def _curves(name: str, title: str, curves: Curves, ylabel: str, log: bool = False) -> Chart | None:
    if not curves:
        return None
    ends = "; ".join(f"{each} from {curve[1][0]:.4g} to {curve[1][-1]:.4g}" for each, curve in curves.items())
    rows = [(each, *row) for each, curve in curves.items() for row in zip(*curve[:2], strict=True)]
    draw = partial(plot_curves, curves, ylabel=ylabel, log=log)
    return Chart(
        f"curve-{name}",
        title,
        f"Curves over training steps: {ends}.",
        draw,
        (5.4, 3.4),
        ("curve", "step", ylabel),
        rows,
    )
