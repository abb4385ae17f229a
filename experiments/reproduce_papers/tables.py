"""Makes the CSV files of docs/results from run folders: means over seeds, single runs and paired differences.

The results of a finished run are kept in docs/results/trainings: its config, its figures, and the accuracies of all
episodes, for paired differences with anything evaluated on the same ones. The tables are made from these files, so
trainings from several machines add up, and the runs themselves may be deleted.
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
    """Results of the runs of a line: figures by column title and seed, and how they were trained."""

    row: Row
    method: str
    figures: dict[str, dict[int, ResultRow]] = field(default_factory=dict)
    trainings: dict[int, Line] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return list(self.trainings)

    @property
    def accuracies(self) -> list[str]:
        """The columns of accuracies over episodes."""
        return [title for title, by_seed in self.figures.items() if all(each.of_episodes for each in by_seed.values())]


def keep(folder: Path, row: Row, kept: Path) -> None:
    """Copies the results of a row's finished trainings from below `folder` to below `kept`, 30 KB each.

    `pml-fewshot compare` accepts such a copy as a run. It has no weights, no paths of this machine, and for retrieval
    no values of single queries, which would take three times as much space as everything else.
    """
    for seed in row.seeds(folder):
        source, place = (row.place(each, seed) for each in (folder, kept))
        stored = read_config(source)
        stored["commands"] = []
        stored["config"] |= {"run_dir": None, "data_root": None}
        if row.finished(kept, seed) and read_config(place).items() >= stored.items():
            continue
        history = history_of(load_checkpoint(row.run_folder(folder, seed) / "last.pt"))
        stored |= {"steps": history.steps, "minutes": history.seconds / 60}
        figures = [each if each.of_episodes else replace(each, values=None) for each in ResultTable.read(source).rows]
        place.mkdir(parents=True, exist_ok=True)
        (place / "figures.csv").unlink(missing_ok=True)
        ResultTable(figures).write_figures(place)
        write_config(place, stored)  # last: it says whose figures these are


def found_in(kept: Path, row: Row) -> list[Found]:
    """Returns the kept results of a row's trainings, one line for each way in which they were evaluated.

    A seed counts only if its config is the row's current one.
    """
    lines: dict[str, Found] = {}
    for seed in row.seeds(kept):
        place = row.place(kept, seed)
        how = _how_trained(read_config(place))
        for figure in ResultTable.read(place).rows:
            (title,) = arrange([figure])[0].values()
            method = row.method + figure.method.removeprefix(row.training.name)
            method += ", transductive" if figure.protocol == "transductive" else ""
            line = lines.setdefault(method, Found(row, method))
            by_seed = line.figures.setdefault(title, {})
            if seed in by_seed or any(each.episodes_hash != figure.episodes_hash for each in by_seed.values()):
                wanted = f"{title} of {row.name} once a seed, on the same episodes"
                raise UsageError(f"expected {wanted}, got another by seed {seed}; evaluate alike")
            by_seed[seed] = figure
            line.trainings[seed] = how
    return list(lines.values())


def _how_trained(stored: Mapping[str, Any]) -> Line:
    sessions = stored["sessions"]
    commits = [session["git commit"] for session in sessions]
    threads, device = (sessions[-1][name] for name in ("threads", "device"))
    return {
        "steps": f"{stored['steps']:,}",
        "minutes": str(stored["minutes"]),
        "commit": ", ".join(dict.fromkeys(each[:7] + "-dirty" * each.endswith("-dirty") for each in commits)),
        "machine": f"{threads} CPU core{'s' * (threads != '1')}" if device == "cpu" else f"a GPU ({device})",
    }


def write_tables(
    folder: Path, rows: Sequence[Row], tables: Path, failed: Mapping[str, str] | None = None, tried: Sequence[str] = ()
) -> None:
    """Keeps all finished runs below `folder`, and writes three files per table: its own, `_seeds` and `_differences`.

    The files are made from everything kept below `tables`. A table's own file keeps its lines of other methods.

    Args:
        rows: all rows, in the order of the tables.
        failed: why a training failed, by the place of its figures below `folder`.
        tried: names of the rows that were run. Their earlier failures are removed from the files.
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
            except UsageError as error:
                failed[f"{row.name}/"] = str(error)
            own = found_in(tables / "trainings", row)
            found += own
            cleared |= {row.method} if own else set()
            means += [_mean(each) for each in own] + (_published(row, own[0].method) if own else [])
            means += _failures(row, failed)
        singles = [_single(each, seed) for each in found for seed in each.seeds]
        methods = [row.method for row in of_table]
        if found or means or cleared:
            _write(tables / f"{table}.csv", _merged(tables / f"{table}.csv", means, methods, cleared), (SPREAD,))
        if found:
            _write(tables / f"{table}_seeds.csv", singles)
            _write(tables / f"{table}_differences.csv", _differences(found), ("method", "minus", *found[0].accuracies))


