"""ResultTable: what a row says, and its texts: Markdown, LaTeX, CSV by methods and CSV by figures."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from xml.etree import ElementTree

import pytest
import torch

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult
from pml_fewshot.evaluation.table import ResultRow, ResultTable, RowContext
from pml_fewshot.sampling.episodes import EpisodeSpec

FIGURE_COLUMNS = ["method", "figure", "value", "ci95", "ways", "shots", "queries"]
FIGURE_COLUMNS += [
    "query_balance",
    "count",
    "seed",
    "split",
    "classes",
    "protocol",
    "ranking",
    "episodes_hash",
    "note",
    "trained",
    "seconds",
    "classifier",
]
ABOUT = ["method", "split", "classes", "trained", "seconds", "note"]
HASH = "0123456789abcdef"
ONE_SHOT = EpisodeSpec(5, 1, 15)


def episodic(spec: EpisodeSpec = ONE_SHOT, wrong: int = 410, seed: int = 3, count: int = 10_000) -> EpisodicResult:
    """Of the episodes so many have an accuracy of 0.7 and all others of 1."""
    values = torch.ones(count).double()
    values[:wrong] = 0.7
    ci95 = 1.96 * values.std().item() / count**0.5
    return EpisodicResult(values.mean().item(), ci95, values, spec, seed, HASH if seed == 3 else "f" * 16)


def retrieval(num_excluded: int = 0, clustering: dict[str, float] | None = None) -> RetrievalResult:
    precisions, labels = torch.tensor([0.5, 0.25, 0.0, 1.0]).double(), torch.tensor([0, 0, 1, 1])
    per_query = {"mean_average_precision_at_r": precisions, "recall_at_4": torch.ones(4).double()}
    return RetrievalResult(per_query, labels, num_excluded, 7, ranking="exact, Euclid", clustering=clustering or {})


def filled(*more: tuple[RowContext, EpisodicResult]) -> ResultTable:
    """ProtoNet with an accuracy and two figures of retrieval, and then what else is given."""
    table = ResultTable()
    table.add_episodic(RowContext("ProtoNet", "test", 1692), episodic())
    table.add_retrieval(RowContext("ProtoNet", "test", 1692), retrieval())
    for context, result in more:
        table.add_episodic(context, result)
    return table


def two_methods() -> ResultTable:
    """The second has other sizes of episodes, a note, several trainings, and no retrieval."""
    table = filled()
    context = RowContext("Other", "test", 1692, "150 of 600 images a class")
    table.add_episodic(context, episodic(), episodic(wrong=610))
    table.add_episodic(context, episodic(EpisodeSpec(20, 5, 15)), episodic(EpisodeSpec(20, 5, 15), 400))
    return table


def grid(text: str) -> list[list[str]]:
    """Cells of the Markdown table: the lines that begin with "|", split where "|" is not escaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def below(table: ResultTable) -> list[str]:
    """The conditions, a paragraph each."""
    return [line for line in table.markdown().splitlines() if line and not line.startswith("|")]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_an_episodic_row_holds_all_that_is_needed_to_repeat_it():
    table = filled((RowContext("MAML", "val", 20, "a note", seconds=1.5), replace(episodic(), transductive=True)))
    row, share = table.rows[0], 410 / 10_000  # of a value 0.3 lower: mean and variance of two values by hand
    ci95 = 1.96 * (0.09 * share * (1 - share) * 10_000 / 9_999) ** 0.5 / 100
    assert (row.value, row.ci95) == (pytest.approx(1 - 0.3 * share, abs=1e-12), pytest.approx(ci95, abs=1e-12))
    own = {"method": "ProtoNet", "figure": "accuracy", "value": row.value, "ci95": row.ci95, "count": 10_000}
    own |= {"ways": 5, "shots": 1, "queries": 15, "seed": 3, "episodes_hash": HASH}
    assert row == ResultRow(**own, split="test", classes=1692, protocol="inductive")
    context = {"method": "MAML", "split": "val", "classes": 20, "note": "a note", "seconds": 1.5}
    assert table.rows[-1] == replace(row, **context, protocol="transductive")


