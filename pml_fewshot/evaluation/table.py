"""ResultTable: figures of episodes and of retrieval in one table, each with its interval and its protocol."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from pml_fewshot.checks import MissingFileError, UsageError, check_choice, import_extra
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult
from pml_fewshot.evaluation.statistics import average, average_metric
from pml_fewshot.evaluation.table_formats import ResultRow, arrange, layout
from pml_fewshot.io.atomic import atomic_write, write_text
from pml_fewshot.sampling.episodes import EpisodeSpec

if TYPE_CHECKING:
    import pandas

LATER = ("query_balance",)  # columns that figures from older versions do not have
STORED = [each for each in fields(ResultRow) if each.name != "values"]  # the columns of figures.csv


@dataclass(frozen=True)
class RowContext:
    """The values that all rows of one evaluation share."""

    method: str
    split: str
    classes: int
    note: str = ""
    seconds: float | None = None

    @property
    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("method", "split", "classes", "seconds")}


class ResultTable:
    """Rows of figures, shown with one line per method and one column per figure.

    `failures` holds the reason for each method without figures; they are shown below the others.
    """

    def __init__(self, rows: Iterable[ResultRow] = (), failures: Mapping[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.failures = dict(failures or {})

    @classmethod
    def read(cls, folder: str | Path) -> "ResultTable":
        """Reads the figures that `write` left in a folder, and the values whose means they are.

        Raises:
            MissingFileError: there is no figures.csv.
            UsageError: it has other columns, a line of the wrong length, or a value of the wrong type; or values.npz is
                damaged or belongs to other figures.
        """
        path = Path(folder) / "figures.csv"
        if not path.is_file():
            raise MissingFileError(f"expected a finished run in {folder}, got no figures.csv; finish it with --resume")
        names = [each.name for each in STORED]
        table = cls()
        try:
            reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline=""), strict=True)
            if (present := list(reader.fieldnames or ())) not in (names, [name for name in names if name not in LATER]):
                raise ValueError(f"columns {reader.fieldnames}, not {names}")
            for cells in reader:
                if None in cells or None in cells.values():
                    raise ValueError(f"line {reader.line_num} has not {len(present)} cells")
                kinds = {each.name: each.type for each in STORED}
                table.rows.append(ResultRow(**{name: _parsed(cells[name], kinds[name]) for name in present}))
        except (csv.Error, ValueError) as error:
            raise UsageError(f"expected figures in {path}, got a broken table ({error}); evaluate again") from error
        values = _read_values(path.with_name("values.npz"))
        for number, row in enumerate(table.rows):
            own = values.get(str(number))
            if own is not None and (len(own) != row.count or abs(own.mean().item() - row.value) > 1e-9):
                got = f"others than of line {number + 2} of figures.csv; evaluate again"
                raise UsageError(f"expected the values of the figures in {path.with_name('values.npz')}, got {got}")
            table.rows[number] = replace(row, values=own)
        return table

    def best_first(self) -> "ResultTable":
        """Returns the same rows, with lines in descending order of the first figure of each."""
        lines = [list(figures.values()) for figures in arrange(self.rows)[1].values()]
        lines.sort(key=lambda rows: -rows[0].value)
        return ResultTable([row for rows in lines for row in rows], self.failures)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns a DataFrame with one row per figure and a column for each attribute of a ResultRow but `values`."""
        pandas = import_extra("tables", "for a DataFrame", "pandas")
        return pandas.DataFrame([{each.name: getattr(row, each.name) for each in STORED} for row in self.rows])

    def add_episodic(self, context: RowContext, *trainings: EpisodicResult) -> None:
        """Adds the accuracy over episodes of one training, or the mean of several."""
        first = trainings[0]
        hashes = sorted({result.episodes_hash for result in trainings})
        if len(hashes) > 1:
            raise UsageError(f"expected trainings evaluated on the same episodes, got {hashes}; use one spec and seed")
        value, ci95 = average([result.per_episode for result in trainings])
        size = asdict(first.spec) if isinstance(first.spec, EpisodeSpec) else {}
        row = ResultRow(
            **context.shared,
            **size,
            figure="accuracy" if size else "variable_accuracy",
            value=value,
            ci95=ci95,
            count=len(first.per_episode),
            seed=first.seed,
            protocol="transductive" if first.transductive else "inductive",
            episodes_hash=first.episodes_hash,
            classifier="; ".join(dict.fromkeys(result.classifier for result in trainings)),
            note=context.note,
            trained=len(trainings),
            values=torch.stack([result.per_episode for result in trainings]).mean(dim=0),
        )
        self.rows.append(row)

    def add_retrieval(self, context: RowContext, *trainings: RetrievalResult) -> None:
        """Adds a row for each retrieval figure; queries that no neighbor could match are counted in its note."""
        first = trainings[0]
        excluded = f"{first.num_excluded} queries alone in their class left out" if first.num_excluded else ""
        for metric in first:
            value, ci95 = average_metric(metric, trainings)
            values = [each.per_query[metric] for each in trainings if metric in each.per_query]  # none for NMI, AMI
            row = ResultRow(
                **context.shared,
                figure=metric,
                value=value,
                ci95=ci95,
                count=first.num_queries,
                protocol=first.protocol,
                ranking=first.ranking,
                episodes_hash=first.queries_hash,
                note="; ".join(filter(None, (context.note, excluded))),
                trained=len(trainings),
                values=torch.stack(values).mean(dim=0) if values else None,
            )
            self.rows.append(row)

    def markdown(self) -> str:
        """Returns one line per method and one column per figure, in percent with 95 % intervals; conditions below."""
        (head, *body), conditions = layout(self.rows, self.failures)
        lines = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in (head, ["---"] * len(head), *body))
        return "".join(f"| {line} |\n" for line in lines) + "".join(f"\n{condition}\n" for condition in conditions)

    def latex(self) -> str:
        """Returns the same as a LaTeX tabular with booktabs rules; the conditions as comments."""
        cells, conditions = layout(self.rows, self.failures)
        special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        escapes = str.maketrans(special | {character: f"\\{character}" for character in "&%$#_{}"})
        escaped = ([cell.translate(escapes).replace("+-", r"$\pm$") for cell in line] for line in cells)
        head, *body = (" & ".join(line) + r" \\" for line in escaped)
        comments = [r"% needs \usepackage{booktabs}", *(f"% {condition}" for condition in conditions)]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}"
        end = "\\end{tabular}\n"
        return "\n".join([*comments, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])

    def csv(self) -> str:
        """Returns comma-separated values at full precision, one line per method and four columns per figure."""
        columns, lines = arrange(self.rows)
        about = ["method", "split", "classes", "trained", "seconds"]
        parts = {"": "value", "_ci95": "ci95", "_count": "count", "_protocol": "conditions"}
        table = []
        for figures in lines.values():
            rows = figures.values()
            cells = {name: getattr(next(iter(rows)), name) for name in about}
            cells["note"] = "; ".join(dict.fromkeys(row.note for row in rows if row.note))
            cells |= {row.column + part: getattr(row, name) for row in rows for part, name in parts.items()}
            table.append(cells)
        table += [{"method": name, "note": f"failed: {why}"} for name, why in self.failures.items()]
        return _csv([*about, "note", *(column + part for column in columns for part in parts)], table)

    def figures_csv(self) -> str:
        """Returns comma-separated values at full precision, one line per figure, all of a ResultRow but `values`."""
        lines = ({each.name: getattr(row, each.name) for each in STORED} for row in self.rows)
        return _csv([each.name for each in STORED], lines)

    def write(self, folder: str | Path) -> None:
        """Writes results.csv, results.md, values.npz, and last figures.csv, whose presence marks a finished run.

        values.npz holds the values of each row by its number, compressed; numpy can read it.
        """
        write_text(Path(folder) / "results.csv", self.csv())
        write_text(Path(folder) / "results.md", self.markdown())
        self.write_figures(folder)

    def write_figures(self, folder: str | Path) -> None:
        """Writes the files that `read` reads: values.npz and then figures.csv."""
        values = {str(n): row.values.numpy() for n, row in enumerate(self.rows) if row.values is not None}
        with atomic_write(Path(folder) / "values.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **values)  # type: ignore[arg-type]  # it takes names for its option's
        write_text(Path(folder) / "figures.csv", self.figures_csv())

    def __str__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        """Returns the HTML that notebooks show."""
        (head, *body), conditions = layout(self.rows, self.failures)
        lines = "".join(_html_line("td", line) for line in body)
        below = "".join(f"<p>{html.escape(condition)}</p>" for condition in conditions)
        return f"<table><thead>{_html_line('th', head)}</thead><tbody>{lines}</tbody></table>{below}"


def _read_values(path: Path) -> dict[str, Tensor]:
    if not path.is_file():  # figures without their values
        return {}
    try:
        with path.open("rb") as file:
            return {name: torch.from_numpy(values) for name, values in np.load(file, allow_pickle=False).items()}
    except Exception as error:  # on broken files, readers raise all kinds of errors
        raise UsageError(
            f"expected values of figures in {path}, got a broken file ({error}); evaluate again"
        ) from error


def _html_line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _parsed(text: str, kind: Any) -> Any:
    if kind in (int | None, float | None):
        return None if text == "" else get_args(kind)[0](text)
    if get_origin(kind) is Literal:
        check_choice("the cell", text, get_args(kind))
    return kind(text) if kind in (int, float) else text


def _csv(names: list[str], table: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
