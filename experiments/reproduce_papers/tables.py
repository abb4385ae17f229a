"""From run folders to the CSV files of docs/results: means over seeds, single runs and paired differences."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from experiments.reproduce_papers.rows import Row
from pml_fewshot import ResultTable
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.evaluation.table_formats import ResultRow, arrange
from pml_fewshot.experiment.run_folder import read_config
from pml_fewshot.io.atomic import write_text
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.training.state import history_of

Line = dict[str, str]
BOOKKEEPING = ("steps", "seed", "episodes", "minutes", "command", "commit", "machine")


@dataclass
class Found:
    """What the runs of a line have found: figures by column title and seed, and how they came about."""

    row: Row
    method: str
    figures: dict[str, dict[int, ResultRow]] = field(default_factory=dict)
    runs: dict[int, dict[str, Line]] = field(default_factory=dict)  # of each seed how its trainings came about


def found_in(folder: Path, rows: Sequence[Row], seeds: Sequence[int]) -> list[Found]:
    """What the finished runs of some rows have found, a line for each way in which a method was evaluated."""
    lines: dict[str, Found] = {}
    for row in rows:
        for training in row.trainings:
            for seed in seeds:
                place = row.place(folder, training, seed)
                if not (place / "figures.csv").exists():
                    continue
                own = _bookkeeping(Row(row.trained_by or row.name, "", row.trainings).place(folder, training, seed))
                for figure in ResultTable.read(place).rows:
                    (title,) = arrange([figure])[0].values()
                    method = row.method + figure.method.removeprefix(training.name)
                    line = lines.setdefault(f"{row.name}: {method}", Found(row, method))
                    line.figures.setdefault(title, {})[seed] = figure
                    line.runs.setdefault(seed, {})[training.name] = own
    return list(lines.values())


def _bookkeeping(run: Path) -> Line:
    """Of one training: steps, minutes, commit and machine."""
    stored, history = read_config(run), history_of(load_checkpoint(run / "last.pt"))
    session = stored["sessions"][-1]
    threads = session["threads"]
    cores = f"{threads} CPU core{'s' * (threads != '1')}"
    return {
        "steps": f"{history.steps:,}",
        "minutes": f"{history.seconds / 60:.1f}",
        "commit": session["git commit"][:7] + "-dirty" * session["git commit"].endswith("-dirty"),
        "machine": cores if session["device"] == "cpu" else f"{session['device']} GPU",
    }


def write_tables(
    folder: Path, rows: Sequence[Row], seeds: Sequence[int], tables: Path, failed: Mapping[str, str]
) -> None:
    """Writes `<table>.csv`, `<table>_seeds.csv` and `<table>_differences.csv` of what the runs below `folder` found.

    Lines of methods that have no finished run there, or of fewer seeds than the file has, stay as they are.

    Args:
        failed: why a run has failed, by its folder's name below `folder`.
    """
    for table in dict.fromkeys(row.table for row in rows):
        own = [row for row in rows if row.table == table]
        found = found_in(folder, own, seeds)
        order = [row.method for row in own]
        means = [line for each in found for line in (_mean(each), *_published(each))]
        for row in own:
            reasons = {name: why for name, why in failed.items() if name.startswith(f"{row.name}/")}
            why = "; ".join(f"{Path(name).name}: {' '.join(why.split())}" for name, why in reasons.items())
            means += [{"method": row.method, "source": "failed", "note": why}] if reasons else []
        single = [_of_seed(each, seed) for each in found for seed in each.runs]
        _write(tables / f"{table}.csv", means, ("method", "source"), order)
        _write(tables / f"{table}_seeds.csv", single, ("method", "seed"), order)
        _write(tables / f"{table}_differences.csv", _differences(found), ("method", "minus"), order)


def _mean(found: Found) -> Line:
    """The line of a method: each figure's mean over its seeds, with the interval over episodes and seeds."""
    line = {"method": found.method, "source": "this library"}
    spread = []
    for title, by_seed in found.figures.items():
        figures = list(by_seed.values())
        values = [each.values for each in figures if each.values is not None]
        if len(values) == len(figures):
            line[title] = _shown(*average(values))
        means = [100 * each.value for each in figures]
        if figures[0].ways:
            spread.append(f"{max(means) - min(means):.2f}")
    line["spread of seeds"] = " / ".join(spread) if len(found.runs) > 1 else ""
    return line | _how(found, list(found.runs))