def _mean(found: Found) -> Line:
    """The line of a method: each figure's mean over its seeds, with the interval over episodes and seeds."""
    line, spread = {"method": found.method, "source": "this library"}, []
    for title, by_seed in found.figures.items():
        if list(by_seed) != found.seeds:  # an episode size that some seeds were not evaluated on
            continue
        line[title] = _shown(*_average(list(by_seed.values())))
        means = [each.value for each in by_seed.values()]
        spread += [f"{100 * (max(means) - min(means)):.2f}"] if title in found.accuracies else []
    line[SPREAD] = " / ".join(spread) if len(found.seeds) > 1 else ""
    return line | _how(found, found.seeds, found.row.command(found.seeds))


def _average(figures: Sequence[ResultRow]) -> tuple[float, float]:
    """Returns the mean over trainings and half its interval.

    If values are missing, the interval is a little too wide, as if all trainings erred on the same episodes.
    """
    values = [each.values for each in figures if each.values is not None]
    if len(values) == len(figures):
        return average(values)
    means = torch.tensor([each.value for each in figures], dtype=torch.float64)
    ci95 = sum(each.ci95 for each in figures) / len(figures)
    no_items = math.isnan(ci95) and len(figures) > 1  # NMI and AMI
    return means.mean().item(), join_intervals(0.0 if no_items else ci95, means)


def _single(found: Found, seed: int) -> Line:
    """The line of a method's training with one seed."""
    own = {title: by_seed[seed] for title, by_seed in found.figures.items() if seed in by_seed}
    figures = {title: _shown(figure.value, figure.ci95) for title, figure in own.items()}
    return {"method": found.method, **figures, **_how(found, [seed], found.row.command([seed]))}


def _how(found: Found, seeds: Sequence[int], command: str) -> Line:
    runs = [found.trainings[seed] for seed in seeds]
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
    """Returns the lines of a method's published figures."""
    papers = row.training.published if row.published is None else row.published
    return [{"method": method, "source": source, **figures} for source, figures in (papers or {}).items()]


def _failures(row: Row, failed: Mapping[str, str]) -> list[Line]:
    reasons = {
        name.removeprefix(f"{row.name}/"): why for name, why in failed.items() if name.startswith(f"{row.name}/")
    }
    text = "; ".join(": ".join(filter(None, (name, " ".join(why.split())))) for name, why in reasons.items())
    return [{"method": row.method, "source": FAILED, "note": text}] if reasons else []


def _differences(found: Sequence[Found]) -> list[Line]:
    """For each pair of methods, the first's accuracies minus the second's, on the same episodes, over common seeds."""
    lines = []
    for first, second in combinations(found, 2):
        line, seeds = {"method": first.method, "minus": second.method}, list[int]()
        for title, of_first in first.figures.items():
            pairs = {seed: (of_first[seed], b) for seed, b in second.figures.get(title, {}).items() if seed in of_first}
            apart = {
                seed: a.values - b.values
                for seed, (a, b) in pairs.items()
                if a.values is not None and b.values is not None
                if (a.episodes_hash, a.protocol) == (b.episodes_hash, b.protocol)
            }
            seeds = seeds or list(apart)
            if seeds and list(apart) == seeds:
                difference, ci95 = average(list(apart.values()))
                line[title] = f"{100 * difference:+.2f} +- {100 * ci95:.2f}"
        if seeds:
            command = first.row.command(seeds, second.row.name)
            one, other = (_how(each, seeds, command) for each in (first, second))
            both = {name: ", ".join(dict.fromkeys((one[name], other[name]))) for name in ("commit", "machine")}
            lines.append(line | {name: one[name] for name in ("seed", "episodes", "command")} | both)
    return lines


def _shown(value: float, ci95: float) -> str:
    return f"{100 * value:.2f}" + ("" if math.isnan(ci95) else f" +- {100 * ci95:.2f}")


def _merged(path: Path, lines: Sequence[Line], methods: Sequence[str], cleared: Collection[str]) -> list[Line]:
    """Returns the lines of a table's file, with those of the same method and source replaced and new ones added.

    Failures of `cleared` methods are dropped. Lines are in the order of the methods that theirs begin with.
    """
    old: list[Line] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    standing = [line for line in old if line["source"] != FAILED or line["method"] not in cleared]
    every = {(line["method"], line["source"]): line for line in (*standing, *lines)}

    def place(line: Line) -> tuple[int, bool]:
        own = max((method for method in methods if line["method"].startswith(method)), key=len, default="")
        return methods.index(own) if own else len(methods), line["source"] != "this library"

    return sorted(every.values(), key=place)


def _write(path: Path, lines: Sequence[Line], always: Sequence[str] = ()) -> None:
    used = dict.fromkeys(name for line in lines for name, value in line.items() if value)
    columns = [*(name for name in (*used, *always) if name not in BOOKKEEPING), *BOOKKEEPING]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(columns), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
