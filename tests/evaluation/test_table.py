"""ResultTable: what a row says, and its four texts: Markdown, LaTeX, CSV by methods and CSV by figures."""

import csv
import io
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.retrieval_result import RetrievalResult
from pml_fewshot.evaluation.table import Judgement, ResultTable

FIGURE_COLUMNS = ["method", "figure", "value", "ci95", "ways", "shots", "queries", "count", "seed", "split", "classes"]
FIGURE_COLUMNS += ["protocol", "ranking", "episodes_hash", "note", "trained", "seconds"]
ABOUT = ["method", "split", "classes", "trained", "seconds", "note"]
HASH = "0123456789abcdef"
ONE_SHOT = EpisodeSpec(5, 1, 15)


def episodic(
    spec: EpisodeSpec = ONE_SHOT,
    wrong: int = 410,
    seed: int = 3,
    count: int = 10_000,
    episodes_hash: str = HASH,
) -> EpisodicResult:
    """Of the episodes so many have an accuracy of 0.7 and all others of 1."""
    values = torch.ones(count).double()
    values[:wrong] = 0.7
    ci95 = 1.96 * values.std().item() / count**0.5
    return EpisodicResult(values.mean().item(), ci95, values, spec, seed, episodes_hash)


def retrieval(num_left_out: int = 0, clustering: dict[str, float] | None = None) -> RetrievalResult:
    per_query: dict[str, Tensor] = {
        "mean_average_precision_at_r": torch.tensor([0.5, 0.25, 0.0, 1.0]).double(),
        "recall_at_4": torch.ones(4).double(),
    }
    labels = torch.tensor([0, 0, 1, 1])
    return RetrievalResult(per_query, labels, num_left_out, k=7, ranking="exact, Euclid", clustering=clustering)


def filled() -> ResultTable:
    table = ResultTable()
    table.add_episodic(Judgement("ProtoNet", "test", 1692), episodic())
    table.add_retrieval(Judgement("ProtoNet", "test", 1692), retrieval())
    return table


def two_methods() -> ResultTable:
    """The second has other sizes of episodes, a note, several trainings, and no retrieval."""
    table = filled()
    judged = Judgement("Other", "test", 1692, "150 of 600 images a class")
    table.add_episodic(judged, episodic(), episodic(wrong=610))
    table.add_episodic(judged, episodic(EpisodeSpec(20, 5, 15)), episodic(EpisodeSpec(20, 5, 15), 400))
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


# --- rows -------------------------------------------------------------------------------------------------------------


def test_an_episodic_row_holds_all_that_is_needed_to_repeat_it():
    (row, *_) = filled().rows
    share = 410 / 10_000  # of a value 0.3 lower: mean and variance of two values by hand
    ci95 = 1.96 * (0.09 * share * (1 - share) * 10_000 / 9_999) ** 0.5 / 100
    assert (row.value, row.ci95) == (pytest.approx(1 - 0.3 * share, abs=1e-12), pytest.approx(ci95, abs=1e-12))
    assert row == ResultRow(
        method="ProtoNet",
        figure="accuracy",
        value=row.value,
        ci95=row.ci95,
        ways=5,
        shots=1,
        queries=15,
        count=10_000,
        seed=3,
        split="test",
        classes=1692,
        protocol="inductive",
        ranking="",
        episodes_hash=HASH,
        note="",
        trained=1,
        seconds=None,
    )


def test_a_judgement_that_is_transductive_or_timed_is_noted_so():
    table = ResultTable()
    table.add_episodic(Judgement("MAML", "test", 20, transductive=True, seconds=1.5), episodic())
    table.add_retrieval(Judgement("MAML", "test", 20, seconds=1.5), retrieval())
    assert [row.protocol for row in table.rows] == ["transductive", "leave-one-out", "leave-one-out"]
    assert [row.seconds for row in table.rows] == [1.5] * 3


