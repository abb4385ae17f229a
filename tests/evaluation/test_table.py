"""ResultTable: what a row says, in Markdown and in CSV."""

import csv
import io
from pathlib import Path

import pytest
import torch

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.evaluation.retrieval import RetrievalResult, RetrievalTester
from pml_fewshot.evaluation.table import Judgement, ResultRow, ResultTable

COLUMNS = ["method", "figure", "value", "ci95", "ways", "shots", "queries", "count", "seed", "split", "classes"]
COLUMNS += ["protocol", "ranking", "episodes_hash", "note"]
EPISODIC = EpisodicResult(0.987654321, 0.00123, torch.zeros(10_000), EpisodeSpec(5, 1, 15), 3, "0123456789abcdef")
RETRIEVAL = RetrievalResult(
    {
        "mean_average_precision_at_r": torch.tensor([0.5, 0.25, 0.0, 1.0]).double(),
        "recall_at_4": torch.ones(4).double(),
    },
    num_left_out=0,
    k=7,
)


def filled() -> ResultTable:
    table = ResultTable()
    table.add_episodic(Judgement("ProtoNet", "test", 1692), EPISODIC)
    table.add_retrieval(Judgement("ProtoNet", "val", 16, "150 of 600 images a class"), RETRIEVAL)
    return table


def test_an_episodic_row_holds_all_that_is_needed_to_repeat_it():
    (row, *_) = filled().rows
    assert row == ResultRow(
        method="ProtoNet",
        figure="accuracy",
        value=0.987654321,
        ci95=0.00123,
        ways=5,
        shots=1,
        queries=15,
        count=10_000,
        seed=3,
        split="test",
        classes=1692,
        protocol="inductive",
        episodes_hash="0123456789abcdef",
        note="",
    )
    table = ResultTable()
    table.add_episodic(Judgement("MAML", "test", 20, transductive=True), EPISODIC)
    assert table.rows[0].protocol == "transductive"


def test_a_retrieval_result_gives_a_row_for_each_figure():
    _, precision, recall = filled().rows
    assert (precision.figure, precision.value, precision.count) == ("mean_average_precision_at_r", 0.4375, 4)
    assert precision.ci95 == RETRIEVAL.ci95("mean_average_precision_at_r")
    assert (recall.figure, recall.value, recall.ci95) == ("recall_at_4", 1, 0)
    for row in (precision, recall):
        assert (row.ways, row.shots, row.queries, row.seed, row.episodes_hash) == (None, None, None, None, "")
        assert (row.split, row.classes, row.note) == ("val", 16, "150 of 600 images a class")
        assert row.protocol == "leave-one-out"


def test_markdown_gives_percent_with_interval_and_protocol():
    assert filled().markdown() == (
        "| method | figure | % | 95 % interval | over | split | protocol |\n"
        "|---|---|---|---|---|---|---|\n"
        "| ProtoNet | 5-way 1-shot accuracy | 98.77 | +- 0.12 | 10,000 episodes of 15 queries a class, seed 3 | "
        "test, 1,692 classes | inductive |\n"
        "| ProtoNet | MAP@R | 43.75 | +- 41.84 | 4 queries | val, 16 classes (150 of 600 images a class) "
        "| leave-one-out |\n"
        "| ProtoNet | recall at 4 | 100.00 | +- 0.00 | 4 queries | val, 16 classes (150 of 600 images a class) "
        "| leave-one-out |\n"
    )
    assert str(filled()) == filled().markdown()


def test_every_line_of_markdown_has_the_same_cells():
    table = filled()
    table.add_retrieval(Judgement("x", "test", 3), RetrievalTester().test(made_up()))
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + 3 + 3
    assert {line.count("|") for line in lines} == {8}


def test_csv_keeps_every_value_to_the_last_digit():
    table = filled()
    table.rows[0] = ResultRow(**(vars(table.rows[0]) | {"note": 'said "so", twice\nand again', "value": 1 / 3}))
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert list(rows[0]) == COLUMNS
    for row, original in zip(rows, table.rows, strict=True):
        for name, text in row.items():
            value = getattr(original, name)
            assert text == ("" if value is None else str(value))
            if isinstance(value, float):
                assert float(text) == value


def test_both_files_are_written(tmp_path: Path):
    filled().write(tmp_path)
    assert (tmp_path / "results.csv").read_text() == filled().csv()
    assert (tmp_path / "results.md").read_text() == filled().markdown()
    with pytest.raises(FileNotFoundError):
        filled().write(tmp_path / "nowhere")


def test_an_empty_table_has_its_heads():
    assert ResultTable().csv() == ",".join(COLUMNS) + "\n"
    assert len(ResultTable().markdown().splitlines()) == 2
    rows = filled().rows
    table = ResultTable(iter(rows))
    table.rows.clear()
    assert len(rows) == 3  # the caller's list is its own


def made_up() -> EmbeddingBank:
    return EmbeddingBank(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)


def test_figures_over_a_gallery_are_not_called_leave_one_out():
    table = ResultTable()
    table.add_retrieval(Judgement("x", "test", 3), RetrievalTester().test(made_up(), reference=made_up()))
    assert all(row.protocol != "leave-one-out" for row in table.rows)
