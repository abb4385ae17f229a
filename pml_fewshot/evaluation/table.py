"""ResultTable: episodic and retrieval figures in one table, each with its interval and its protocol."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult

TITLES = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure with all that is needed to read and to repeat it; what does not apply is None or empty."""

    method: str
    """what was judged"""
    figure: str
    """accuracy, precision_at_1, ..."""
    value: float
    """mean, a fraction of 1"""
    ci95: float
    """half the 95 % interval of the mean"""
    ways: int | None = None
    """of the episodes"""
    shots: int | None = None
    queries: int | None = None
    count: int
    """episodes, or queries for retrieval, that the mean is over"""
    seed: int | None = None
    """of the episodes"""
    split: str
    """classes judged on: test or val"""
    classes: int
    """in that split"""
    protocol: Literal["inductive", "transductive", "leave-one-out", "gallery"]
    """inductive: each query alone; transductive: queries inform each other; leave-one-out: each searches the rest;
    gallery: each searches a set of references"""
    ranking: str = ""
    """index and distance of a retrieval"""
    episodes_hash: str = ""
    """equal for results on the same episodes"""
    note: str = ""
    """what a reader must know of the data"""


@dataclass(frozen=True)
class Judgement:
    """What the rows of one evaluation have in common."""

    method: str
    split: str
    classes: int
    note: str = ""
    transductive: bool = False


class ResultTable:
    """Rows of figures, printed as Markdown and written as results.csv and results.md."""

    def __init__(self, rows: Iterable[ResultRow] = ()) -> None:
        self.rows = list(rows)

    def add_episodic(self, judged: Judgement, result: EpisodicResult) -> None:
        """Adds the accuracy over episodes."""
        row = ResultRow(
            method=judged.method,
            figure="accuracy",
            value=result.mean,
            ci95=result.ci95,
            ways=result.spec.ways,
            shots=result.spec.shots,
            queries=result.spec.queries,
            count=len(result.per_episode),
            seed=result.seed,
            split=judged.split,
            classes=judged.classes,
            protocol="transductive" if judged.transductive else "inductive",
            episodes_hash=result.episodes_hash,
            note=judged.note,
        )
        self.rows.append(row)

    def add_retrieval(self, judged: Judgement, result: RetrievalResult) -> None:
        """Adds a row for each retrieval figure; queries that no neighbour could match are counted in its note."""
        left_out = f"{result.num_left_out} queries alone in their class left out" if result.num_left_out else ""
        for metric, value in result.items():
            row = ResultRow(
                method=judged.method,
                figure=metric,
                value=value,
                ci95=result.ci95(metric),
                count=result.num_queries,
                split=judged.split,
                classes=judged.classes,
                protocol=result.protocol,
                ranking=result.ranking,
                note="; ".join(text for text in (judged.note, left_out) if text),
            )
            self.rows.append(row)

    def markdown(self) -> str:
        """A Markdown table; accuracies in percent with their 95 % interval."""
        lines = [
            "| method | figure | % | 95 % interval | over | split | protocol |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            if row.ways is not None:
                figure = f"{row.ways}-way {row.shots}-shot accuracy"
                over = f"{row.count:,} episodes of {row.queries} queries a class, seed {row.seed}"
            else:
                figure = TITLES.get(row.figure, row.figure.replace("_", " "))
                over = f"{row.count:,} queries"
            split = f"{row.split}, {row.classes:,} classes" + (f" ({row.note})" if row.note else "")
            protocol = ", ".join(text for text in (row.protocol, row.ranking) if text)
            numbers = (f"{100 * row.value:.2f}", f"+- {100 * row.ci95:.2f}")
            cells = (text.replace("|", "\\|") for text in (row.method, figure, *numbers, over, split, protocol))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Comma-separated values, one row a figure, values at full precision."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [field.name for field in fields(ResultRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return out.getvalue()

    def write(self, folder: str | Path) -> None:
        """Writes results.csv and results.md into an existing folder."""
        (Path(folder) / "results.csv").write_text(self.csv(), encoding="utf-8")
        (Path(folder) / "results.md").write_text(self.markdown(), encoding="utf-8")

    def __str__(self) -> str:
        return self.markdown()
