"""How a command ends: 75 where --resume goes on, 130 where nothing had begun, one line for our own errors."""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pml_fewshot.command_line import main
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.episodes import Episode
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.exit_codes import INTERRUPTED, RESUMABLE, one_line_errors
from pml_fewshot.sweeps import sweep_main
from tests import tiny_experiments
from tests.killing import outcome
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set, tiny_splits

TINY = TINY_EXPERIMENTS["protonet"]


def send_once(number: signal.Signals) -> Callable[[], None]:
    left = [number]

    def send() -> None:
        if left:
            signal.raise_signal(left.pop())

    return send


def ended(monkeypatch: pytest.MonkeyPatch, config: object, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main(config)  # type: ignore[arg-type]
    return stopped.value.code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_training_ends_with_75_and_is_resumed_by_what_it_says(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send, draw = send_once(number), EpisodeStream.__next__

    def draw_and_send(stream: EpisodeStream) -> Episode:
        if (tmp_path / "run" / "last.pt").exists():
            send()
        return draw(stream)

    monkeypatch.setattr(EpisodeStream, "__next__", draw_and_send)
    assert ended(monkeypatch, TINY, "--run-dir", str(tmp_path / "run")) == RESUMABLE == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"interrupted by {number.name} after step 2, saved in ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    arguments = said.split("go on with ")[1].split()
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    main(TINY)
    monkeypatch.setattr(sys, "argv", ["experiment", "--run-dir", str(tmp_path / "whole")])
    main(TINY)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_interrupted_while_it_is_judged_it_can_be_resumed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send, evaluate = send_once(signal.SIGTERM), EpisodicEvaluator.evaluate

    def evaluate_and_send(evaluator: EpisodicEvaluator, *args: object, **options: object) -> object:
        if (tmp_path / "run" / "embedder.safetensors").exists():
            send()
        return evaluate(evaluator, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EpisodicEvaluator, "evaluate", evaluate_and_send)
    assert ended(monkeypatch, TINY, "--run-dir", str(tmp_path / "run")) == RESUMABLE
    assert "interrupted; go on with --run-dir" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.csv").exists()
    monkeypatch.setattr(sys, "argv", ["experiment", "--run-dir", str(tmp_path / "run"), "--resume"])
    assert main(TINY).rows


def test_interrupted_before_it_began_there_is_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Splits:
        signal.raise_signal(signal.SIGTERM)
        return tiny_splits()

    assert ended(monkeypatch, replace(TINY, data=load), "--run-dir", str(tmp_path / "run")) == INTERRUPTED == 130
    assert "interrupted before" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_interrupted_while_it_loads_its_data_again_it_can_still_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["experiment"])
    main(config)
    (tmp_path / "run" / "figures.csv").unlink()
    send = send_once(signal.SIGTERM)
    monkeypatch.setattr(tiny_experiments, "tiny_set", lambda *args: send() or tiny_set(*args))  # type: ignore[func-returns-value]
    arguments = ("--run-dir", str(tmp_path / "run"), "--resume")
    assert ended(monkeypatch, config, *arguments) == RESUMABLE
    assert main(config).rows


def test_interrupted_sweep_stops_as_a_whole_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send, draw = send_once(signal.SIGTERM), EpisodeStream.__next__

    def draw_and_send(stream: EpisodeStream) -> Episode:
        if (tmp_path / "second" / "last.pt").exists():
            send()
        return draw(stream)

    monkeypatch.setattr(EpisodeStream, "__next__", draw_and_send)
    configs = [replace(TINY, name=name) for name in ("first", "second", "third")]
    monkeypatch.setattr(sys, "argv", ["sweep", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        sweep_main("some", configs)
    assert stopped.value.code == RESUMABLE
    assert not (tmp_path / "third").exists()
    table = sweep_main("some", configs)
    assert {row.method for row in table.rows} == {"first", "second", "third"}
    assert not table.failures


def test_errors_of_others_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        print(1 / 0)
    with pytest.raises(ValueError, match="theirs"), one_line_errors():
        raise ValueError("theirs")
