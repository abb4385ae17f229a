"""A sweep that several workers share: each experiment is run once, one of a dead worker is taken over."""

import fcntl
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pml_fewshot import ExperimentConfig, ResultTable, UsageError, run, sweep
from pml_fewshot.experiment import sweep as sweep_module
from pml_fewshot.experiment.run_folder import open_run
from pml_fewshot.training.interruption import TrainingInterrupted
from tests.sharing import BASE, printed, swept

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["first", "second", "third"]


def of_names(*names: str) -> list[ExperimentConfig]:
    return [each for each in swept(kills=False) if each.name in names]


@pytest.mark.slow
def test_workers_share_experiments_and_take_over_that_of_a_killed_one(shared_by_workers: Path, tmp_path: Path) -> None:
    folder = shared_by_workers / "sweep" / "shared"
    whole = sweep(swept(kills=False), tmp_path / "alone")
    assert ResultTable.read(folder).rows == whole.rows
    for file in ("results.md", "results.csv", "figures.csv"):
        assert (folder / file).read_text() == (tmp_path / "alone" / file).read_text()
    lines = printed(folder)
    assert lines.count("trained 24 steps") == len(NAMES), "each is finished by one worker"
    assert lines.count("Traceback (most recent call last)") == 1, "what fails is tried by one worker"
    tables = re.findall(r"^\| bad \| failed: UsageError", lines, re.MULTILINE)
    assert len(tables) == 2 * 2, "both that lived return the whole table"
    # a later call tries it again, and only that
    again = sweep([*of_names(*NAMES), replace(BASE, name="bad")], folder)
    assert again.failures == {}
    assert {row.method for row in again.rows} == {*NAMES, "bad"}


@pytest.mark.long
def test_one_that_another_process_runs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where that process has finished it, and run where that has died."""
    first, second = of_names("first", "second")
    with ExitStack() as elsewhere:
        elsewhere.enter_context(open_run(replace(first, run_dir=tmp_path / "first"), True))
        looks: list[str] = []

        def wait(seconds: float) -> None:
            looks.append((tmp_path / "results.md").read_text())
            if len(looks) == 3:
                elsewhere.close()

        monkeypatch.setattr(sweep_module.time, "sleep", wait)
        table = sweep([first, second], tmp_path)
    assert len(looks) == 3
    assert all("| first | failed: another process is running it" in look for look in looks)
    assert not table.failures
    assert {row.method for row in table.rows} == {"first", "second"}
    alone = run(replace(first, run_dir=tmp_path / "alone"))
    assert [row for row in table.rows if row.method == "first"] == alone.rows


def test_a_worker_that_waits_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module.time, "sleep", interrupted)
    (first,) = of_names("first")
    with (
        open_run(replace(first, run_dir=tmp_path / "first"), True),
        pytest.raises(TrainingInterrupted, match="the same command again continues"),
    ):
        sweep([first], tmp_path)


def test_the_last_worker_draws_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(sweep_module, "draw_runs", lambda *given: drawn.append(given))
    monkeypatch.setattr("pml_fewshot.experiment.run.draw_report", lambda *given: None)
    configs = [replace(each, report=True) for each in of_names("first")]
    with (tmp_path / ".workers").open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as a worker that still runs
        sweep(configs, tmp_path)
        assert not drawn
    sweep(configs, tmp_path)
    assert len(drawn) == 1


def test_torchrun_is_not_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="expected workers of a sweep that are started one by one, got torchrun"):
        sweep([BASE], tmp_path)
