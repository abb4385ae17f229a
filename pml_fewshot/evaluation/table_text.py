"""Texts of a result table: Markdown, LaTeX and CSV with a line a method, and CSV with a line a figure."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from pml_fewshot.checks import check_choice, require
from pml_fewshot.evaluation.result_row import ResultRow

TITLES = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
    "mean_average_precision": "MAP",
    "mean_reciprocal_rank": "MRR",
}


LARGEST = 2**26  # bytes of a figures.csv: 200,000 figures


@dataclass
class _Line:
    """One method on one set of classes: its figures by column."""

    name: str
    figures: dict[str, ResultRow] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        return next(iter(self.figures.values())).seconds

    def conditions(self) -> list[str]:
        """Of what the figures are means, and how they came to be."""
        rows = list(self.figures.values())
        texts = [f"{rows[0].split}, {rows[0].classes:,} classes", *(row.note for row in rows)]
        for row in rows:
            if row.ways is not None:
                episodes = f"{row.count:,} episodes of {row.queries} queries a class"
                texts.append(f"{episodes}, seed {row.seed}, {row.protocol}")
            else:
                texts.append(f"{row.count:,} queries, {_protocol(row)}")
        if rows[0].trained > 1:
            texts.append(f"means of {rows[0].trained} trainings")
        return list(dict.fromkeys(" ".join(text.split()) for text in texts if text))


def markdown(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """Figures in percent with 95 % intervals, a line for each failure, and below what the figures are means of."""
    columns, lines = _grid(rows)
    timed = any(line.seconds is not None for line in lines)
    head = ["method", *(columns.values() or (["figures"] if failures else [])), *(["seconds"] if timed else [])]
    table = [head, ["---"] * len(head)]
    for line in lines:
        cells = [_cell(line.figures.get(column), "+-") for column in columns]
        table.append([line.name, *cells, *([_seconds(line)] if timed else [])])
    table += [_failed(name, why, len(head)) for name, why in failures.items()]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in table)
    return text + "".join(f"\n{condition}\n" for condition in _conditions(lines))


def latex(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """A tabular with the rules of booktabs; what the figures are means of as comments."""
    columns, lines = _grid(rows)
    timed = any(line.seconds is not None for line in lines)
    head = [
        _escaped(title)
        for title in (
            "method",
            *(columns.values() or (["figures"] if failures else [])),
            *(["seconds"] if timed else []),
        )
    ]
    body = []
    for line in lines:
        cells = [_cell(line.figures.get(column), r"$\pm$") for column in columns]
        body.append([_escaped(line.name), *cells, *([_seconds(line)] if timed else [])])
    body += [_failed(_escaped(name), _escaped(why), len(head)) for name, why in failures.items()]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            *(f"% {condition}" for condition in _conditions(lines)),
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *(" & ".join(cells) + r" \\" for cells in body),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def methods_csv(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> str:
    """A line a method: of each figure the value, its interval, what it is a mean of and how it came to be."""
    columns, lines = _grid(rows)
    about = ["method", "split", "classes", "trained", "seconds", "note"]
    parts = {"": "value", "_ci95": "ci95", "_count": "count"}
    names = about + [column + part for column in columns for part in (*parts, "_protocol")]
    table = []
    for line in lines:
        first = next(iter(line.figures.values()))
        cells = {name: getattr(first, name) for name in about}
        cells["note"] = "; ".join(dict.fromkeys(row.note for row in line.figures.values() if row.note))
        for column, row in line.figures.items():
            cells |= {column + part: getattr(row, name) for part, name in parts.items()}
            cells[column + "_protocol"] = _protocol(row)
        table.append(cells)
    table += [{"method": name, "note": f"failed: {why}"} for name, why in failures.items()]
    return _csv(names, table)


def figures_csv(rows: Sequence[ResultRow]) -> str:
    """A line a figure, with all that its row holds."""
    return _csv([f.name for f in fields(ResultRow)], (asdict(row) for row in rows))


def read_figures_csv(text: str | bytes) -> list[ResultRow]:
    """The rows that figures_csv wrote; bytes are read as UTF-8.

    Raises:
        ValueError: other columns, a line of another length, a value of another type, or more than LARGEST bytes.
    """
    names = [f.name for f in fields(ResultRow)]
    try:
        require(len(text) <= LARGEST, f"at most {LARGEST:,} bytes", f"{len(text):,}", "read a figures.csv")
        lines = io.StringIO(text if isinstance(text, str) else text.decode("utf-8"), newline="")
        reader = csv.DictReader(lines, strict=True)
        require(reader.fieldnames == names, f"the columns {names}", str(reader.fieldnames), "read a figures.csv")
        rows = []
        for row in reader:
            whole = None not in row and None not in row.values()
            require(whole, f"{len(names)} cells in line {reader.line_num}", "another number", "read a figures.csv")
            rows.append(ResultRow(**{f.name: _parsed(row[f.name], f.type) for f in fields(ResultRow)}))
    except (csv.Error, ValueError) as error:
        if str(error).startswith("expected "):
            raise
        raise ValueError(f"expected a table of figures, got a broken one ({error}); write it again") from error
    return rows


def _parsed(text: str, kind: Any) -> Any:
    if kind in (int | None, float | None):
        return None if text == "" else get_args(kind)[0](text)
    if get_origin(kind) is Literal:
        check_choice("the cell", text, get_args(kind))
    return kind(text) if kind in (int, float) else text


def _grid(rows: Sequence[ResultRow]) -> tuple[dict[str, str], list[_Line]]:
    """Columns, name -> title, and lines, each in the order of coming."""
    columns: dict[str, str] = {}
    lines: dict[str, _Line] = {}
    several_splits = len({row.split for row in rows}) > 1
    queries = {row.queries for row in rows if row.ways}
    for row in rows:
        if row.ways is not None:
            column, title = f"{row.ways}way_{row.shots}shot_{row.queries}query", f"{row.ways}-way {row.shots}-shot"
            title += f" {row.queries}-query" if len(queries) > 1 else ""
        else:
            column, title = row.figure, TITLES.get(row.figure, row.figure.replace("recall_at_", "recall@"))
        columns[column] = title
        name = " ".join(row.method.split()) + (f" ({row.split})" if several_splits else "")
        if row.protocol == "transductive" or (row.ways is None and f"{name} (transductive)" in lines):
            name += " (transductive)"
        number = 1
        line = lines.setdefault(name, _Line(name))
        while column in line.figures:  # the same figure by another protocol, seed or set: a line of its own
            number += 1
            line = lines.setdefault(f"{name} #{number}", _Line(f"{name} #{number}"))
        line.figures[column] = row
    return columns, list(lines.values())


def _conditions(lines: Sequence[_Line]) -> list[str]:
    """What the figures are means of: what holds for all lines, then what holds for some."""
    texts = [line.conditions() for line in lines]
    common = [text for text in texts[0] if all(text in others for others in texts)] if texts else []
    groups: dict[str, list[str]] = {}
    for line, conditions in zip(lines, texts, strict=True):
        own = "; ".join(text for text in conditions if text not in common)
        groups.setdefault(own, []).append(line.name)
    named = [f"{', '.join(names)}: {own}" for own, names in groups.items() if own]
    return ["; ".join(["%, +- 95 % intervals", *common]), *named] if lines else []


def _cell(row: ResultRow | None, plus_minus: str) -> str:
    if row is None:
        return ""
    interval = "" if math.isnan(row.ci95) else f" {plus_minus} {100 * row.ci95:.2f}"
    return f"{100 * row.value:.2f}{interval}"


def _failed(name: str, why: str, width: int) -> list[str]:
    """The line of a method that has no figures."""
    return [" ".join(name.split()), f"failed: {' '.join(why.split())}", *[""] * (width - 2)]


def _seconds(line: _Line) -> str:
    return "" if line.seconds is None else f"{line.seconds:.2f}"


def _protocol(row: ResultRow) -> str:
    seed = "" if row.seed is None else f"seed {row.seed}"
    episodes = row.episodes_hash and f"episodes {row.episodes_hash}"
    return ", ".join(text for text in (row.protocol, row.ranking, seed, episodes) if text)


def _escaped(text: str) -> str:
    special: dict[str, str | int | None] = {character: "\\" + character for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return text.translate(str.maketrans(special))


def _csv(names: list[str], table: Iterable[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