def test_a_retrieval_result_gives_a_row_for_each_figure():
    table = ResultTable()
    table.add_retrieval(Judgement("x", "val", 16, "150 of 600 images a class"), retrieval(clustering={"NMI": 0.25}))
    precision, recall, nmi = table.rows
    assert (precision.figure, precision.value, precision.count) == ("mean_average_precision_at_r", 0.4375, 4)
    squares = sum((value - 0.4375) ** 2 for value in (0.5, 0.25, 0.0, 1.0))
    assert precision.ci95 == pytest.approx(1.96 * (squares / 3) ** 0.5 / 2, abs=1e-12)
    assert (recall.figure, recall.value, recall.ci95) == ("recall_at_4", 1, 0)
    assert (nmi.figure, nmi.value, nmi.count) == ("NMI", 0.25, 4)
    assert math.isnan(nmi.ci95)
    for row in table.rows:
        assert (row.ways, row.shots, row.queries, row.seed, row.episodes_hash) == (None, None, None, None, "")
        assert (row.split, row.classes, row.note) == ("val", 16, "150 of 600 images a class")
        assert (row.protocol, row.ranking) == ("leave-one-out", "exact, Euclid")


def test_queries_left_out_are_counted_in_the_note():
    for note, expected in (("", ""), ("few images", "few images; ")):
        table = ResultTable()
        table.add_retrieval(Judgement("x", "test", 3, note), retrieval(num_left_out=2))
        assert {row.note for row in table.rows} == {f"{expected}2 queries alone in their class left out"}
        assert "2 queries alone in their class left out" in table.markdown()


def test_several_trainings_are_one_row_with_their_mean():
    table = ResultTable()
    table.add_episodic(Judgement("x", "test", 3), episodic(), episodic(wrong=610), episodic(wrong=510))
    table.add_retrieval(Judgement("x", "test", 3), retrieval(), retrieval())
    assert [row.trained for row in table.rows] == [3, 2, 2]
    assert table.rows[0].value == pytest.approx(1 - 0.3 * 510 / 10_000, abs=1e-12)
    assert table.rows[1].value == pytest.approx(0.4375, abs=1e-12)
    assert table.rows[0].count == 10_000  # episodes, which all trainings were judged on
    alone = ResultTable()
    alone.add_episodic(Judgement("x", "test", 3), episodic(wrong=510))
    assert table.rows[0].ci95 > alone.rows[0].ci95  # it holds the chance of training too


def test_trainings_judged_on_different_episodes_raise():
    with pytest.raises(ValueError, match="expected all trainings judged on the same episodes"):
        ResultTable().add_episodic(Judgement("x", "test", 3), episodic(), episodic(count=5_000))
    # as many of them, but others: each result knows by its hash
    other = episodic(seed=4, episodes_hash="f" * 16)
    with pytest.raises(ValueError, match=r"expected .*same episodes"):
        ResultTable().add_episodic(Judgement("x", "test", 3), episodic(), other)


def test_figures_over_a_gallery_are_not_called_leave_one_out():
    bank = EmbeddingBank(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)
    table = ResultTable()
    table.add_retrieval(Judgement("x", "test", 3), RetrievalTester().test(bank, reference=bank))
    assert [row.protocol for row in table.rows] == ["gallery"] * 3
    assert "12 queries, gallery, exact, Euclid" in table.markdown()


def test_a_table_has_rows_of_its_own():
    rows = filled().rows
    table = ResultTable(iter(rows))
    table.rows.clear()
    assert len(rows) == 3


# --- Markdown ---------------------------------------------------------------------------------------------------------


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


def test_markdown_has_a_line_a_method_and_blanks_where_a_figure_is_missing():
    head, rule, proto, other = grid(two_methods().markdown())
    assert head == ["method", "5-way 1-shot", "MAP@R", "recall@4", "20-way 5-shot"]
    assert set(rule) == {"---"}
    assert proto == ["ProtoNet", "98.77 +- 0.12", "43.75 +- 41.84", "100.00 +- 0.00", ""]
    assert (other[0], other[2:4]) == ("Other", ["", ""])
    assert re.fullmatch(r"98\.47 \+- \d+\.\d\d", other[1])
    assert re.fullmatch(r"98\.\d\d \+- \d+\.\d\d", other[4])


def test_conditions_say_the_common_part_once_and_name_whose_the_others_are():
    assert below(two_methods()) == [
        "%, +- 95 % intervals; test, 1,692 classes; 10,000 episodes of 15 queries a class, seed 3, inductive",
        "ProtoNet: 4 queries, leave-one-out, exact, Euclid",
        "Other: 150 of 600 images a class; means of 2 trainings",
    ]