def test_a_retrieval_result_gives_a_row_for_each_figure():
    table = ResultTable()
    table.add_retrieval(RowContext("x", "val", 16, "few images", seconds=2.5), retrieval(2, {"NMI": 0.25}))
    precision, recall, nmi = table.rows
    assert (precision.figure, precision.value, precision.count) == ("mean_average_precision_at_r", 0.4375, 4)
    assert precision.ci95 == pytest.approx(1.96 * stdev([0.5, 0.25, 0.0, 1.0]) / 2, abs=1e-12)
    assert (recall.figure, recall.value, recall.ci95) == ("recall_at_4", 1, 0)
    assert (nmi.figure, nmi.value, nmi.count) == ("NMI", 0.25, 4)
    assert grid(table.markdown())[-1][3] == "25.00"
    assert read(table.csv())[0]["NMI_ci95"] == "nan"
    for row in table.rows:
        assert (row.ways, row.shots, row.queries, row.seed, row.episodes_hash) == (None, None, None, None, "")
        assert (row.split, row.classes, row.seconds) == ("val", 16, 2.5)
        assert row.note == "few images; 2 queries alone in their class left out"
        assert (row.protocol, row.ranking) == ("leave-one-out", "exact, Euclid")


def test_several_trainings_on_the_same_episodes_are_one_row_with_their_mean():
    table = filled((RowContext("x", "test", 3), episodic(wrong=510)))
    alone = table.rows.pop()
    table.add_episodic(RowContext("x", "test", 3), episodic(), episodic(wrong=610), episodic(wrong=510))
    table.add_retrieval(RowContext("x", "test", 3), retrieval(), retrieval())
    accuracy, precision = table.rows[3:5]
    assert (accuracy.trained, accuracy.count, precision.trained) == (3, 10_000, 2)
    assert (accuracy.value, precision.value) == pytest.approx((1 - 0.3 * 510 / 10_000, 0.4375), abs=1e-12)
    assert accuracy.ci95 > alone.ci95  # it holds the chance of training too
    for other in (episodic(count=5_000), episodic(seed=4)):  # fewer; as many of them, but others by their hash
        with pytest.raises(UsageError, match=r"expected .*trainings evaluated on the same episodes"):
            ResultTable().add_episodic(RowContext("x", "test", 3), episodic(), other)


def test_markdown_gives_percent_with_interval_and_the_conditions_below():
    assert filled().markdown() == (
        "| method | 5-way 1-shot | MAP@R | recall@4 |\n"
        "| --- | --- | --- | --- |\n"
        "| ProtoNet | 98.77 +- 0.12 | 43.75 +- 41.84 | 100.00 +- 0.00 |\n"
        "\n"
        "%, +- 95 % intervals; test, 1,692 classes; 10,000 episodes of 15 queries a class, seed 3, inductive; "
        "4 queries, leave-one-out, exact, Euclid\n"
    )
    assert str(filled()) == filled().markdown()
    assert ResultTable().markdown() == "| method |\n| --- |\n"


def test_two_methods_have_a_line_each_and_what_holds_for_both_is_said_once():
    head, rule, proto, other = grid(two_methods().markdown())
    assert head == ["method", "5-way 1-shot", "MAP@R", "recall@4", "20-way 5-shot"]
    assert set(rule) == {"---"}
    assert proto == ["ProtoNet", "98.77 +- 0.12", "43.75 +- 41.84", "100.00 +- 0.00", ""]
    assert (other[0], other[1][:9], other[2:4]) == ("Other", "98.47 +- ", ["", ""])
    assert below(two_methods()) == [
        "%, +- 95 % intervals; test, 1,692 classes; 10,000 episodes of 15 queries a class, seed 3, inductive",
        "ProtoNet: 4 queries, leave-one-out, exact, Euclid",
        "Other: 150 of 600 images a class; means of 2 training runs",
    ]


def test_every_figure_has_a_cell_in_a_line_of_its_method_split_and_protocol():
    for context, together, names in (
        (RowContext("ProtoNet", "val", 1692), False, ["ProtoNet (test)", "ProtoNet (val)"]),
        (RowContext("ProtoNet", "test", 1692), True, ["ProtoNet", "ProtoNet (transductive)"]),
        (RowContext("ProtoNet", "test", 1692), False, ["ProtoNet", "ProtoNet #2"]),  # the same figure twice: both stay
        (RowContext("two\r\nlines", "test", 1692), False, ["ProtoNet", "two lines"]),
        (RowContext("a|b", "test", 1692), False, ["ProtoNet", r"a\|b"]),
    ):
        lines = grid(filled((context, replace(episodic(wrong=0), transductive=together))).markdown())
        assert [line[0] for line in lines[2:]] == names
        assert [line[1] for line in lines[2:]] == ["98.77 +- 0.12", "100.00 +- 0.00"]
        assert {len(line) for line in lines} == {4}


