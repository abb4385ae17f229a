"""Going back after a NaN: to the last checkpoint, with half the rate, a bounded number of times, without a trace."""

import math
import signal
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from pml_fewshot.checkpoint import load_checkpoint
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.episodes import Episode
from pml_fewshot.experiment import run
from pml_fewshot.trainers.divergence import TrainingDiverged
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.training_state import history_of
from tests.killing import outcome
from tests.test_recording import csv_rows, table
from tests.tiny_experiments import TINY_EXPERIMENTS

TINY = replace(
    TINY_EXPERIMENTS["protonet"],
    steps=16,
    validate_every=8,
    checkpoint_every=6,
    optimizer=partial(SGD, lr=0.1),
)


@pytest.fixture
def _nan_at(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Makes the loss of certain forward passes of the process NaN, whatever step they belong to."""
    wrong, calls, forward = request.param, count(1), ProtoNetTrainer.forward

    def forward_or_nan(trainer: ProtoNetTrainer, batch: Episode) -> torch.Tensor:
        return forward(trainer, batch) * (float("nan") if next(calls) in wrong else 1.0)

    monkeypatch.setattr(ProtoNetTrainer, "forward", forward_or_nan)


@pytest.mark.parametrize("_nan_at", [(10,)], indirect=True)
@pytest.mark.usefixtures("_nan_at")
def test_goes_back_with_half_the_rate_and_records_each_step_once(tmp_path: Path) -> None:
    # step 10 is NaN, seen at the checkpoint of step 12: back to that of step 8, a validation's
    run(replace(TINY, run_dir=tmp_path / "run", retries=1))
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert (history["retries"], history["steps"]) == (1, 16)
    rows = table(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [1, 6, 8, 12, 16]
    assert [int(row["step"]) for row in csv_rows(tmp_path / "run", "train")] == [1, 6, 8, 12, 16]
    cosine = [0.05 * (1 + math.cos((step - 1) / 16 * math.pi)) for step in (1, 6, 8, 12, 16)]
    factors = [row["learning_rate"] / rate for row, rate in zip(rows, cosine, strict=True)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.5])
    assert [step for step, *_ in history["validations"]] == [8, 16]


@pytest.mark.parametrize("_nan_at", [(10, 15)], indirect=True)
@pytest.mark.usefixtures("_nan_at")
def test_the_second_time_is_an_error_when_one_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"at step 11 \(learning rate 0\.0154\d*\)"):
        run(replace(TINY, run_dir=tmp_path / "run", retries=1))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["history"]["steps"], state["history"]["retries"]) == (8, 1)
    assert all(value.isfinite().all() for value in state["trainer"].values())


@pytest.mark.parametrize("_nan_at", [(10,)], indirect=True)
@pytest.mark.usefixtures("_nan_at")
def test_after_going_back_the_same_batches_come_again(tmp_path: Path) -> None:
    """With a factor of 1 in place of one half the run is the one that never diverged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pml_fewshot.trainers.fit.RATE_AFTER_RETRY", 1.0)
        run(replace(TINY, run_dir=tmp_path / "back", retries=1))
    run(replace(TINY, run_dir=tmp_path / "never"))
    back, never = (load_checkpoint(tmp_path / name / "last.pt") for name in ("back", "never"))
    assert all(torch.equal(back["trainer"][name], never["trainer"][name]) for name in never["trainer"])
    assert history_of(back).losses == history_of(never).losses


@pytest.mark.parametrize("_nan_at", [(10,)], indirect=True)
@pytest.mark.usefixtures("_nan_at")
def test_a_list_of_batches_goes_back_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        Episode(torch.rand(1, 3, 1, 1, 4, 4, generator=generator), torch.rand(1, 3, 2, 1, 4, 4, generator=generator))
        for _ in range(16)
    ]
    seen: list[int] = []

    class Noted(list[Episode]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for number, batch in enumerate(list.__iter__(self), start=1):
                seen.append(number)
                yield batch

    trainer = TINY.trainer()
    fit(
        trainer,
        Noted(batches),
        SGD(trainer.parameters(), lr=0.01),
        16,
        checkpoint=tmp_path / "last.pt",
        checkpoint_every=6,
        retries=1,
        progress=False,
    )
    # (a list is walked over again from its beginning, up to where it went on)
    assert seen == [*range(1, 13), *range(1, 17)]


def test_retries_want_a_checkpoint() -> None:
    trainer = TINY.trainer()
    with pytest.raises(ValueError, match="expected a checkpoint to go back to"):
        fit(trainer, [], SGD(trainer.parameters(), lr=0.01), 1, retries=1)
    with pytest.raises(ValueError, match="retries of at least 0"):
        fit(trainer, [], SGD(trainer.parameters(), lr=0.01), 1, retries=-1)


def test_an_interruption_does_not_change_where_a_training_goes_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption is saved at step 10, and the NaN of step 11 leads back to step 8 all the same."""
    forward, draw = ProtoNetTrainer.forward, EpisodeStream.__next__
    steps: list[int] = []  # drawn, of which the first time that step 11 comes is NaN

    def nan_at_eleven(trainer: ProtoNetTrainer, batch: Episode) -> torch.Tensor:
        wrong = steps[-1] == 11 and steps.count(11) == 1
        return forward(trainer, batch) * (float("nan") if wrong else 1.0)

    def draw_and_send(stream: EpisodeStream) -> Episode:
        steps.append(stream._position + 1)
        if interrupted and len(steps) == 10:
            signal.raise_signal(signal.SIGINT)
        return draw(stream)

    monkeypatch.setattr(ProtoNetTrainer, "forward", nan_at_eleven)
    monkeypatch.setattr(EpisodeStream, "__next__", draw_and_send)
    outcomes = []
    for interrupted in (False, True):
        steps.clear()
        config = replace(TINY, run_dir=tmp_path / str(interrupted), retries=1)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                run(config)
        run(config, resume=True)
        outcomes.append(outcome(config.run_dir))
    assert steps[9:14] == [10, 11, 12, 9, 10]
    assert outcomes[0] == outcomes[1]