def test_methods_with_the_same_conditions_are_named_together():
    table = filled()
    for name in ("A", "B"):
        table.add_episodic(Judgement(name, "test", 1692), episodic(seed=4))
    assert below(table) == [
        "%, +- 95 % intervals; test, 1,692 classes",
        "ProtoNet: 10,000 episodes of 15 queries a class, seed 3, inductive; 4 queries, leave-one-out, exact, Euclid",
        "A, B: 10,000 episodes of 15 queries a class, seed 4, inductive",
    ]


def test_a_method_on_two_splits_has_two_lines():
    table = filled()
    table.add_episodic(Judgement("ProtoNet", "val", 16), episodic(wrong=0))
    lines = grid(table.markdown())[2:]
    assert [line[0] for line in lines] == ["ProtoNet (test)", "ProtoNet (val)"]
    assert [line[1] for line in lines] == ["98.77 +- 0.12", "100.00 +- 0.00"]
    assert any(text.startswith("ProtoNet (val): val, 16 classes") for text in below(table))


def test_a_transductive_method_has_a_line_named_so():
    table = filled()
    table.add_episodic(Judgement("ProtoNet", "test", 1692, transductive=True), episodic(wrong=0))
    lines = grid(table.markdown())[2:]
    assert [line[0] for line in lines] == ["ProtoNet", "ProtoNet (transductive)"]
    assert [line[1] for line in lines] == ["98.77 +- 0.12", "100.00 +- 0.00"]
    (own,) = (text for text in below(table) if text.startswith("ProtoNet (transductive): "))
    assert own == "ProtoNet (transductive): 10,000 episodes of 15 queries a class, seed 3, transductive"


def test_queries_stand_in_the_titles_when_they_differ():
    table = filled()
    table.add_episodic(Judgement("ProtoNet", "test", 1692), episodic(EpisodeSpec(5, 1, 10)))
    assert grid(table.markdown())[0] == [
        "method",
        "5-way 1-shot 15-query",
        "MAP@R",
        "recall@4",
        "5-way 1-shot 10-query",
    ]


def test_titles_of_retrieval_are_those_of_papers():
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_average_precision")
    names += ("mean_reciprocal_rank", "recall_at_10")
    result = RetrievalResult({name: torch.ones(2).double() for name in names}, torch.zeros(2).long(), 0, 1)
    table = ResultTable()
    table.add_retrieval(Judgement("x", "test", 3), result)
    assert grid(table.markdown())[0][1:] == ["P@1", "R-precision", "MAP@R", "MAP", "MRR", "recall@10"]


def test_seconds_stand_only_where_a_method_was_timed():
    assert "seconds" not in filled().markdown() + filled().latex()
    table = filled()
    table.add_episodic(Judgement("timed", "test", 1692, seconds=12.345), episodic())
    head, _, plain, timed = grid(table.markdown())
    assert (head[-1], plain[-1], timed[-1]) == ("seconds", "", "12.35")
    assert [row["seconds"] for row in read(table.csv())] == ["", "12.345"]
    head, plain, timed = tabular(table.latex())[1]
    assert (head[-1], plain[-1], timed[-1]) == ("seconds", "", "12.35")


def test_every_line_of_markdown_has_the_same_cells():
    table = two_methods()
    table.add_episodic(Judgement("a|b || c", "val", 3, seconds=1.0), episodic(EpisodeSpec(2, 3, 4)))
    lines = grid(table.markdown())
    assert len(lines) == 2 + 3
    assert {len(line) for line in lines} == {1 + 5 + 1}
    assert lines[-1][0] == r"a\|b \|\| c (val)"


@pytest.mark.parametrize("name", ["two\nlines", "two\r\nlines"])
def test_a_name_of_two_lines_stays_in_its_cell(name: str):
    table = filled()
    table.add_episodic(Judgement(name, "test", 3), episodic())
    lines = grid(table.markdown())
    assert len(lines) == 2 + 2
    assert {len(line) for line in lines} == {4}


