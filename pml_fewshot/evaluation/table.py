"""ResultTable: episodic and retrieval figures side by side, each with its interval and its protocol."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pml_fewshot.atomic import write_text
from pml_fewshot.checks import require
from pml_fewshot.evaluation.average import average, averaged_metric
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.retrieval_result import RetrievalResult
from pml_fewshot.evaluation.table_text import LARGEST, figures_csv, latex, markdown, methods_csv, read_figures_csv


@dataclass(frozen=True)
class Judgement:
    """What the rows of one evaluation have in common."""

    method: str
    split: str
    classes: int
    note: str = ""
    transductive: bool = False
    seconds: float | None = None


class ResultTable:
    """Rows of figures; shown with a line a method and a column a figure, as Markdown, CSV or LaTeX.

    `failures` says of methods that have no figures why, and stands below the others.
    """

    def __init__(self, rows: Iterable[ResultRow] = (), failures: Mapping[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.failures = dict(failures or {})

    @classmethod
    def read(cls, folder: str | Path) -> "ResultTable":
        """Reads the figures that `write` left in a folder.

        Raises:
            FileNotFoundError: there is no figures.csv.
            ValueError: it is no table of figures.
        """
        with (Path(folder) / "figures.csv").open("rb") as file:
            return cls(read_figures_csv(file.read(LARGEST + 1)))

    def best_first(self) -> "ResultTable":
        """The same rows, methods in descending order of the figure that came first for each of them."""
        first: dict[str, float] = {}
        for row in self.rows:
            first.setdefault(row.method, row.value)
        return ResultTable(sorted(self.rows, key=lambda row: -first[row.method]), self.failures)

    def add_episodic(self, judged: Judgement, result: EpisodicResult, *more_seeds: EpisodicResult) -> None:
        """Adds the accuracy over episodes, averaged over trainings where more than one result is given."""
        hashes = {each.episodes_hash for each in (result, *more_seeds)}
        require(
            len(hashes) == 1, "trainings judged on the same episodes", str(sorted(hashes)), "use one spec, seed and set"
        )
        value, ci95 = average([each.per_episode for each in (result, *more_seeds)])
        row = ResultRow(
            method=judged.method,
            figure="accuracy",
            value=value,
            ci95=ci95,
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
            trained=1 + len(more_seeds),
            seconds=judged.seconds,
        )
        self.rows.append(row)

    def add_retrieval(self, judged: Judgement, result: RetrievalResult, *more_seeds: RetrievalResult) -> None:
        """Adds a row for each retrieval figure; queries that no neighbour could match are counted in its note."""
        left_out = f"{result.num_left_out} queries alone in their class left out" if result.num_left_out else ""
        for metric in result:
            value, ci95 = averaged_metric(metric, [result, *more_seeds])
            row = ResultRow(
                method=judged.method,
                figure=metric,
                value=value,
                ci95=ci95,
                count=result.num_queries,
                split=judged.split,
                classes=judged.classes,
                protocol=result.protocol,
                ranking=result.ranking,
                note="; ".join(text for text in (judged.note, left_out) if text),
                trained=1 + len(more_seeds),
                seconds=judged.seconds,
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
        """Writes results.csv, results.md, results.tex and figures.csv into an existing folder."""
        written = {
            "results.csv": self.csv(),
            "results.md": self.markdown(),
            "results.tex": self.latex(),
            "figures.csv": self.figures_csv(),
        }
        for name, text in written.items():
            write_text(Path(folder) / name, text)

    def __str__(self) -> str:
        return self.markdown()
