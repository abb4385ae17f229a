"""sweep: one table of several experiments, and what happens to those that failed or were interrupted."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, ContrastiveLoss, NTXentLoss

from pml_fewshot import BatchSpec, MetricTrainer, ResultTable, UsageError, run, swap, sweep
from pml_fewshot.experiment import run as run_module
from pml_fewshot.experiment.sweep import sweep_main
from pml_fewshot.io.atomic import CannotWriteError
from tests.tiny_experiments import EMBEDDER, tiny

TINY = tiny("tiny", trainer=partial(MetricTrainer, EMBEDDER), train_spec=BatchSpec(4, 3), num_episodes=60)
TINY = replace(TINY, steps=6, validate_every=100)
GOOD = [swap(TINY, name="contrastive", loss=ContrastiveLoss), swap(TINY, name="ntxent", loss=NTXentLoss)]
BAD = swap(TINY, name="too few classes", loss=partial(ArcFaceLoss, num_classes=2, embedding_size=8))


def accuracies(table: ResultTable) -> dict[str, float]:
    return {row.method: row.value for row in table.rows if row.figure == "accuracy"}


def test_every_experiment_is_a_line_as_if_run_alone_the_best_first(tmp_path: Path) -> None:
    table = sweep(GOOD, tmp_path / "all")
    alone = {c.name: run(replace(c, run_dir=tmp_path / f"{c.name} alone")).rows for c in GOOD}
    assert {name: [row for row in table.rows if row.method == name] for name in alone} == alone
    values = list(accuracies(table).values())
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 2, "a tie would show no order"
    assert (tmp_path / "all" / "results.md").read_text() == str(table)
    assert sweep(GOOD[::-1], tmp_path / "all").rows == table.rows


def test_one_that_fails_is_a_line_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sweep([BAD, GOOD[0]], tmp_path)
    assert set(accuracies(first)) == {"contrastive"}
    assert list(first.failures) == [BAD.name]
    assert "| too few classes | failed: UsageError: expected " in (tmp_path / "results.md").read_text()
    assert "failed: UsageError" in (tmp_path / "results.csv").read_text()
    assert "Traceback" in capsys.readouterr().err
    trained, real = [], run_module.fit
    monkeypatch.setattr(run_module, "fit", lambda *a, **k: trained.append(1) or real(*a, **k))
    better = swap(BAD, loss=partial(ArcFaceLoss, num_classes=8, embedding_size=8))
    second = sweep([GOOD[0], better], tmp_path)
    assert len(trained) == 1
    assert second.failures == {}
    assert accuracies(second) == accuracies(first) | {BAD.name: accuracies(second)[BAD.name]}


def test_an_interrupted_one_resumes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep(GOOD, tmp_path / "whole")
    real, seen = MetricTrainer.forward, []

    def interrupted(self: MetricTrainer, batch: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 9:  # the third step of the second experiment
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(MetricTrainer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command again continues"):
        sweep(GOOD, tmp_path / "parts")
    assert not (tmp_path / "parts" / "ntxent" / "figures.csv").exists()
    again = sweep(GOOD, tmp_path / "parts")
    assert len(seen) == 9 + 5, "the first was read, the second resumed after its first step, where its checkpoint is"
    assert again.rows == whole.rows


def test_another_config_in_the_same_folder_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    sweep(GOOD[:1], tmp_path)
    table = sweep([replace(GOOD[0], seed=7), GOOD[1]], tmp_path, only=["ntxent"])
    assert accuracies(table).keys() == {"ntxent"}
    assert "another seed" in table.failures["contrastive"]
    with pytest.raises(UsageError, match="names that are all different"):
        sweep([GOOD[0], GOOD[0]], tmp_path)


def test_nothing_to_run_and_a_folder_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for only in ("ntxen", ["ntxen"]):
        with pytest.raises(UsageError, match="did you mean 'ntxent'"):
            sweep(GOOD, tmp_path / "sweep", only)
    with pytest.raises(UsageError, match="at least one experiment, got none"):
        sweep([], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CannotWriteError, match=r"expected to write .*sweep"):
        sweep(GOOD, tmp_path / "file" / "sweep")


def test_the_command_line_chooses_and_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "--steps", "2", "--seed", "5", "--only", "ntxent"])
    table = sweep_main("two_losses", [GOOD[0], replace(GOOD[1], steps=9)])  # one budget for all
    assert list(accuracies(table)) == ["ntxent"]
    assert {row.seed for row in table.rows if row.ways} == {0}
    text = (tmp_path / "runs" / "two_losses" / "2_steps_60_episodes_seed5" / "ntxent" / "config.txt").read_text()
    assert "steps = 2" in text
    monkeypatch.setattr(sys, "argv", ["sweep", "--only", "ntxnet"])
    with pytest.raises(SystemExit, match="did you mean 'ntxent'"):
        sweep_main("two_losses", GOOD)


def test_the_command_line_tells_the_shell_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["losses", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: expected all experiments to end, got failures of too few classes; "):
        sweep_main("losses", [GOOD[0], BAD])
    assert "| too few classes | failed" in (tmp_path / "results.md").read_text()


def test_what_is_finished_of_others_is_in_the_table(tmp_path: Path) -> None:
    run(replace(GOOD[1], run_dir=tmp_path / "ntxent"))
    table = sweep([BAD, *GOOD], tmp_path, only=["contrastive"])
    assert accuracies(table).keys() == {"contrastive", "ntxent"}
    assert not table.failures