def test_nmi_has_no_interval():
    table = ResultTable()
    table.add_retrieval(Judgement("x", "test", 3), retrieval(clustering={"NMI": 0.25}))
    assert grid(table.markdown())[-1][-1] == "25.00"
    assert tabular(table.latex())[1][-1][-1] == "25.00"
    assert "nan" not in (table.markdown() + table.latex()).lower()
    (row,) = read(table.csv())
    assert (row["NMI"], row["NMI_ci95"]) == ("0.25", "nan")


def test_a_second_protocol_of_one_method_does_not_replace_the_first():
    """Each query without itself, and over a gallery: both figures are in the table."""
    table = filled()
    gallery = RetrievalResult({"recall_at_4": torch.zeros(4).double()}, torch.zeros(4).long(), 0, 7, "gallery")
    table.add_retrieval(Judgement("ProtoNet", "test", 1692), gallery)
    cells = [cell for line in grid(table.markdown()) for cell in line]
    assert "100.00 +- 0.00" in cells
    assert "0.00 +- 0.00" in cells


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_figures_csv_keeps_every_value_to_the_last_digit():
    table = filled()
    table.rows[0] = replace(table.rows[0], note='said "so", twice\nand again', value=1 / 3, ci95=0.1 + 0.2)
    table.rows[1] = replace(table.rows[1], seconds=2 / 3, trained=3, ci95=float("nan"))
    rows = read(table.figures_csv())
    assert list(rows[0]) == FIGURE_COLUMNS == [field.name for field in fields(ResultRow)]
    for row, original in zip(rows, table.rows, strict=True):
        for name, text in row.items():
            value = getattr(original, name)
            assert text == ("" if value is None else str(value))
            if isinstance(value, float) and not math.isnan(value):
                assert float(text) == value


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
            assert float(line[column]) == row.value
            assert float(line[column + "_ci95"]) == row.ci95
            assert int(line[column + "_count"]) == row.count
    assert proto["5way_1shot_15query_protocol"] == f"inductive, seed 3, episodes {HASH}"
    assert proto["recall_at_4_protocol"] == "leave-one-out, exact, Euclid"
    assert [proto["20way_5shot_15query" + part] for part in parts] == [""] * 4
    assert [other["recall_at_4" + part] for part in parts] == [""] * 4


def test_names_with_commas_quotes_and_breaks_come_back_from_both_csv_texts():
    name = 'a, "b"\nc;|'
    table = ResultTable()
    table.add_episodic(Judgement(name, "test", 3, "d, e"), episodic())
    for text in (table.csv(), table.figures_csv()):
        (row,) = read(text)
        assert (row["method"], row["note"]) == (name, "d, e")


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def tabular(text: str) -> tuple[str, list[list[str]]]:
    """Column specification and cells of a LaTeX tabular; fails where it would not compile."""
    code = [line for line in text.splitlines() if line and not line.startswith("%")]
    begin = re.fullmatch(r"\\begin\{tabular\}\{(lr*)\}", code[0])
    assert begin, code[0]
    assert (code[1], code[3], code[-2], code[-1]) == (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")
    plain = re.sub(r"\\.", "", "\n".join(code))  # without commands' first letters and escaped characters
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert not re.search("[%#_~^]", plain)
    rows = [code[2], *code[4:-2]]
    assert all(row.endswith(r" \\") for row in rows)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row[: -len(r" \\")])] for row in rows]
    assert {len(row) for row in cells} == {len(begin[1])}
    return begin[1], cells


def test_latex_has_the_cells_of_the_markdown():
    specification, cells = tabular(two_methods().latex())
    assert specification == "lrrrr"
    head, _, *lines = grid(two_methods().markdown())
    assert [[cell.replace(r"$\pm$", "+-") for cell in row] for row in cells] == [head, *lines]


def test_latex_says_what_it_needs_and_the_conditions_as_comments():
    text = two_methods().latex()
    assert text.splitlines()[0] == r"% needs \usepackage{booktabs}"
    for condition in below(two_methods()):
        assert f"% {condition}" in text.splitlines()


def test_latex_escapes_names():
    table = ResultTable()
    table.add_episodic(Judgement(r"a_b%c&d#e{f}g$h\i", "test", 3), episodic())
    _, ((_, _), (name, _)) = tabular(table.latex())
    assert re.fullmatch(re.escape(r"a\_b\%c\&d\#e\{f\}g\$h\textbackslash") + r"( |\{\})i", name)