def _of_seed(found: Found, seed: int) -> Line:
    own = {title: by_seed[seed] for title, by_seed in found.figures.items() if seed in by_seed}
    return {"method": found.method} | {t: _shown(r.value, r.ci95) for t, r in own.items()} | _how(found, [seed])


def _how(found: Found, seeds: Sequence[int]) -> Line:
    runs = [run for seed in seeds for run in found.runs[seed].values()]
    episodes = dict.fromkeys(f"{r.count:,}" for by in found.figures.values() for r in by.values() if r.of_episodes)
    minutes = [sum(float(run["minutes"]) for run in found.runs[seed].values()) for seed in seeds]
    return {
        "note": found.row.note,
        "steps": ", ".join(dict.fromkeys(run["steps"] for run in runs)),
        "seed": ", ".join(map(str, seeds)),
        "episodes": ", ".join(episodes),
        "minutes": f"{sum(minutes) / len(minutes):.1f}",
        "command": f"python -m experiments.reproduce_papers --data-root DIR --only {found.row.name}",
        "commit": ", ".join(dict.fromkeys(run["commit"] for run in runs)),
        "machine": ", ".join(dict.fromkeys(run["machine"] for run in runs)),
    }


def _published(found: Found) -> list[Line]:
    """The papers' lines of a method, below ours."""
    papers: dict[str, Line] = {}
    for training in found.row.trainings if found.method == found.row.method else ():
        for source, figures in (training.published or {}).items():
            papers.setdefault(source, {"method": found.method, "source": source}).update(figures)
    return list(papers.values())


def _differences(found: Sequence[Found]) -> list[Line]:
    """Of each two methods the first's accuracies minus the second's on the same episodes, over the seeds of both."""
    lines = []
    for first, second in combinations(found, 2):
        line = {"method": first.method, "minus": second.method}
        common: list[int] = []
        for title in [title for title in first.figures if title in second.figures]:
            one, other = first.figures[title], second.figures[title]
            common = [seed for seed in one if seed in other]
            pairs = [(one[seed], other[seed]) for seed in common]
            apart = [a.values - b.values for a, b in pairs if a.values is not None and b.values is not None]
            same = all(a.episodes_hash == b.episodes_hash for a, b in pairs)
            if common and same and len(apart) == len(pairs) and pairs[0][0].ways:
                difference, ci95 = average(apart)
                line[title] = f"{100 * difference:+.2f} +- {100 * ci95:.2f}"
        if len(line) > 2:
            how = _how(first, [seed for seed in common if seed in first.runs])
            lines.append(line | {name: how[name] for name in ("seed", "episodes", "command", "commit", "machine")})
    return lines


def _shown(value: float, ci95: float) -> str:
    return f"{100 * value:.2f}" + ("" if math.isnan(ci95) else f" +- {100 * ci95:.2f}")


def _write(path: Path, lines: Sequence[Line], keys: Sequence[str], order: Sequence[str]) -> None:
    """Writes lines into a CSV file in place of those of the same keys; none gives way to one of fewer seeds."""
    old: list[Line] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    kept = {tuple(line[key] for key in keys): line for line in old}
    for line in lines:
        before = kept.get(key := tuple(line[key] for key in keys), {})
        if len(line.get("seed", "").split(",")) >= len(before.get("seed", "").split(",")):
            kept[key] = line
    if not kept:
        return
    position = {method: number for number, method in enumerate(order)}

    def place(line: Line) -> int:
        return max((number for method, number in position.items() if line["method"].startswith(method)), default=-1)

    every = sorted(kept.values(), key=place)
    used = dict.fromkeys(name for line in every for name, value in line.items() if value)  # no empty columns
    last = [name for name in ("note", *BOOKKEEPING) if name in used]
    columns = [*(name for name in used if name not in last), *last]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)
    write_text(path, text.getvalue())
