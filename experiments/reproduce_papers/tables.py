"""From run folders to the CSV files of docs/results: means over seeds, single runs and paired differences.

What a finished run has found is kept in docs/results/trainings: its config, its figures, and the accuracies of all
episodes, for paired differences with whatever is evaluated on the same ones. The tables are made of these files, so
trainings of several machines add up, and the runs themselves may go.
"""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from experiments.reproduce_papers.rows import Row
from pml_fewshot import ResultTable
from pml_fewshot.checks import UsageError
from pml_fewshot.evaluation.statistics import average, join_intervals
from pml_fewshot.evaluation.table_formats import ResultRow, arrange
from pml_fewshot.experiment.run_folder import read_config, write_config
from pml_fewshot.io.atomic import write_text
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.training.state import history_of

Line = dict[str, str]
BOOKKEEPING = ("note", "steps", "seed", "episodes", "minutes", "command", "commit", "machine")
SPREAD, FAILED = "spread of seeds", "failed"


@dataclass
class Found:
    """What the runs of a line have found: figures by column title and seed, and how they were trained."""

    row: Row
    method: str
    figures: dict[str, dict[int, ResultRow]] = field(default_factory=dict)
    trainings: dict[int, dict[str, Line]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return list(self.trainings)

    @property
    def seeds_with_values(self) -> list[int]:
        """Those whose accuracies were kept for each episode."""
        figures = [by_seed for by_seed in self.figures.values() if next(iter(by_seed.values())).of_episodes]
        return [
            seed for seed in self.seeds if all(seed not in each or each[seed].values is not None for each in figures)
        ]


def keep(folder: Path, row: Row, kept: Path) -> None:
    """Copies what the finished trainings of a row have found from below `folder` to below `kept`, 40 KB for each.

    `pml-fewshot compare` takes such a copy as a run. It has no weights, no paths of this machine, and for retrieval no
    values of single queries, which would be three times as much as all else.
    """
    for training in row.trainings:
        for seed in row.seeds(folder, training):
            source, place = (row.place(each, training, seed) for each in (folder, kept))
            figures = [
                each if each.of_episodes else replace(each, values=None) for each in ResultTable.read(source).rows
            ]
            stored = read_config(source)
            history = history_of(load_checkpoint(row.run_dir(folder, training, seed) / "last.pt"))
            stored |= {"commands": [], "steps": history.steps, "minutes": history.seconds / 60}
            stored["config"] |= {"run_dir": None, "data_root": None}
            place.mkdir(parents=True, exist_ok=True)
            write_config(place, stored)
            ResultTable(figures).write_figures(place)


def found_in(kept: Path, row: Row) -> list[Found]:
    """What was kept of the trainings of a row, a line for each way in which they were evaluated.

    A seed counts when all trainings are there and have the configs of the row as it is now.
    """
    lines: dict[str, Found] = {}
    for seed in row.seeds(kept):
        for training in row.trainings:
            place = row.place(kept, training, seed)
            how = _how_trained(read_config(place))
            for figure in ResultTable.read(place).rows:
                (title,) = arrange([figure])[0].values()
                method = row.method + figure.method.removeprefix(training.name)
                method += ", transductive" if figure.protocol == "transductive" else ""
                line = lines.setdefault(method, Found(row, method))
                by_seed = line.figures.setdefault(title, {})
                if seed in by_seed or any(each.episodes_hash != figure.episodes_hash for each in by_seed.values()):
                    wanted = f"{title} of {row.name} once a seed, on the same episodes"
                    raise UsageError(f"expected {wanted}, got another by seed {seed}; evaluate alike")
                by_seed[seed] = figure
                line.trainings.setdefault(seed, {})[training.name] = how
    return list(lines.values())


def _how_trained(stored: Mapping[str, Any]) -> Line:
    commits = [session["git commit"] for session in stored["sessions"]]
    threads, device = (stored["sessions"][-1][name] for name in ("threads", "device"))
    return {
        "steps": f"{stored['steps']:,}",
        "minutes": str(stored["minutes"]),
        "commit": ", ".join(dict.fromkeys(each[:7] + "-dirty" * each.endswith("-dirty") for each in commits)),
        "machine": f"{threads} CPU core{'s' * (threads != '1')}" if device == "cpu" else f"a GPU ({device})",
    }


def write_tables(
    folder: Path, rows: Sequence[Row], tables: Path, failed: Mapping[str, str] | None = None, tried: Sequence[str] = ()
) -> None:
    """Keeps all finished runs below `folder`, and writes three files a table: its own, `_seeds` and `_differences`.

    They have all that is kept below `tables`. Lines of other methods stay as they are in the files.

    Args:
        rows: all of them, in the order of the tables.
        failed: why a training failed, by the place of its figures below `folder`.
        tried: names of the rows that were run. What the files say of earlier failures of these goes.
    """
    failed = dict(failed or {})
    for table in dict.fromkeys(row.table for row in rows):
        found: list[Found] = []
        means: list[Line] = []
        cleared = {row.method for row in rows if row.table == table and row.name in tried}
        of_table = [row for row in rows if row.table == table]
        for row in of_table:
            try:
                keep(folder, row, tables / "trainings")
                own = found_in(tables / "trainings", row)
            except UsageError as error:
                own, failed[f"{row.name}/"] = [], str(error)
            found += own
            cleared |= {row.method} if own else set()
            means += [_mean(each) for each in own] + (_published(row, own[0].method) if own else [])
            means += _failures(row, failed)
        singles = [_single(each, seed) for each in found for seed in each.seeds]
        methods = [row.method for row in of_table]
        _write(tables / f"{table}.csv", means, ("method", "source"), methods, (SPREAD,), cleared)
        _write(tables / f"{table}_seeds.csv", singles, ("method", "seed"), methods)
        _write(tables / f"{table}_differences.csv", _differences(found), ("method", "minus"), methods)


def _mean(found: Found) -> Line:
    """The line of a method: each figure's mean over its seeds, with the interval over episodes and seeds."""
    line, spread = {"method": found.method, "source": "this library"}, []
    for title, by_seed in found.figures.items():
        if list(by_seed) != found.seeds:  # a size of episodes that some seeds were not evaluated on
            continue
        line[title] = _shown(*_average(list(by_seed.values())))
        means = [each.value for each in by_seed.values()]
        spread += [f"{100 * (max(means) - min(means)):.2f}"] if next(iter(by_seed.values())).ways else []
    line[SPREAD] = " / ".join(spread) if len(found.seeds) > 1 else ""
    return line | _how(found, found.seeds, found.row.command())


def _average(figures: Sequence[ResultRow]) -> tuple[float, float]:
    """Mean over trainings and half its interval, without their values a little too wide: as if all had erred alike."""
    values = [each.values for each in figures if each.values is not None]
    if len(values) == len(figures):
        return average(values)
    means = torch.tensor([each.value for each in figures], dtype=torch.float64)
    return means.mean().item(), join_intervals(sum(each.ci95 for each in figures) / len(figures), means)


def _single(found: Found, seed: int) -> Line:
    """The line of a method's training by one seed."""
    own = {title: by_seed[seed] for title, by_seed in found.figures.items() if seed in by_seed}
    figures = {title: _shown(figure.value, figure.ci95) for title, figure in own.items()}
    return {"method": found.method, **figures, **_how(found, [seed], f"{found.row.command()} --seeds {seed}")}


def _how(found: Found, seeds: Sequence[int], command: str) -> Line:
    runs = [run for seed in seeds for run in found.trainings[seed].values()]
    figures = [figure for by_seed in found.figures.values() for figure in by_seed.values()]
    together = {name: ", ".join(dict.fromkeys(run[name] for run in runs)) for name in ("steps", "commit", "machine")}
    return {
        **together,
        "note": "; ".join(filter(None, dict.fromkeys([found.row.note, *(figure.note for figure in figures)]))),
        "seed": ", ".join(map(str, seeds)),
        "episodes": ", ".join(dict.fromkeys(f"{figure.count:,}" for figure in figures if figure.of_episodes)),
        "minutes": f"{sum(float(run['minutes']) for run in runs) / len(seeds):.1f}",
        "command": command,
    }


def _published(row: Row, method: str) -> list[Line]:
    """The papers' lines of a method."""
    papers: dict[str, Line] = {}
    for published in [row.published] if row.published is not None else [each.published for each in row.trainings]:
        for source, figures in (published or {}).items():
            papers.setdefault(source, {"method": method, "source": source}).update(figures)
    return list(papers.values())


def _failures(row: Row, failed: Mapping[str, str]) -> list[Line]:
    reasons = {
        name.removeprefix(f"{row.name}/"): why for name, why in failed.items() if name.startswith(f"{row.name}/")
    }
    text = "; ".join(": ".join(filter(None, (name, " ".join(why.split())))) for name, why in reasons.items())
    return [{"method": row.method, "source": FAILED, "note": text}] if reasons else []


def _differences(found: Sequence[Found]) -> list[Line]:
    """For each pair of methods the first's accuracies minus the second's, on the same episodes, over common seeds."""
    lines = []
    for first, second in combinations(found, 2):
        seeds = [seed for seed in first.seeds_with_values if seed in second.seeds_with_values]
        line = {"method": first.method, "minus": second.method}
        for title in [title for title in first.figures if title in second.figures and seeds]:
            one_of, other_of = first.figures[title], second.figures[title]
            pairs = [(one_of[seed], other_of[seed]) for seed in seeds if seed in one_of and seed in other_of]
            apart = [a.values - b.values for a, b in pairs if a.values is not None and b.values is not None]
            alike = all((a.episodes_hash, a.protocol) == (b.episodes_hash, b.protocol) for a, b in pairs)
            if len(apart) == len(seeds) and alike and pairs[0][0].of_episodes:
                difference, ci95 = average(apart)
                line[title] = f"{100 * difference:+.2f} +- {100 * ci95:.2f}"
        if len(line) > 2:
            command = first.row.command(second.row.name)
            one, other = (_how(each, seeds, command) for each in (first, second))
            both = {name: ", ".join(dict.fromkeys((one[name], other[name]))) for name in ("commit", "machine")}
            lines.append(line | {name: one[name] for name in ("seed", "episodes", "command")} | both)
    return lines


def _shown(value: float, ci95: float) -> str:
    return f"{100 * value:.2f}" + ("" if math.isnan(ci95) else f" +- {100 * ci95:.2f}")


def _write(
    path: Path,
    lines: Sequence[Line],
    keys: Sequence[str],
    methods: Sequence[str],
    always: Sequence[str] = (),
    cleared: Collection[str] = (),
) -> None:
    """Writes lines into a CSV file in place of those of the same keys.

    Failures of `cleared` methods go. Lines stand in the order of the methods that theirs begin with.
    """
    old: list[Line] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    standing = [line for line in old if line.get("source") != FAILED or line["method"] not in cleared]
    kept = {tuple(line[key] for key in keys): line for line in (*standing, *lines)}
    if not lines and len(kept) == len(old):
        return

    def place(line: Line) -> tuple[int, bool]:
        own = max((method for method in methods if line["method"].startswith(method)), key=len, default="")
        return methods.index(own) if own else len(methods), line.get("source", "this library") != "this library"

    every = sorted(kept.values(), key=place)
    used = dict.fromkeys(name for line in every for name, value in line.items() if value)
    columns = [*(name for name in (*used, *always) if name not in BOOKKEEPING), *BOOKKEEPING]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(columns), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)
    write_text(path, text.getvalue())