@pytest.mark.parametrize("name", ["x^2", "a~b"])
def test_latex_escapes_accents(name: str):
    """^ outside of mathematics is an error of LaTeX's, ~ a space."""
    table = ResultTable()
    table.add_episodic(Judgement(name, "test", 3), episodic())
    tabular(table.latex())


def test_a_note_of_two_lines_stays_a_comment():
    table = ResultTable()
    table.add_episodic(Judgement("x", "test", 3, "one\ntwo & three"), episodic())
    tabular(table.latex())


# --- all --------------------------------------------------------------------------------------------------------------


def test_an_empty_table_has_its_heads():
    assert ResultTable().figures_csv() == ",".join(FIGURE_COLUMNS) + "\n"
    assert ResultTable().csv() == ",".join(ABOUT) + "\n"
    assert ResultTable().markdown() == "| method |\n| --- |\n"
    assert tabular(ResultTable().latex()) == ("l", [["method"]])


def test_four_files_are_written(tmp_path: Path):
    two_methods().write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md", "results.tex", "figures.csv"}
    assert (tmp_path / "results.csv").read_text() == two_methods().csv()
    assert (tmp_path / "results.md").read_text() == two_methods().markdown()
    assert (tmp_path / "results.tex").read_text() == two_methods().latex()
    assert (tmp_path / "figures.csv").read_text() == two_methods().figures_csv()


def test_a_missing_folder_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        filled().write(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


# --- read again, sorted, with failures --------------------------------------------------------------------------------


def of_two_methods() -> ResultTable:
    table = ResultTable()
    for name, mean in (("worse", 0.5), ("better", 0.75)):
        accuracy = {"ways": 5, "shots": 1, "queries": 15, "count": 10, "seed": 3, "episodes_hash": "ab12"}
        same = {"method": name, "ci95": 0.01, "split": "test", "classes": 7, "note": 'odd, "quoted"\nnote'}
        table.rows.append(ResultRow(figure="accuracy", value=mean, protocol="inductive", **accuracy, **same))
        table.rows.append(
            ResultRow(figure="NMI", value=1 - mean, protocol="leave-one-out", **{**same, "ci95": float("nan")}, count=9)
        )
    return table


def test_a_written_table_is_read_to_the_last_digit(tmp_path: Path) -> None:
    table = of_two_methods()
    table.rows[0] = replace(table.rows[0], value=1 / 3, seconds=0.1, trained=3)
    table.write(tmp_path)
    again = ResultTable.read(tmp_path)
    assert repr(again.rows) == repr(table.rows)  # by repr, in which NaN equals NaN
    assert again.figures_csv() == table.figures_csv()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "{}"])
def test_what_is_no_table_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "figures.csv").write_text(text)
    with pytest.raises(ValueError, match="expected the columns"):
        ResultTable.read(tmp_path)


def test_a_folder_without_a_table_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ResultTable.read(tmp_path)


def test_best_first_sorts_methods_by_their_first_figure_and_keeps_their_rows_together() -> None:
    table = of_two_methods()
    table.failures["broken"] = "why"
    best = table.best_first()
    assert [(row.method, row.figure) for row in best.rows] == [
        ("better", "accuracy"),
        ("better", "NMI"),
        ("worse", "accuracy"),
        ("worse", "NMI"),
    ]
    assert best.failures == {"broken": "why"}
    assert [row.method for row in table.rows[::2]] == ["worse", "better"], "the table itself stays as it was"


def test_a_failure_is_a_line_of_each_text() -> None:
    table = of_two_methods()
    table.failures["broken | loss"] = "ValueError: 100 %,\nof nothing"
    last = table.markdown().split("\n\n")[0].splitlines()[-1]
    assert last == r"| broken \| loss | failed: ValueError: 100 %, of nothing |  |"
    assert r"broken | loss & failed: ValueError: 100 \%, of nothing &  \\" in table.latex()
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert rows[-1]["method"] == "broken | loss"
    assert rows[-1]["note"] == "failed: ValueError: 100 %,\nof nothing"
    assert rows[-1]["5way_1shot_15query"] == ""


def test_a_table_of_failures_alone_can_be_shown() -> None:
    table = ResultTable(failures={"broken": "why"})
    assert "failed: why" in table.markdown()
    assert "failed: why" in table.csv()