def test_retrieval_of_a_transductive_method_stands_in_its_line():
    table, context = ResultTable(), RowContext("MAML", "test", 1692)
    table.add_episodic(context, replace(episodic(), transductive=True))
    table.add_retrieval(context, retrieval())
    assert [line[0] for line in grid(table.markdown())[2:]] == ["MAML (transductive)"]


def test_titles_are_those_of_papers_and_name_the_queries_where_they_differ():
    names = ("precision_at_1", "r_precision", "mean_average_precision", "mean_reciprocal_rank", "recall_at_10")
    table = filled((RowContext("ProtoNet", "test", 1692), episodic(EpisodeSpec(5, 1, 10))))
    result = RetrievalResult({name: torch.ones(2).double() for name in names}, torch.zeros(2).long(), 0, 1)
    table.add_retrieval(RowContext("x", "test", 3), result)
    episodes, others = ["5-way 1-shot 15-query", "MAP@R", "recall@4", "5-way 1-shot 10-query"], ["P@1", "R-precision"]
    assert grid(table.markdown())[0][1:] == [*episodes, *others, "MAP", "MRR", "recall@10"]


def test_seconds_stand_only_where_a_method_was_timed():
    table = filled((RowContext("timed", "test", 1692, seconds=12.345), episodic()))
    head, _, plain, timed = grid(table.markdown())
    assert (head[-1], plain[-1], timed[-1]) == ("seconds", "", "12.35")
    assert [row["seconds"] for row in read(table.csv())] == ["", "12.345"]


def test_results_csv_has_a_line_a_method_with_every_value_to_the_last_digit():
    table = two_methods()
    table.rows[0] = replace(table.rows[0], value=1 / 3, ci95=0.1 + 0.2)
    proto, other = read(table.csv())
    columns = ("5way_1shot_15query", "mean_average_precision_at_r", "recall_at_4", "20way_5shot_15query")
    parts = ("", "_ci95", "_count", "_protocol")
    assert list(proto) == ABOUT + [column + part for column in columns for part in parts]
    assert (proto["method"], proto["split"], proto["classes"], proto["trained"]) == ("ProtoNet", "test", "1692", "1")
    assert (other["method"], other["trained"], other["note"]) == ("Other", "2", "150 of 600 images a class")
    for line, figures in ((proto, columns[:3]), (other, (columns[0], columns[3]))):
        rows = [row for row in table.rows if row.method == line["method"]]
        for row, column in zip(rows, figures, strict=True):
            assert (float(line[column]), float(line[column + "_ci95"])) == (row.value, row.ci95)
            assert int(line[column + "_count"]) == row.count
    assert proto["5way_1shot_15query_protocol"] == f"inductive, seed 3, episodes {HASH}"
    assert proto["recall_at_4_protocol"] == "leave-one-out, exact, Euclid"
    assert [proto["20way_5shot_15query" + part] for part in parts] == [""] * 4
    assert ResultTable().csv() == ",".join(ABOUT) + "\n"


