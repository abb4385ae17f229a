"""Recorder: names that SQL would choke on are refused, and what was recorded is on disk after save."""

import csv
import importlib.util
import resource
import sqlite3
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD

from pml_fewshot.atomic import CannotWriteError
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.recording import Recorder
from pml_fewshot.trainers.fit import fit
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_splits


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorboard takes seconds to import, and most of what is tested here has nothing to do with it."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "tensorboard" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def table(folder: Path, group: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {group}")]


def csv_rows(folder: Path, group: str) -> list[dict[str, str]]:
    with (folder / f"{group}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("without_tensorboard")
def test_database_and_csv_hold_the_rows_after_save(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.record("train", 20, loss=0.5, accuracy=0.25)
    recorder.record("train", 40, loss=0.125, accuracy=1)
    recorder.record("validation", 40, accuracy=0.75)
    assert not (tmp_path / "run" / "train.csv").exists()
    recorder.save()
    rows = table(tmp_path / "run", "train")
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows] == [(20, 0.5, 0.25), (40, 0.125, 1.0)]
    assert [row["accuracy"] for row in table(tmp_path / "run", "validation")] == [0.75]
    written = csv_rows(tmp_path / "run", "train")
    assert [(int(row["step"]), float(row["loss"])) for row in written] == [(20, 0.5), (40, 0.125)]
    assert float(csv_rows(tmp_path / "run", "validation")[0]["accuracy"]) == 0.75
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.usefixtures("without_tensorboard")
def test_later_rows_are_appended_and_none_is_written_twice(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in (1, 2, 3):
        recorder.record("train", step, loss=step / 2)
        recorder.save()
    recorder.record("train", 4, loss=2)
    recorder.close()
    assert [row["step"] for row in table(tmp_path, "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in csv_rows(tmp_path, "train")] == ["1", "2", "3", "4"]


@pytest.mark.usefixtures("without_tensorboard")
def test_a_value_that_comes_later_gets_its_column(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record("train", 1, loss=0.5)
    recorder.save()
    recorder.record("train", 2, loss=0.25, accuracy=0.75)
    recorder.save()
    assert [row["accuracy"] for row in table(tmp_path, "train")] == [None, 0.75]


@pytest.mark.usefixtures("without_tensorboard")
def test_saving_nothing_is_fine(tmp_path: Path) -> None:
    Recorder(tmp_path / "run").close()
    assert (tmp_path / "run").is_dir()


BAD = ["order", "group", "select", "5way_1shot", "val/acc", "val-acc", "val acc", "", "Train", "../x", "_x", "a;b", "é"]


@pytest.mark.usefixtures("without_tensorboard")
@pytest.mark.parametrize("group", BAD)
def test_names_that_sql_or_a_file_system_would_choke_on_are_refused(group: str, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(ValueError, match=r"expected a group of lower-case letters .*; name it train"):
        recorder.record(group, 1, loss=0.5)


# words that cannot be the name of a table: each of https://sqlite.org/lang_keywords.html was tried
KEYWORDS = """
add all alter and as autoincrement between case check collate commit constraint create default deferrable delete
distinct drop else escape except exists foreign from group having if in index insert intersect into is isnull join
limit not nothing notnull null on or order primary references returning select set table then to transaction union
unique update using values when where
"""


@pytest.mark.usefixtures("without_tensorboard")
def test_every_word_is_refused_at_once_or_can_be_saved(tmp_path: Path) -> None:
    """A name that is accepted and fails when it is saved costs the records of the whole run."""
    lost = []
    for word in [*KEYWORDS.split(), "sqlite_x", "train", "validation", "test", "row", "rows", "plan", "key"]:
        recorder = Recorder(tmp_path / word)
        try:
            recorder.record(word, 1, loss=0.5)
        except ValueError:
            continue
        try:
            recorder.save()
        except sqlite3.Error:
            lost.append(word)
    assert lost == []


@pytest.mark.usefixtures("without_tensorboard")
def test_value_that_is_no_number_raises(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        Recorder(tmp_path).record("train", 1, loss="high")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed")
def test_tensorboard_gets_the_values_where_it_is_installed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path)
    recorder.record("train", 20, loss=0.5)
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(20, 0.5)]
    assert [row["loss"] for row in table(tmp_path, "train")] == [0.5]


# --- going on ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    rows = {group: table(folder, group) for group in ("train", "validation")}
    return {**rows, **{path.name: path.read_bytes() for path in folder.glob("*.csv")}}


def record_some(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.record("train", step, loss=step / 2, **({"late": 1.0} if step >= 6 else {}))
        if step % 2 == 0:
            recorder.record("validation", step, accuracy=1 / step)
        if step % 3 == 0:
            recorder.save()
    recorder.save()


@pytest.mark.usefixtures("without_tensorboard")
@pytest.mark.parametrize("kept", [0, 1, 4, 5, 7, 9])
def test_forgotten_rows_leave_no_trace(kept: int, tmp_path: Path) -> None:
    """A column that comes late is among them: record-keeper then writes a second header into the CSV file."""
    whole = Recorder(tmp_path / "whole")
    record_some(whole, range(1, kept + 1))
    record_some(whole, range(kept + 1, 13))
    first = Recorder(tmp_path / "cut")
    record_some(first, range(1, kept + 1))
    record_some(first, range(kept + 1, 10))  # killed after it had recorded these, saved those up to `kept`
    second = Recorder(tmp_path / "cut")
    second.forget_after(kept, ("train", "validation"))
    record_some(second, range(kept + 1, 13))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("without_tensorboard")
def test_unsaved_rows_are_forgotten_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record("train", 1, loss=1)
    recorder.save()
    recorder.record("train", 2, loss=2)
    recorder.forget_after(1, ("train", "validation"))
    recorder.close()
    assert [row["step"] for row in table(tmp_path, "train")] == [1]


@pytest.mark.usefixtures("without_tensorboard")
def test_other_groups_and_a_training_that_only_begins_are_left_alone(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record("train", 60, loss=1)
    recorder.record("judged", 100, accuracy=1)
    recorder.save()
    trainer = TINY_EXPERIMENTS["protonet"].trainer()
    stream = EpisodeStream(tiny_splits().train, EpisodeSpec(5, 1, 3), 0)
    fitted = partial(fit, trainer, stream, SGD(trainer.parameters(), lr=0.1), recorder=recorder, progress=False)
    fitted(steps=2, checkpoint=tmp_path / "last.pt", resume=True)  # there is nothing yet to go on with
    assert [row["step"] for row in table(tmp_path, "train")] == [60, 1, 2]
    fitted(steps=3, checkpoint=tmp_path / "last.pt", resume=True)
    assert [row["step"] for row in table(tmp_path, "train")] == [1, 2, 3]
    assert [row["step"] for row in table(tmp_path, "judged")] == [100]


@pytest.mark.usefixtures("without_tensorboard")
def test_half_written_lines_go_away(tmp_path: Path) -> None:
    """A process can be killed after any byte; whatever it had begun after its last checkpoint is dropped."""
    recorder = Recorder(tmp_path)
    record_some(recorder, range(1, 5))
    whole = (tmp_path / "train.csv").read_bytes()
    record_some(recorder, range(5, 9))
    written = (tmp_path / "train.csv").read_bytes()
    for length in range(len(whole), len(written) + 1):
        (tmp_path / "train.csv").write_bytes(written[:length])
        Recorder(tmp_path).forget_after(4, ("train", "validation"))
        assert (tmp_path / "train.csv").read_bytes() == whole, length
    assert [row["step"] for row in table(tmp_path, "train")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("without_tensorboard")
def test_files_of_results_beside_the_records_are_left_alone(tmp_path: Path) -> None:
    for name in ("results.csv", "figures.csv"):
        (tmp_path / name).write_text("method,figure\nmine,1")
    Recorder(tmp_path).forget_after(0, ("train", "validation"))
    assert (tmp_path / "results.csv").read_text() == "method,figure\nmine,1"


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    first = Recorder(tmp_path)
    for step in range(1, 8):
        first.record("train", step, loss=step)
    first.close()
    second = Recorder(tmp_path)
    second.forget_after(5, ("train", "validation"))
    for step in range(6, 10):
        second.record("train", step, loss=10 * step)
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [*((step, step) for step in range(1, 6)), *((step, 10 * step) for step in range(6, 10))]


def test_event_file_that_cannot_grow_is_an_error_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread dies of it, and tells its hook
    pytest.importorskip("tensorboard", reason="no tensorboard")
    recorder = Recorder(tmp_path)
    recorder.record("train", 0, loss=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CannotWriteError, match="File too large"):  # noqa: PT012
            for step in range(1, 100_000):
                recorder.record("train", step, loss=1)
            recorder.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("without_tensorboard")
def test_a_database_that_another_program_holds_is_one_clear_error(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record("train", 1, loss=0.5)
    recorder.save()
    recorder.record("train", 2, loss=0.4)
    with closing(sqlite3.connect(tmp_path / "logs.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CannotWriteError, match=r"database is locked; .* close what holds the file"):
            recorder.save()


@pytest.mark.usefixtures("without_tensorboard")
def test_a_damaged_database_is_refused_even_where_what_is_wanted_can_still_be_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in range(1, 9):
        recorder.record("train", step, loss=0.5)
        recorder.record("validation", step, accuracy=0.5)
    recorder.save()
    whole = (tmp_path / "logs.db").read_bytes()

    def readable(group: str) -> bool:
        with closing(sqlite3.connect(tmp_path / "logs.db")) as connection:
            try:
                return len(connection.execute(f"SELECT * FROM {group}").fetchall()) == 8
            except sqlite3.DatabaseError:
                return False

    def breaks_one_table(position: int) -> bool:
        (tmp_path / "logs.db").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        return readable("train") and not readable("validation")

    assert any(breaks_one_table(position) for position in range(4096, len(whole)))  # from the second page on
    with pytest.raises(ValueError, match="expected whole records"):
        Recorder(tmp_path).forget_after(4, ("train",))
