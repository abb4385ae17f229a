"""Ctrl-C and SIGTERM: the step is finished and saved, and resuming ends in the same bits; a second one acts at once."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pml_fewshot.experiment.run import run
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.episodes import Episode
from pml_fewshot.training.interruption import StopOnSignal, TrainingInterrupted
from tests.killing import outcome
from tests.tiny_experiments import TINY_EXPERIMENTS

TINY = TINY_EXPERIMENTS["protonet"]


@pytest.fixture
def _signal_at(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Sends a signal while a certain batch is being drawn: the others are drawn as ever."""
    number, step = request.param
    drawn = 0
    draw = EpisodeStream.__next__

    def draw_and_send(stream: EpisodeStream) -> Episode:
        nonlocal drawn
        drawn += 1
        if drawn == step:
            signal.raise_signal(number)
        return draw(stream)

    monkeypatch.setattr(EpisodeStream, "__next__", draw_and_send)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `main` has it
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler, "the signal was not given back"
    signal.signal(signal.SIGTERM, before)


# the first step, a validation's, amid the losses of a window, the last step
@pytest.mark.parametrize(
    "_signal_at",
    [(signal.SIGTERM, step) for step in (1, 8, 24)] + [(signal.SIGINT, 10)],
    indirect=True,
)
@pytest.mark.usefixtures("_signal_at")
def test_interrupted_run_is_saved_at_its_step_and_resumes_bit_for_bit(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    number, step = request.node.callspec.params["_signal_at"]
    config = replace(TINY, run_dir=tmp_path / "run")
    message = rf"interrupted by {number.name} after step {step}, saved in .*last\.pt.*--resume"
    with pytest.raises(TrainingInterrupted, match=message):
        run(config)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["history"]["steps"] == step
    run(config, resume=True)
    run(replace(config, run_dir=tmp_path / "whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_second_signal_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopOnSignal() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("continued")


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do for what runs in the background
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_outside_of_the_main_thread_nothing_is_noted(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(replace(TINY, steps=2, run_dir=tmp_path / "run"))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert (tmp_path / "run" / "results.csv").exists()


@pytest.mark.parametrize("_signal_at", [(signal.SIGINT, 4)], indirect=True)
@pytest.mark.usefixtures("_signal_at")
def test_a_nan_before_the_signal_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = TINY.trainer.func.forward  # type: ignore[attr-defined]
    calls = iter(range(1, 100))

    def forward(trainer: torch.nn.Module, batch: Episode) -> torch.Tensor:
        return loss(trainer, batch) * (float("nan") if next(calls) == 4 else 1.0)

    monkeypatch.setattr(TINY.trainer.func, "forward", forward)  # type: ignore[attr-defined]
    with pytest.raises(ArithmeticError, match=r"loss of nan at step 4 .* on a batch of classes \d a\d, "):
        run(replace(TINY, run_dir=tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["history"]["steps"] == 3
    assert all(value.isfinite().all() for value in state["trainer"].values())


def test_a_forked_child_ends_as_it_would_without_us() -> None:
    with StopOnSignal() as stop:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # instead of forever, should the signal be swallowed
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert stop.received is None
