"""Recorder: what was recorded is on disk after save, once, whatever was killed in between; damage is a clear error."""

import csv
import importlib.util
import resource
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import record_keeper.db_utils

from pml_fewshot.checks import UsageError
from pml_fewshot.experiment.recorder import Recorder
from pml_fewshot.io.atomic import CannotWriteError
from tests.tiny_experiments import rows_of

GROUPS = ("train", "validation")


@pytest.fixture(autouse=True)
def _without_tensorboard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to import, and the tests that are not slow have nothing to do with it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def contents(folder: Path) -> dict[str, Any]:
    files = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    return {group: rows_of(folder, group) for group in GROUPS} | files


def record_some(recorder: Recorder, steps: range) -> None:
    """With a column that comes late: record-keeper then writes a second header into the CSV file."""
    for step in steps:
        recorder.record("train", step, loss=step / 2, **({"late": 1.0} if step >= 6 else {}))
        if step % 2 == 0:
            recorder.record("validation", step, accuracy=1 / step)
        if step % 3 == 0:
            recorder.save()
    recorder.save()


def test_database_and_csv_hold_each_row_once_after_save(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.record("train", 20, loss=0.5)
    assert not (tmp_path / "run" / "train.csv").exists()
    recorder.save()
    recorder.save()
    recorder.record("train", 40, loss=0.125, accuracy=1)  # a value that comes later gets its column
    recorder.record("validation", 40, accuracy=0.75)
    recorder.close()
    rows = rows_of(tmp_path / "run", "train")
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows] == [(20, 0.5, None), (40, 0.125, 1.0)]
    with (tmp_path / "run" / "validation.csv").open(newline="") as file:
        assert [(row["step"], row["accuracy"]) for row in csv.DictReader(file)] == [("40", "0.75")]
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("group", ["order", "sqlite_x", "5way", "val/acc", "", "Train", "../x", "_x", "a;b", "é"])
def test_names_that_cannot_be_a_table_or_file_are_refused(group: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a group named in lower-case letters.*; call it train"):
        Recorder(tmp_path).record(group, 1, loss=0.5)


@pytest.mark.parametrize("kept", [0, 4, 7, 9])
def test_forgotten_rows_leave_no_trace(kept: int, tmp_path: Path) -> None:
    whole, first = Recorder(tmp_path / "whole"), Recorder(tmp_path / "cut")
    for recorder, end in ((whole, 13), (first, 10)):  # the process was killed after it had saved these
        record_some(recorder, range(1, kept + 1))
        record_some(recorder, range(kept + 1, end))
    second = Recorder(tmp_path / "cut")
    second.record("train", 99, loss=0)  # not saved: forgotten too
    second.forget_after(kept, GROUPS)
    record_some(second, range(kept + 1, 13))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_half_written_lines_and_no_other_files_are_forgotten(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    record_some(recorder, range(1, 5))
    recorder.record("tested", 100, accuracy=1)
    recorder.save()
    (tmp_path / "results.csv").write_text("method,figure\nmine,1")
    whole = (tmp_path / "train.csv").read_bytes()
    record_some(recorder, range(5, 9))
    written = (tmp_path / "train.csv").read_bytes()
    for length in range(len(whole), len(written) + 1, 5):  # a process can be killed after any byte
        (tmp_path / "train.csv").write_bytes(written[:length])
        Recorder(tmp_path).forget_after(4, GROUPS)
        assert (tmp_path / "train.csv").read_bytes() == whole, length
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows_of(tmp_path, "tested")] == [100]
    assert (tmp_path / "results.csv").read_text() == "method,figure\nmine,1"


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    for first, end, factor in ((1, 8, 1), (6, 10, 10)):
        recorder = Recorder(tmp_path)
        recorder.forget_after(first - 1, GROUPS)
        for step in range(first, end):
            recorder.record("train", step, loss=factor * step)
        recorder.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [*((step, step) for step in range(1, 6)), *((step, 10 * step) for step in range(6, 10))]


@pytest.mark.slow
def test_event_file_that_cannot_grow_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_tensorboard_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", searched.append)
    record_some(Recorder(tmp_path), range(1, 6))
    assert searched == ["tensorboard"]


def test_every_connection_is_closed_after_errors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 warns of a connection that is collected without having been closed."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def watched(path: str, **options: Any) -> sqlite3.Connection:
        opened.append(connect(path, **options | {"timeout": 0.1}))
        return opened[-1]

    monkeypatch.setattr(record_keeper.db_utils.sqlite3, "connect", watched)
    recorder = Recorder(tmp_path)
    record_some(recorder, range(1, 7))
    recorder.record("train", 7, loss=0.5)
    with closing(connect(tmp_path / "logs.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CannotWriteError, match=r"database is locked; .* close what holds the file"):
            recorder.save()
    assert len(opened) >= 4
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


@pytest.mark.parametrize("file", ["logs.db", "train.csv"])
def test_damaged_records_are_one_clear_error(file: str, tmp_path: Path) -> None:
    record_some(Recorder(tmp_path), range(1, 40))
    content = bytearray((tmp_path / file).read_bytes())
    content[-60:] = b"\xa5" * 60 if file == "logs.db" else b"x,y\n" * 15
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=r"expected the records in .* as they were written, got damaged"):
        Recorder(tmp_path).forget_after(4, GROUPS)
