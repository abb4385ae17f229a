"""ResultRow: one figure with everything needed to read it; and the layout of rows in lines and columns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

TITLES = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
    "mean_average_precision": "MAP",
    "mean_reciprocal_rank": "MRR",
    "variable_accuracy": "variable ways and shots",
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure with everything needed to read and reproduce it; fields that do not apply are None or empty.

    Args:
        method, figure: what was evaluated, and accuracy, precision_at_1, ...
        value: mean, a fraction of 1; `ci95` is half its 95 % interval.
        ways, shots, queries, query_balance, seed: of the episodes; with variable ways and shots, only the seed.
        count: number of episodes, or of queries for retrieval, that the mean is over.
        split: the split that was evaluated: test, val or train; empty for a set without splits. `classes` is the number
            of its classes.
        protocol: inductive: each query alone; transductive: queries inform each other; leave-one-out: each searches the
            rest; gallery: each searches a set of references; fixed support: each is classified with given items of all
            classes.
        ranking: index and distance of a retrieval.
        classifier: head and distance that classified episodes.
        episodes_hash: equal for results on the same episodes, or of the same queries.
        note: what a reader must know about the data.
        trained: number of trainings (seeds) that the figure is averaged over.
        values: (count,) the values that the mean is over, one per episode or query (averaged over several trainings),
            for paired comparisons; None for NMI and AMI. Stored in a separate file.
        seconds: time to evaluate the method, all its figures and embedding together, if timed.
    """

    method: str
    figure: str
    value: float
    ci95: float
    ways: int | None = None
    shots: int | None = None
    queries: int | None = None
    query_balance: float | None = None
    count: int
    seed: int | None = None
    split: str = ""
    classes: int
    protocol: Literal["inductive", "transductive", "leave-one-out", "gallery", "fixed support"]
    ranking: str = ""
    episodes_hash: str = ""
    note: str = ""
    trained: int = 1
    seconds: float | None = None
    classifier: str = ""
    values: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def of_episodes(self) -> bool:
        return self.seed is not None

    @property
    def column(self) -> str:
        if self.ways is None:
            return self.figure
        balance = "" if self.query_balance is None else f"_dirichlet{self.query_balance}".removesuffix(".0")
        return f"{self.ways}way_{self.shots}shot_{self.queries}query{balance}"

    @property
    def balance(self) -> str:
        """How the queries are divided among the classes, where it matters: always for transductive methods."""
        if self.query_balance is not None:
            return f"queries unbalanced (Dirichlet {self.query_balance:g})"
        return "as many queries of each class" if self.protocol == "transductive" else ""

    @property
    def conditions(self) -> str:
        """How the figure was obtained."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        what = "episodes" if self.of_episodes else "queries"
        episodes = self.episodes_hash and f"{what} {self.episodes_hash}"
        return ", ".join(filter(None, (self.protocol, self.balance, self.classifier or self.ranking, seed, episodes)))


Lines = dict[str, dict[str, ResultRow]]  # name of a method on one set of classes -> its figures by column


def arrange(rows: Sequence[ResultRow]) -> tuple[dict[str, str], Lines]:
    """Returns columns, name -> title, and lines, each in the order of their first rows."""
    columns: dict[str, str] = {}
    lines: Lines = {}
    several_splits = len({row.split for row in rows}) > 1
    several_queries = len({row.queries for row in rows if row.ways}) > 1
    for row in rows:
        title = TITLES.get(row.figure, row.figure.replace("recall_at_", "recall@"))
        if row.ways is not None:
            title = f"{row.ways}-way {row.shots}-shot" + (f" {row.queries}-query" if several_queries else "")
            title += "" if row.query_balance is None else f", Dirichlet {row.query_balance:g}"
        columns[row.column] = title
        name = line = _one_line(row.method) + (f" ({row.split})" if several_splits and row.split else "")
        if row.protocol == "transductive" or (not row.of_episodes and f"{name} (transductive)" in lines):
            name = line = f"{name} (transductive)"
        number = 1
        while row.column in lines.get(line, {}):  # the same figure by another protocol, seed or set: a line of its own
            number += 1
            line = f"{name} #{number}"
        lines.setdefault(line, {})[row.column] = row
    return columns, lines


def layout(rows: Sequence[ResultRow], failures: Mapping[str, str]) -> tuple[list[list[str]], list[str]]:
    """Returns cells in percent with 95 % intervals, header line first, and the conditions of the figures."""
    columns, lines = arrange(rows)
    seconds = [next(iter(figures.values())).seconds for figures in lines.values()]
    timed = [] if seconds.count(None) == len(seconds) else ["seconds"]
    head = ["method", *(columns.values() or ["figures"][: len(failures)]), *timed]
    cells = [head]
    for (name, figures), taken in zip(lines.items(), seconds, strict=True):
        of_columns = (_cell(figures[column]) if column in figures else "" for column in columns)
        cells.append([name, *of_columns, *("" if taken is None else f"{taken:.2f}" for _ in timed)])
    for name, why in failures.items():
        cells.append([_one_line(name), f"failed: {_one_line(why)}", *[""] * (len(head) - 2)])
    return cells, _conditions(lines)


def _conditions(lines: Lines) -> list[str]:
    """Returns how the figures were obtained: first what holds for all lines, then what holds for some."""
    texts: dict[str, list[str]] = {}
    for name, figures in lines.items():
        rows = list(figures.values())
        classes = f"{rows[0].classes:,} classes"
        own = [f"{rows[0].split}, {classes}" if rows[0].split else classes, *(row.note for row in rows)]
        for row in rows:
            if not row.of_episodes:
                own.append(f"{row.count:,} queries, {row.protocol}, {row.ranking}")
            else:
                size = f"of {row.queries} queries a class" if row.ways else "of variable ways and shots"
                size += " on average" if row.query_balance is not None else ""
                parts = (f"{row.count:,} episodes {size}", f"seed {row.seed}", row.protocol, row.balance)
                own.append(", ".join(filter(None, parts)))
                own.append(row.classifier)
        own += [f"means of {rows[0].trained} training runs"] if rows[0].trained > 1 else []
        texts[name] = list(dict.fromkeys(_one_line(text) for text in own if text))
    common = [text for text in next(iter(texts.values()), []) if all(text in others for others in texts.values())]
    groups: dict[str, list[str]] = {}
    for name, own in texts.items():
        groups.setdefault("; ".join(text for text in own if text not in common), []).append(name)
    named = [f"{', '.join(names)}: {own}" for own, names in groups.items() if own]
    return ["; ".join(["%, +- 95 % intervals", *common]), *named] if lines else []


def _cell(row: ResultRow) -> str:
    return f"{100 * row.value:.2f}" + ("" if math.isnan(row.ci95) else f" +- {100 * row.ci95:.2f}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
