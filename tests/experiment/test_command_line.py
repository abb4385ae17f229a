"""The command line: options, one line for a user's mistake, exit codes that say whether --resume continues."""

import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pml_fewshot import EpisodeSpec, EpisodeStream, ExperimentConfig, ResultTable, Splits, UsageError, run
from pml_fewshot.checks import MissingFileError
from pml_fewshot.experiment.command_line import INTERRUPTED, RESUMABLE, main, one_line_errors
from tests import tiny_experiments
from tests.killing import outcome
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set, tiny_splits

SPECS = (EpisodeSpec(ways=5, shots=1, queries=5), EpisodeSpec(ways=5, shots=5, queries=5))
TINY = replace(TINY_EXPERIMENTS["protonet"], steps=6, eval_specs=SPECS)
BATCHES = replace(TINY_EXPERIMENTS["siamese"], steps=3, patience=None)

Command = Callable[..., ResultTable]
Ends = Callable[..., tuple[object, Any]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(*arguments: str | Path, config: ExperimentConfig = TINY) -> ResultTable:
        monkeypatch.setattr(sys, "argv", ["experiment", *map(str, arguments)])
        return main(config)

    return call


@pytest.fixture
def ends(command: Command, capsys: pytest.CaptureFixture[str]) -> Ends:
    """The exit code of a command, and what it prints."""

    def call(*arguments: str | Path, config: ExperimentConfig = TINY) -> tuple[object, Any]:
        with pytest.raises(SystemExit) as stopped:
            command(*arguments, config=config)
        return stopped.value.code, capsys.readouterr()

    return call


def test_options_change_the_run_and_nothing_else(command: Command, tmp_path: Path) -> None:
    options = ("--steps", "3", "--seed", "4", "--num-episodes", "12", "--train-spec.ways", "4")
    table = command(*options, "--run-dir", tmp_path / "run")
    spec = EpisodeSpec(ways=4, shots=1, queries=3)
    config = replace(TINY, steps=3, seed=4, num_episodes=12, train_spec=spec)
    assert table.rows == run(replace(config, run_dir=tmp_path / "same")).rows
    assert outcome(tmp_path / "run") == outcome(tmp_path / "same")


def test_eval_spec_evaluates_by_one_spec_and_batches_have_options(command: Command, tmp_path: Path) -> None:
    options = ("--eval-spec.ways", "3", "--eval-spec.shots", "2", "--train-spec.per-class", "2")
    table = command(*options, "--run-dir", tmp_path / "run", config=BATCHES)
    specs = [(row.ways, row.shots, row.queries) for row in table.rows if row.figure == "accuracy"]
    assert specs == [(3, 2, 5)]  # queries from the first spec of the file
    text = (tmp_path / "run" / "config.txt").read_text()
    assert "train_spec = BatchSpec(classes=4, per_class=2, views=1)\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setps", "3"), "--steps"),
        (("--steps", "three"), "three"),
        (("--device", "tpu"), "cuda"),
        (("--eval-spec.wasy", "3"), "--eval-spec.ways"),
        (("--train-spec.classes", "3"), "--train-spec.classes"),  # of batches
    ],
)
def test_misspelt_options_end_with_2_and_a_suggestion(arguments: tuple[str, ...], message: str, ends: Ends) -> None:
    code, printed = ends(*arguments)
    assert code == 2
    assert message in printed.out + printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "expected steps to be an integer of at least 1"),
        (("--eval-spec.ways", "5000"), "expected at least 5000 classes"),
        (("--eval-spec.shots", "0"), "expected shots to be an integer of at least 1"),
        (("--resume",), "expected the folder of a run to resume, got none; name it with --run-dir"),
    ],
)
def test_bad_values_end_in_one_line(arguments: tuple[str, ...], message: str, ends: Ends, tmp_path: Path) -> None:
    assert str(ends(*arguments)[0]).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_option(ends: Ends) -> None:
    code, printed = ends("--help", config=BATCHES)
    assert code == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", printed.out)
    options = ("--steps", "--seed", "--device", "--data-root", "--run-dir", "--num-episodes", "--resume")
    for option in (*options, "--train-spec.classes", "--train-spec.per-class", "--eval-spec.ways"):
        assert option in text
    for explanation in ("training steps", "items of each class", "support items of each class"):
        assert explanation in text


def test_resume_begins_gives_and_extends_a_run(command: Command, ends: Ends, tmp_path: Path) -> None:
    begun = command("--resume", "--run-dir", tmp_path / "run")
    assert begun.rows == command("--run-dir", tmp_path / "other").rows
    assert command("--resume", "--run-dir", tmp_path / "run").rows == begun.rows
    command("--resume", "--run-dir", tmp_path / "run", "--steps", "8")
    assert "steps = 8\n" in (tmp_path / "run" / "config.txt").read_text()
    assert str(ends("--run-dir", tmp_path / "run")[0]).startswith("error: expected a new or empty run folder")


def send_once(number: signal.Signals) -> Callable[[], None]:
    left = [number]

    def send() -> None:
        if left:
            signal.raise_signal(left.pop())

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_training_ends_with_75_and_is_resumed_by_what_it_says(
    number: signal.Signals, command: Command, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, draw = send_once(number), EpisodeStream.__next__

    def draw_and_send(stream: EpisodeStream) -> object:
        if (tmp_path / "run" / "last.pt").exists():  # before the second step
            send()
        return draw(stream)

    monkeypatch.setattr(EpisodeStream, "__next__", draw_and_send)
    code, printed = ends("--run-dir", tmp_path / "run")
    assert code == RESUMABLE == 75
    line = printed.err.splitlines()[-1]
    assert line.startswith(f"interrupted by {number.name} after step 2, saved in ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    command(*line.split("resume with ")[1].split())
    command("--run-dir", tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_interrupted_while_loading_a_run_is_resumable_where_it_was_trained(
    command: Command, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Splits:
        signal.raise_signal(signal.SIGTERM)
        return tiny_splits()

    config = replace(TINY, data=load)
    code, printed = ends("--run-dir", tmp_path / "run", config=config)
    assert code == INTERRUPTED == 130
    assert "interrupted before" in printed.err
    assert not (tmp_path / "run").exists()
    command("--run-dir", tmp_path / "run")
    (tmp_path / "run" / "figures.csv").unlink()
    send = send_once(signal.SIGTERM)
    monkeypatch.setattr(tiny_experiments, "tiny_set", lambda *args: send() or tiny_set(*args))
    assert ends("--run-dir", tmp_path / "run", "--resume")[0] == RESUMABLE


@pytest.mark.parametrize("error", [UsageError("expected x, got y; do z"), MissingFileError("expected a file")])
def test_a_users_mistake_is_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match=f"^error: {error}$"), one_line_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("expected sequence of length 2 at dim 1 (got 1)"), FileNotFoundError("theirs"), ZeroDivisionError()],
    ids=repr,
)
def test_all_other_errors_keep_their_traceback_whatever_they_say(error: Exception, command: Command) -> None:
    def load() -> Splits:
        raise error

    with pytest.raises(type(error)) as raised:
        command(config=replace(TINY, data=load))
    assert raised.value is error
