"""ResultRow, and the texts of many: Markdown, LaTeX and CSV with a line a method, and CSV with a line a figure."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from pml_fewshot.checks import UsageError, check_choice

TITLES = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
    "mean_average_precision": "MAP",
    "mean_reciprocal_rank": "MRR",
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure with all that is needed to read and to repeat it; what does not apply is None or empty.

    Args:
        method: what was evaluated.
        figure: accuracy, precision_at_1, ...
        value: mean, a fraction of 1; `ci95` is half its 95 % interval.
        ways, shots, queries, seed: of the episodes.
        count: episodes, or queries for retrieval, that the mean is over.
        split: the classes evaluated on, test or val; `classes` is how many they are.
        protocol: inductive: each query alone; transductive: queries inform each other; leave-one-out: each searches the
            rest; gallery: each searches a set of references.
        ranking: index and distance of a retrieval.
        episodes_hash: equal for results on the same episodes.
        note: what a reader must know of the data.
        trained: trainings (seeds) that the figure is averaged over.
        seconds: that evaluating the method took, all its figures and embedding together, where it was timed.
    """

    method: str
    figure: str
    value: float
    ci95: float
    ways: int | None = None
    shots: int | None = None
    queries: int | None = None
    count: int
    seed: int | None = None
    split: str
    classes: int
    protocol: Literal["inductive", "transductive", "leave-one-out", "gallery"]
    ranking: str = ""
    episodes_hash: str = ""
    note: str = ""
    trained: int = 1
    seconds: float | None = None

    @property
    def column(self) -> str:
        return self.figure if self.ways is None else f"{self.ways}way_{self.shots}shot_{self.queries}query"

    @property
    def conditions(self) -> str:
        """How the figure came about."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        episodes = self.episodes_hash and f"episodes {self.episodes_hash}"
        return ", ".join(text for text in (self.protocol, self.ranking, seed, episodes) if text)


Lines = dict[str, dict[str, ResultRow]]  # name of a method on one set of classes -> its figures by column


def markdown(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """Figures in percent with 95 % intervals, a line for each failure, and below what the figures are means of."""
    (head, *body), conditions = _layout(rows, failures)
    lines = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in (head, ["---"] * len(head), *body))
    return "".join(f"| {line} |\n" for line in lines) + "".join(f"\n{condition}\n" for condition in conditions)


def latex(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """A tabular with the rules of booktabs; what the figures are means of as comments."""
    cells, conditions = _layout(rows, failures)
    special: dict[str, str | int | None] = {character: "\\" + character for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escaped = ([cell.translate(str.maketrans(special)).replace("+-", r"$\pm$") for cell in line] for line in cells)
    head, *body = (" & ".join(line) + r" \\" for line in escaped)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            *(f"% {condition}" for condition in conditions),
            rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            "\\end{tabular}\n",
        ]
    )


def methods_csv(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """A line a method: of each figure the value, its interval, what it is a mean of and how it came about."""
    columns, lines = _grid(rows)
    about = ["method", "split", "classes", "trained", "seconds"]
    parts = {"": "value", "_ci95": "ci95", "_count": "count", "_protocol": "conditions"}
    table = []
    for figures in lines.values():
        first = next(iter(figures.values()))
        cells = {name: getattr(first, name) for name in about}
        cells["note"] = "; ".join(dict.fromkeys(row.note for row in figures.values() if row.note))
        for column, row in figures.items():
            cells |= {column + part: getattr(row, name) for part, name in parts.items()}
        table.append(cells)
    table += [{"method": name, "note": f"failed: {why}"} for name, why in failures.items()]
    return _csv([*about, "note", *(column + part for column in columns for part in parts)], table)


def figures_csv(rows: Sequence[ResultRow]) -> str:
    """A line a figure, with all that its row holds."""
    return _csv([f.name for f in fields(ResultRow)], map(asdict, rows))


def read_figures_csv(content: bytes) -> list[ResultRow]:
    """The rows that figures_csv wrote.

    Raises:
        UsageError: other columns, a line of another length, or a value of another type.
    """
    names = [f.name for f in fields(ResultRow)]
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        if reader.fieldnames != names:
            raise UsageError(f"expected the columns {names}, got {reader.fieldnames}; read a figures.csv")
        rows = []
        for cells in reader:
            if None in cells or None in cells.values():
                raise UsageError(
                    f"expected {len(names)} cells in line {reader.line_num}, got another number; restore it"
                )
            rows.append(ResultRow(**{f.name: _parsed(cells[f.name], f.type) for f in fields(ResultRow)}))
    except UsageError:
        raise
    except (csv.Error, ValueError) as error:
        raise UsageError(f"expected a table of figures, got a broken one ({error}); evaluate again") from error
    return rows


def _parsed(text: str, kind: Any) -> Any:
    if kind in (int | None, float | None):
        return None if text == "" else get_args(kind)[0](text)
    if get_origin(kind) is Literal:
        check_choice("the cell", text, get_args(kind))
    return kind(text) if kind in (int, float) else text


def _grid(rows: Sequence[ResultRow]) -> tuple[dict[str, str], Lines]:
    """Columns, name -> title, and lines, each in the order of their first rows."""
    columns: dict[str, str] = {}
    lines: Lines = {}
    several_splits = len({row.split for row in rows}) > 1
    several_queries = len({row.queries for row in rows if row.ways}) > 1
    for row in rows:
        title = TITLES.get(row.figure, row.figure.replace("recall_at_", "recall@"))
        if row.ways is not None:
            title = f"{row.ways}-way {row.shots}-shot" + (f" {row.queries}-query" if several_queries else "")
        columns[row.column] = title
        name = line = _one_line(row.method) + (f" ({row.split})" if several_splits else "")
        if row.protocol == "transductive" or (row.ways is None and f"{name} (transductive)" in lines):
            name = line = f"{name} (transductive)"
        number = 1
        while row.column in lines.get(line, {}):  # the same figure by another protocol, seed or set: a line of its own
            number += 1
            line = f"{name} #{number}"
        lines.setdefault(line, {})[row.column] = row
    return columns, lines


def _layout(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> tuple[list[list[str]], list[str]]:
    """Cells, of which the first line is the head, and what the figures are means of."""
    columns, lines = _grid(rows)
    seconds = {name: next(iter(figures.values())).seconds for name, figures in lines.items()}
    timed = ["seconds"] if any(value is not None for value in seconds.values()) else []
    head = ["method", *(columns.values() or ["figures"][: len(failures)]), *timed]
    cells = [head]
    for name, figures in lines.items():
        taken = [f"{seconds[name]:.2f}" if seconds[name] is not None else "" for _ in timed]
        cells.append([name, *(_cell(figures.get(column)) for column in columns), *taken])
    for name, why in failures.items():
        cells.append([_one_line(name), f"failed: {_one_line(why)}", *[""] * (len(head) - 2)])
    return cells, _conditions(lines)


def _conditions(lines: Lines) -> list[str]:
    """What the figures are means of and how they came about: what holds for all lines, then what holds for some."""
    texts: dict[str, list[str]] = {}
    for name, figures in lines.items():
        rows = list(figures.values())
        own = [f"{rows[0].split}, {rows[0].classes:,} classes", *(row.note for row in rows)]
        for row in rows:
            episodes = f"{row.count:,} episodes of {row.queries} queries a class, seed {row.seed}, {row.protocol}"
            own.append(episodes if row.ways is not None else f"{row.count:,} queries, {row.conditions}")
        own += [f"means of {rows[0].trained} trainings"] if rows[0].trained > 1 else []
        texts[name] = list(dict.fromkeys(_one_line(text) for text in own if text))
    common = [text for text in next(iter(texts.values()), []) if all(text in others for others in texts.values())]
    groups: dict[str, list[str]] = {}
    for name, own in texts.items():
        groups.setdefault("; ".join(text for text in own if text not in common), []).append(name)
    named = [f"{', '.join(names)}: {own}" for own, names in groups.items() if own]
    return ["; ".join(["%, +- 95 % intervals", *common]), *named] if lines else []


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return ""
    return f"{100 * row.value:.2f}" + ("" if math.isnan(row.ci95) else f" +- {100 * row.ci95:.2f}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _csv(names: list[str], table: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
