"""report.html of runs: of what is in it, and of what is wrong with a run."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pml_fewshot import EpisodeSpec, FewShotDataset, PrototypicalLoss, ResultTable, Splits, adaptation_curve, run, sweep
from pml_fewshot.evaluation.statistics import Comparison
from pml_fewshot.experiment import run_report, runs_report
from pml_fewshot.experiment.comparison import PairedDifference
from pml_fewshot.experiment.run_report import records, report_run, subject_of
from pml_fewshot.io.tensors import json_checksum
from tests.tiny_experiments import TINY_EXPERIMENTS, Finished, tiny_set

PROTONET = replace(TINY_EXPERIMENTS["protonet"], report=True)
HEADINGS = ["What was run", "Results", "At a glance", "Example episodes", "Training", "Accuracy over ways and shots"]
LAST = ["Embeddings", "How sure it is", "Versions and config"]


class Parts(HTMLParser):
    """The headings, visible texts, images and links of a page; `open` are tags that nobody closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "source", "br"):
            self.open.append(tag)
        self.images += [dict(attrs)] if tag == "img" else []
        self.links += [str(dict(attrs).get("href"))] if tag == "a" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            self.headings += [data] if self.open[-1] == "h2" else []

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def parts_of(path: Path) -> Parts:
    parts = Parts(path.read_text("utf-8"))
    assert parts.open == []
    return parts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A ProtoNet's run with its report; not to be changed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    paper = {"A & B 2017, <table 1>": {"5-way 1-shot": "98.7", "7-way 3-shot": "12.3"}}
    config = replace(PROTONET, run_dir=folder, published=paper)
    return Finished(config, folder, run(config))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    shutil.copytree(finished.folder, tmp_path / "run")
    return finished._replace(folder=tmp_path / "run", config=replace(finished.config, run_dir=tmp_path / "run"))


def test_a_run_ends_with_a_report_of_all_that_it_has(finished: Finished) -> None:
    parts = parts_of(finished.folder / "report.html")
    text = parts.text()
    assert parts.headings == [*HEADINGS, "What is confused", *LAST]
    for row in finished.table.rows:
        assert f"{100 * row.value:.2f}" in text
    assert "A & B 2017, <table 1> 98.7" in text  # in a row of its own, below the same column
    assert "A & B 2017, <table 1>, 7-way 3-shot: 12.3" in text  # of a column that ours does not have
    stored = json.loads((finished.folder / "config.json").read_text())
    assert stored["commands"][0] in text
    assert stored["sessions"][0]["torch"] in text
    assert stored["data"]["test"]["checksum"] in text
    assert len(parts.images) == 10
    assert all(len(str(image["alt"])) > 30 for image in parts.images)


