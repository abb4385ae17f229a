"""ResultTable: figures of episodes and of retrieval side by side, each with its interval and its protocol."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult
from pml_fewshot.evaluation.statistics import average, average_metric
from pml_fewshot.evaluation.table_formats import ResultRow, figures_csv, latex, markdown, methods_csv, read_figures_csv
from pml_fewshot.io.atomic import write_text


@dataclass(frozen=True)
class RowContext:
    """What the rows of one evaluation have in common."""

    method: str
    split: str
    classes: int
    note: str = ""
    transductive: bool = False
    seconds: float | None = None

    @property
    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("method", "split", "classes", "seconds")}


class ResultTable:
    """Rows of figures, shown with a line a method and a column a figure.

    `failures` gives the reason for each method that has no figures, and stands below the others.
    """

    def __init__(self, rows: Iterable[ResultRow] = (), failures: Mapping[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.failures = dict(failures or {})

    @classmethod
    def read(cls, folder: str | Path) -> "ResultTable":
        """Reads the figures that `write` left in a folder.

        Raises:
            MissingFileError: there is no figures.csv.
            UsageError: it is no table of figures.
        """
        path = Path(folder) / "figures.csv"
        if not path.is_file():
            raise MissingFileError(f"expected a finished run in {folder}, got no figures.csv; finish it with --resume")
        return cls(read_figures_csv(path.read_bytes()))

    def best_first(self) -> "ResultTable":
        """The same rows, methods in descending order of the figure that came first for each of them."""
        first: dict[str, float] = {}
        for row in self.rows:
            first.setdefault(row.method, row.value)
        return ResultTable(sorted(self.rows, key=lambda row: -first[row.method]), self.failures)

    def add_episodic(self, context: RowContext, *trainings: EpisodicResult) -> None:
        """Adds the accuracy over episodes of one training, or the mean of several."""
        first = trainings[0]
        hashes = sorted({result.episodes_hash for result in trainings})
        if len(hashes) > 1:
            raise UsageError(
                f"expected trainings evaluated on the same episodes, got {hashes}; use one spec, seed and set"
            )
        value, ci95 = average([result.per_episode for result in trainings])
        row = ResultRow(
            **context.shared,
            figure="accuracy",
            value=value,
            ci95=ci95,
            **asdict(first.spec),
            count=len(first.per_episode),
            seed=first.seed,
            protocol="transductive" if context.transductive else "inductive",
            episodes_hash=first.episodes_hash,
            note=context.note,
            trained=len(trainings),
        )
        self.rows.append(row)

    def add_retrieval(self, context: RowContext, *trainings: RetrievalResult) -> None:
        """Adds a row for each retrieval figure; queries that no neighbor could match are counted in its note."""
        first = trainings[0]
        excluded = f"{first.num_excluded} queries alone in their class left out" if first.num_excluded else ""
        for metric in first:
            value, ci95 = average_metric(metric, trainings)
            row = ResultRow(
                **context.shared,
                figure=metric,
                value=value,
                ci95=ci95,
                count=first.num_queries,
                protocol=first.protocol,
                ranking=first.ranking,
                note="; ".join(text for text in (context.note, excluded) if text),
                trained=len(trainings),
            )
            self.rows.append(row)

    def markdown(self) -> str:
        """A line a method, a column a figure, in percent with 95 % intervals; the conditions below."""
        return markdown(self.rows, self.failures)

    def latex(self) -> str:
        """The same as a LaTeX tabular with the rules of booktabs; the conditions as comments."""
        return latex(self.rows, self.failures)

    def csv(self) -> str:
        """Comma-separated values at full precision, a line a method, four columns a figure."""
        return methods_csv(self.rows, self.failures)

    def figures_csv(self) -> str:
        """Comma-separated values at full precision, a line a figure, with all of a ResultRow."""
        return figures_csv(self.rows)

    def write(self, folder: str | Path) -> None:
        """Writes results.csv, results.md, and last figures.csv, whose presence marks a finished run."""
        write_text(Path(folder) / "results.csv", self.csv())
        write_text(Path(folder) / "results.md", self.markdown())
        write_text(Path(folder) / "figures.csv", self.figures_csv())

    def __str__(self) -> str:
        return self.markdown()