def test_latex_is_a_tabular_with_the_conditions_as_comments():
    table = filled((RowContext(r"a_b%c&d#{e}$\^~", "test", 1692, "one\ntwo & three"), episodic(wrong=0)))
    assert table.latex().splitlines() == [
        r"% needs \usepackage{booktabs}",
        *(f"% {condition}" for condition in below(table)),
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & 5-way 1-shot & MAP@R & recall@4 \\",
        r"\midrule",
        r"ProtoNet & 98.77 $\pm$ 0.12 & 43.75 $\pm$ 41.84 & 100.00 $\pm$ 0.00 \\",
        r"a\_b\%c\&d\#\{e\}\$\textbackslash{}\textasciicircum{}\textasciitilde{} & 100.00 $\pm$ 0.00 &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_a_failure_is_a_line_of_each_text():
    table = filled()
    table.failures["broken | loss"] = "ValueError: 100 %,\nof nothing"
    assert grid(table.markdown())[-1] == [r"broken \| loss", "failed: ValueError: 100 %, of nothing", "", ""]
    assert r"broken | loss & failed: ValueError: 100 \%, of nothing &  &  \\" in table.latex().splitlines()
    last = read(table.csv())[-1]
    assert (last["method"], last["note"]) == ("broken | loss", "failed: ValueError: 100 %,\nof nothing")
    assert last["5way_1shot_15query"] == ""
    alone = ResultTable(failures={"broken": "why"})
    assert grid(alone.markdown()) == [["method", "figures"], ["---"] * 2, ["broken", "failed: why"]]


def test_a_written_table_is_read_to_the_last_digit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = two_methods()
    odd = {"method": 'a, "b"\r\nc;| \N{GREEK SMALL LETTER ALPHA}', "note": 'said "so", twice\nand again'}
    third = {"value": 1 / 3, "values": torch.full((10_000,), 1 / 3, dtype=torch.float64)}
    table.rows[0] = replace(table.rows[0], **odd, **third, seconds=0.1 + 0.2, trained=3)
    table.rows[1] = replace(table.rows[1], ci95=float("nan"), seconds=0.1 + 0.2, trained=3)
    table.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md", "figures.csv", "values.npz"}
    assert (tmp_path / "results.csv").read_bytes().decode() == table.csv()
    assert (tmp_path / "results.md").read_bytes().decode() == table.markdown()
    assert ResultTable().figures_csv() == ",".join(FIGURE_COLUMNS) + "\n"
    again = ResultTable.read(tmp_path)
    assert repr(again.rows) == repr(table.rows)  # by repr, in which NaN equals NaN
    for row, then in zip(again.rows, table.rows, strict=True):
        assert (row.values is None) if then.values is None else torch.equal(row.values, then.values)
    written: list[str] = []
    monkeypatch.setattr("pml_fewshot.evaluation.table.write_text", lambda path, text: written.append(path.name))
    table.write(tmp_path)
    assert written[-1] == "figures.csv"  # which marks a finished run


def test_notebooks_and_pandas_show_the_same_table():
    table = two_methods()
    pytest.importorskip("pandas")
    table.rows[0] = replace(table.rows[0], method="<b>& |")
    shown, (head, _, *body) = ElementTree.fromstring(f"<div>{table._repr_html_()}</div>"), grid(table.markdown())
    lines = [[cell.text or "" for cell in line] for line in shown.iter("tr")]
    assert lines == [head, *([cell.replace(r"\|", "|") for cell in line] for line in body)]
    assert [paragraph.text for paragraph in shown.iter("p")] == below(table)
    frame = table.to_pandas()
    assert frame.columns.tolist() == FIGURE_COLUMNS
    assert frame["value"].tolist() == [row.value for row in table.rows]


def test_what_is_no_table_of_figures_raises(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"got no figures\.csv"):
        ResultTable.read(tmp_path)
    whole = filled().figures_csv().encode()
    for broken, says in (
        (b"", r"columns None, not \['method'"),
        (whole.replace(b"method,", b"name,", 1), r"columns \['name', .*, not \['method'"),
        (whole.replace(b"inductive", b"inductiv"), "did you mean 'inductive'"),
        (whole.replace(b",10000,", b",many,"), "many"),
        (whole.replace(b",10000,", b","), "line 2 has not 19 cells"),
        (whole + b'"', "unexpected end"),
        (whole + b"\xff", "decode byte 0xff"),
    ):
        (tmp_path / "figures.csv").write_bytes(broken)
        with pytest.raises(UsageError, match=rf"^expected figures in .*figures\.csv, got a broken table \(.*{says}"):
            ResultTable.read(tmp_path)


def test_values_that_are_not_those_of_the_figures_are_refused(tmp_path: Path):
    table = filled()
    table.write(tmp_path)
    for other in (episodic(wrong=500), episodic(count=300, wrong=12)):
        wrong = filled()
        wrong.rows[0] = replace(wrong.rows[0], values=other.per_episode)
        wrong.write(tmp_path)
        with pytest.raises(UsageError, match=r"values of the figures in .*values\.npz, got others than of line 2"):
            ResultTable.read(tmp_path)


def test_runs_of_one_name_are_sorted_by_value_too():
    table = ResultTable()
    for seed, wrong in ((0, 600), (1, 200), (2, 400)):
        table.add_episodic(RowContext("one", "test", 9), episodic(wrong=wrong, seed=seed))
        table.add_retrieval(RowContext("one", "test", 9), retrieval())
    best = table.best_first().rows
    assert [row.seed for row in best if row.ways] == [1, 2, 0]
    assert [row.figure for row in best[:3]] == ["accuracy", "mean_average_precision_at_r", "recall_at_4"]


def test_best_first_sorts_methods_by_their_first_figure_and_keeps_their_rows_together():
    table = two_methods()
    table.rows.insert(0, replace(table.rows[0], method="worst", value=0.5))
    table.rows.append(replace(table.rows[0], figure="NMI", ways=None, value=1.0))
    table.failures["broken"] = "why"
    best = table.best_first()
    assert [row.method for row in best.rows] == ["ProtoNet"] * 3 + ["Other"] * 2 + ["worst"] * 2
    assert [row.figure for row in best.rows[:3]] == [row.figure for row in filled().rows]
    assert best.failures == {"broken": "why"}