def test_each_chart_is_a_picture_with_its_description_and_its_numbers(finished: Finished) -> None:
    names = {path.name for path in (finished.folder / "report").iterdir()}
    charts = ["accuracy-grid", "confusion", "curve-accuracy", "curve-loss", "embedding-map", "episode-typical"]
    charts += ["episode-worst", "neighbors", "reliability", "result"]
    pictures = {f"{chart}{dark}.png" for chart in charts for dark in ("", "-dark")}
    assert names == pictures | {f"{chart}.csv" for chart in charts if chart != "embedding-map"}
    alts = {image["alt"] for image in parts_of(finished.folder / "report.html").images}
    for name in pictures:
        with Image.open(finished.folder / "report" / name) as image:
            assert image.info["Description"] in alts
    with (finished.folder / "report" / "curve-loss.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["curve", "step", "loss"]
    steps, losses = records(finished.folder, "train", "loss")
    assert [(float(row[1]), float(row[2])) for row in rows] == list(zip(steps, losses, strict=True))


def test_the_numbers_below_a_picture_are_those_of_the_evaluator(finished: Finished) -> None:
    drawn_of = runs_report.trained_subject(finished.folder, "tests.tiny_experiments", "cpu", None)
    assert not isinstance(drawn_of, str)
    with (finished.folder / "report" / "accuracy-grid.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["ways"], row["shots"]) for row in rows} == {(w, s) for w in "25" for s in "125"}  # six classes of ten
    for row in rows:
        spec = EpisodeSpec(int(row["ways"]), int(row["shots"]), 5)
        result = drawn_of.evaluate(spec, int(row["episodes"]))
        assert float(row["accuracy, %"]) == pytest.approx(100 * result.mean)
        assert float(row["+-"]) == pytest.approx(100 * result.ci95)
    with (finished.folder / "report" / "confusion.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            counts = [int(value) for name, value in row.items() if name not in ("queries of", "all")]
            assert sum(counts) == int(row["all"])  # of six classes at once all are shown


def test_at_a_glance_are_the_episodes_of_the_table(finished: Finished) -> None:
    with (finished.folder / "report" / "result.csv").open(newline="") as file:
        rows = [(float(row["accuracy, %"]), int(row["episodes"])) for row in csv.DictReader(file)]
    values = next(row.values for row in finished.table.rows if row.ways)
    assert values is not None
    assert rows == [(100 * value, values.tolist().count(value)) for value in sorted(set(values.tolist()), reverse=True)]
    assert "that of the table's episodes, inductive" in parts_of(finished.folder / "report.html").text()


def test_the_table_of_fewer_steps_than_a_run_is_now_for_is_not_shown(copied: Finished) -> None:
    stored = json.loads((copied.folder / "config.json").read_text())
    stored.pop("checksum")
    stored["config"]["steps"] = 48
    (copied.folder / "config.json").write_text(json.dumps({**stored, "checksum": json_checksum(stored)}))
    text = parts_of(report_run(copied.folder, "not asked for")).text()
    assert "of 48 steps, 24 steps are in its checkpoint" in text
    assert "A run that is not finished" in text
    assert f"{100 * copied.table.rows[0].value:.2f}" not in text


def test_differences_to_different_runs_stand_apart() -> None:
    found = Comparison(0.01, 0.002, 100)
    pairs = (("b", "a"), ("b: x", "a: x"))
    paired = [PairedDifference("5-way 1-shot", method, best, found) for method, best in pairs]
    titles = [chart.title for chart in runs_report._differences(paired)]
    assert titles == ["5-way 1-shot: minus a", "5-way 1-shot: minus a: x"]


@pytest.mark.long
@pytest.mark.parametrize("file", ["figures.csv", "values.npz", "config.json", "logs.db"])
def test_a_damaged_run_does_not_cost_a_report_of_several(file: str, copied: Finished, tmp_path: Path) -> None:
    for place in ("a", "b", "c"):
        shutil.copytree(copied.folder, tmp_path / place / "run")
    folders = [tmp_path / place / "run" for place in ("a", "b", "c")]
    (folders[1] / file).write_bytes(b"no such thing" * 99)
    parts = parts_of(runs_report.report_runs(folders, tmp_path / "all", "three"))
    assert "Training" in parts.headings
    assert len(set(parts.links)) == (2 if file == "config.json" else 3)
    text = parts.text()
    assert text.count("failed: expected") == (0 if file == "logs.db" else 1)
    assert str(folders[0]) in text  # of one name and folder, they are told apart by their places


def test_ctrl_c_while_drawing_leaves_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_report, "report_run", interrupted)
    assert run(replace(PROTONET, steps=2, run_dir=tmp_path / "a run")).rows
    assert f"the run is finished: python -m pml_fewshot.report '{tmp_path / 'a run'}'" in capsys.readouterr().out


@pytest.mark.long
def test_a_report_is_drawn_again_from_the_folder(copied: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = parts_of(copied.folder / "report.html")
    shutil.rmtree(copied.folder / "report")
    (copied.folder / "report").mkdir()
    (copied.folder / "report" / "old-picture.png").write_bytes(b"of an earlier version")
    (copied.folder / "report" / "notes.txt").write_text("the user's own")
    drawn_of = runs_report.trained_subject(copied.folder, "tests.tiny_experiments", "cpu", None)
    again = parts_of(report_run(copied.folder, drawn_of))
    assert again.headings == before.headings
    assert not (copied.folder / "report" / "old-picture.png").exists()
    assert (copied.folder / "report" / "notes.txt").exists()
    assert (copied.folder / "report" / "confusion.png").exists()


@pytest.mark.long
def test_what_adapts_to_each_episode_shows_its_steps_and_says_what_it_has_not(tmp_path: Path) -> None:
    run(replace(TINY_EXPERIMENTS["maml"], report=True, run_dir=tmp_path / "run"))
    parts = parts_of(tmp_path / "run" / "report.html")
    assert parts.headings == [*HEADINGS, "Adaptation", "What is confused", *LAST]
    assert "expected embeddings (M, D), got a bank of shape (60, 1, 4, 4)" in parts.text()
    with (tmp_path / "run" / "report" / "adaptation.csv").open(newline="") as file:
        rows = [(row["inner steps"], float(row["accuracy, %"])) for row in csv.DictReader(file)]
    drawn_of = runs_report.trained_subject(tmp_path / "run", "tests.tiny_experiments", "cpu", None)
    assert not isinstance(drawn_of, str)
    counted = re.search(r"([\d,]+) episodes \(5-way 1-shot 5-query, seed 0\), 95 % intervals", parts.text())
    assert counted is not None
    episodes = int(counted[1].replace(",", ""))
    curve = adaptation_curve(drawn_of.trainer, drawn_of.dataset, EpisodeSpec(5, 1, 5), episodes)
    assert rows == [(str(step), pytest.approx(100 * each.mean)) for step, each in enumerate(curve)]


def test_a_run_without_a_report_writes_none(tmp_path: Path) -> None:
    run(replace(PROTONET, report=False, steps=2, run_dir=tmp_path / "run"))
    assert not list((tmp_path / "run").glob("report*"))


def test_an_error_while_drawing_leaves_the_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise ZeroDivisionError("of the drawing")

    config = replace(PROTONET, steps=2, run_dir=tmp_path / "run")
    monkeypatch.setattr(run_report, "report_run", failing)
    table = run(config)
    shown = capsys.readouterr()
    assert "ZeroDivisionError: of the drawing" in shown.err
    assert f"python -m pml_fewshot.report {tmp_path / 'run'} tries it again" in shown.out
    assert ResultTable.read(tmp_path / "run").rows == table.rows == run(config, resume=True).rows


@pytest.mark.long
def test_one_picture_that_fails_does_not_cost_the_others(
    copied: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of one picture")

    monkeypatch.setattr("pml_fewshot.report.trainer_charts.calibration_bins", failing)
    monkeypatch.setattr("pml_fewshot.experiment.run_report.plot_curves", failing)
    drawn_of = runs_report.trained_subject(copied.folder, "tests.tiny_experiments", "cpu", None)
    parts = parts_of(report_run(copied.folder, drawn_of))
    assert parts.text().count("Not drawn: ZeroDivisionError: of one picture") == 3
    assert "Traceback" in capsys.readouterr().err
    assert len(parts.images) == 7


def test_without_weights_or_data_the_report_has_what_there_is(copied: Finished) -> None:
    parts = parts_of(report_run(copied.folder, "expected the data, got none"))
    assert parts.headings == [
        "What was run",
        "Results",
        "Pictures of the trained method",
        "Training",
        "Versions and config",
    ]
    assert "Not drawn: expected the data, got none" in parts.text()
    (copied.folder / "last.pt").unlink()
    for path in copied.folder.glob("*.csv"):
        path.unlink()
    (copied.folder / "logs.db").unlink()
    parts = parts_of(report_run(copied.folder, "no weights"))
    assert parts.headings == ["What was run", "Results", "Pictures of the trained method", "Versions and config"]
    assert "This run has no table yet: of 24 steps, no checkpoint yet" in parts.text()


def test_a_run_that_was_interrupted_says_how_far_it_came(copied: Finished) -> None:
    stored = json.loads((copied.folder / "config.json").read_text())
    del stored["finished"], stored["checksum"]
    (copied.folder / "config.json").write_text(json.dumps({**stored, "checksum": json_checksum(stored)}))
    text = parts_of(report_run(copied.folder, "not asked for")).text()
    assert "of 24 steps, 24 steps are in its checkpoint. --resume continues it." in text


@pytest.mark.parametrize("file", ["logs.db", "figures.csv", "values.npz", "last.pt"])
def test_a_damaged_file_costs_its_own_part_alone(file: str, copied: Finished) -> None:
    (copied.folder / file).write_bytes(b"no such \xff thing" * 99)
    parts = parts_of(report_run(copied.folder, "not asked for"))
    assert parts.headings == ["What was run", "Results", "Pictures of the trained method", "Training", LAST[-1]]
    assert parts.text().count("Not drawn: ") == 2  # one of them of the pictures, which were not asked for


class OfNaN(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * torch.nan


def made_up(names: list[str], items: int = 10) -> FewShotDataset:
    images = torch.randint(0, 256, (len(names) * items, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return FewShotDataset(images.byte(), torch.arange(len(names)).repeat_interleave(items), names)


def drawn(tmp_path: Path, trainer: Any, data: FewShotDataset, copied: Finished, spec: EpisodeSpec) -> Parts:
    splits = Splits(data, None, data, shared_classes=True)
    config = replace(copied.config, eval_specs=(spec,))
    return parts_of(report_run(copied.folder, subject_of(trainer.eval(), splits, config)))


def test_nan_is_named_once(copied: Finished, tmp_path: Path) -> None:
    trainer = copied.config.trainer(embedder=OfNaN())
    text = drawn(tmp_path, trainer, tiny_set("c", 6, 2), copied, EpisodeSpec(5, 1, 5)).text()
    assert text.count("Not drawn: expected finite embeddings, got NaN or infinity in 60 of 60 rows") == 1
    assert "Results" in text


HEBREW = "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} \N{HANGUL SYLLABLE HAN}"
NAMES = ["<script>alert(1)</script>", "a" * 200, HEBREW, "$x_1$ & \\frac", "two\nlines"]


@pytest.mark.long
@pytest.mark.parametrize(("names", "items"), [(NAMES, 10), (["one", "two"], 2), (["alone"], 3)])
def test_names_are_shown_as_they_are_and_small_sets_are_drawn(
    names: list[str], items: int, copied: Finished, tmp_path: Path
) -> None:
    trainer = copied.config.trainer()
    spec = EpisodeSpec(2, 1, 1)
    parts = drawn(tmp_path, trainer, made_up(names, items), copied, spec)
    page_text = (copied.folder / "report.html").read_text("utf-8")
    assert "<script>alert" not in page_text
    assert "Error" not in parts.text()
    assert ("Not drawn" in parts.text()) == (len(names) < 2)
    if len(names) > 2:
        assert "<script>alert(1)</script>" in parts.text()  # as text, in the numbers of a picture


def test_probabilities_are_those_of_the_loss_that_was_trained() -> None:
    trainer = PROTONET.trainer(loss=PrototypicalLoss(scale=0.25)).eval()
    splits = Splits(tiny_set("c", 6, 2), None, tiny_set("c", 6, 2), shared_classes=True)
    drawn_of = subject_of(trainer, splits, replace(PROTONET, eval_specs=(EpisodeSpec(5, 2, 3),)))
    episodes, logits = drawn_of.scored.episodes, drawn_of.scored.logits
    rows = trainer.bank(splits.test).detach()
    for support, query, own in zip(rows[episodes.support], rows[episodes.query], logits, strict=True):
        squares = ((query.flatten(0, 1)[:, None] - support.mean(dim=1)) ** 2).sum(dim=2)
        torch.testing.assert_close(own.softmax(dim=1), (-0.25 * squares).softmax(dim=1))


def test_features_have_no_images_to_show(copied: Finished, tmp_path: Path) -> None:
    features = FewShotDataset(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4)
    trainer = copied.config.trainer(embedder=nn.Identity())
    text = drawn(tmp_path, trainer, features, copied, EpisodeSpec(2, 1, 5)).text()
    assert "expected images (C, H, W) of one or three channels, got items of shape (16,)" in text
    assert "Accuracy on unseen classes" in text
    assert "Map of 40 items of 4 classes" in text


@pytest.mark.long
def test_runs_are_drawn_side_by_side(finished: Finished, tmp_path: Path) -> None:
    longer = replace(PROTONET, name="longer <b>", steps=28)
    failing = replace(PROTONET, name="failing", data=partial(tiny_splits_of_nothing))
    table = sweep([PROTONET, longer, failing], tmp_path / "two")
    parts = parts_of(tmp_path / "two" / "report.html")
    text = parts.text()
    assert parts.headings == ["Results", "Paired differences to the best", "Configs differ in", "Training", "Runs"]
    assert "failing failed: FileNotFoundError: no data here" in text
    assert parts.links == ["protonet/report.html", "longer%20%3Cb%3E/report.html"]
    assert all((tmp_path / "two" / link).exists() for link in ("protonet/report.html", "longer <b>/report.html"))
    best, other = table.rows[0].method, {"protonet", "longer <b>"} - {table.rows[0].method}
    with (tmp_path / "two" / "report" / "difference-1.csv").open(newline="") as file:
        _, row = csv.reader(file)
    assert row[0] in other
    values = {r.method: r.values for r in table.rows if r.ways}
    difference = 100 * (values[row[0]] - values[best])  # type: ignore[operator]
    assert float(row[1]) == pytest.approx(difference.mean().item())
    assert float(row[2]) == pytest.approx(196 * (difference / 100).std().item() / len(difference) ** 0.5)


def tiny_splits_of_nothing() -> Splits:
    raise FileNotFoundError("no data here")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    runs_report.main()


@pytest.mark.long
def test_the_command_draws_one_run_or_several_or_a_folder_of_runs(
    copied: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    command(monkeypatch, copied.folder, "--open", "--experiment", "tests.tiny_experiments")
    assert opened == [(copied.folder / "report.html").as_uri()]
    assert len(parts_of(copied.folder / "report.html").images) == 10
    shutil.copytree(copied.folder, tmp_path / "second")
    command(monkeypatch, copied.folder, tmp_path / "second", "--to", tmp_path / "both")
    assert parts_of(tmp_path / "both" / "report.html").links == ["../run/report.html", "../second/report.html"]
    command(monkeypatch, tmp_path)  # both are directly below it
    assert parts_of(tmp_path / "report.html").links == ["run/report.html", "second/report.html"]
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")


@pytest.mark.parametrize("what", ["empty", "none", "ours not", "damaged", "old"])
def test_what_is_no_run_is_one_clear_error(what: str, copied: Finished, tmp_path: Path, monkeypatch: Any) -> None:
    folder, wanted = tmp_path / "other", r"no config\.json in it or directly below it"
    if what == "none":
        wanted = "nothing there"
    elif what in ("empty", "ours not"):
        folder.mkdir()
        if what == "ours not":
            (folder / "thesis.txt").write_text("mine")
    else:
        folder = copied.folder
        stored = json.loads((folder / "config.json").read_text())
        if what == "damaged":
            stored["config"]["steps"] = 25
            wanted = "as it was written, got another checksum"
        else:
            del stored["sessions"], stored["checksum"]
            stored["checksum"] = json_checksum(stored)
            wanted = r"expected a run of version 0\.6"
        (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match=rf"^error: .*{wanted}"):
        command(monkeypatch, folder)


def test_no_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: expected the folder of a run, got none"):
        command(monkeypatch)
