"""sweep: one table of several experiments, and what happens to those that failed or were interrupted."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, ContrastiveLoss, NTXentLoss
from torch import nn
from torch.optim import Adam

from pml_fewshot import sweeps as sweep_module
from pml_fewshot.batches import BatchSpec
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment import run
from pml_fewshot.experiment_config import ExperimentConfig
from pml_fewshot.run_folder import sole_writer
from pml_fewshot.sweeps import sweep, sweep_main
from pml_fewshot.trainers import fit as fit_module
from pml_fewshot.trainers.metric import MetricTrainer


def some_classes(prefix: str, classes: int, seed: int) -> FewShotDataset:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(40, 216, (classes, 1, 1, 4, 4), generator=generator)
    images = (pattern + torch.randint(-60, 61, (classes, 8, 1, 4, 4), generator=generator)).clamp(0, 255).byte()
    labels = torch.arange(classes).repeat_interleave(8)
    return FewShotDataset(images.flatten(0, 1), labels, [f"{prefix}{c}" for c in range(classes)])


def splits() -> Splits:
    return Splits(some_classes("a", 8, 0), some_classes("b", 5, 1), some_classes("c", 6, 2))


EMBEDDER = partial(Embedder, trunk=partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 8)))
TINY = ExperimentConfig(
    name="tiny",
    data=splits,
    trainer=partial(MetricTrainer, embedder=EMBEDDER),
    optimizer=partial(Adam, lr=0.01),
    train_spec=BatchSpec(4, 3),
    eval_specs=(EpisodeSpec(5, 1, 5),),
    steps=6,
    num_episodes=30,
    val_episodes=10,
    device="cpu",
)


def config(name: str, loss: Any) -> ExperimentConfig:
    return replace(TINY, name=name, trainer=partial(MetricTrainer, embedder=EMBEDDER, loss=loss))


GOOD = [config("contrastive", ContrastiveLoss), config("ntxent", NTXentLoss)]
BAD = config("too few classes", partial(ArcFaceLoss, num_classes=2, embedding_size=8))


def accuracies(table: ResultTable) -> dict[str, float]:
    return {row.method: row.value for row in table.rows if row.figure == "accuracy"}


def test_every_experiment_is_a_line_as_if_run_alone_the_best_first(tmp_path: Path) -> None:
    table = sweep(GOOD, tmp_path / "all")
    alone = {c.name: run(replace(c, run_dir=tmp_path / f"{c.name} alone")).rows for c in GOOD}
    assert {name: [row for row in table.rows if row.method == name] for name in alone} == alone
    values = list(accuracies(table).values())
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 2, "a tie would show no order"
    assert (tmp_path / "all" / "results.md").read_text() == table.markdown()
    assert (tmp_path / "all" / "ntxent" / "embedder.safetensors").exists()


def test_one_that_fails_is_a_line_that_says_why_and_the_next_one_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sweep([BAD, GOOD[0]], tmp_path)
    assert set(accuracies(table)) == {"contrastive"}
    assert list(table.failures) == ["too few classes"]
    assert "num_classes of ArcFaceLoss" in table.failures["too few classes"]
    assert "| too few classes | failed: ValueError: expected labels below 2" in (tmp_path / "results.md").read_text()
    assert "failed: ValueError" in (tmp_path / "results.csv").read_text()
    assert "failed: ValueError" in (tmp_path / "results.tex").read_text()
    assert "Traceback" in capsys.readouterr().err


def test_what_is_finished_is_read_and_what_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep([GOOD[0], BAD], tmp_path)
    trained = []
    real = fit_module.fit
    monkeypatch.setattr("pml_fewshot.experiment.fit", lambda *a, **k: trained.append(1) or real(*a, **k))
    mended = config(BAD.name, partial(ArcFaceLoss, num_classes=8, embedding_size=8))
    second = sweep([GOOD[0], mended], tmp_path)
    assert len(trained) == 1
    assert accuracies(second)["contrastive"] == accuracies(first)["contrastive"]
    assert second.failures == {}
    assert set(accuracies(second)) == {"contrastive", BAD.name}


def test_an_interrupted_one_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(GOOD, tmp_path / "whole")
    real, seen = MetricTrainer.forward, []

    def interrupted(self: MetricTrainer, batch: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 9:  # the third step of the second experiment
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(MetricTrainer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(GOOD, tmp_path / "parts")
    assert not (tmp_path / "parts" / "ntxent" / "figures.csv").exists()
    again = sweep(GOOD, tmp_path / "parts")
    assert len(seen) == 9 + 5, "the first was read, the second went on after its first step, where its checkpoint is"
    assert again.figures_csv() == whole.figures_csv()


def test_another_config_in_the_same_folder_is_a_line_that_says_so(tmp_path: Path) -> None:
    sweep(GOOD[:1], tmp_path)
    table = sweep([replace(GOOD[0], steps=7)], tmp_path)
    assert table.rows == []
    assert "another steps" in table.failures["contrastive"]


def test_two_of_one_name_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names that are all different"):
        sweep([GOOD[0], GOOD[0]], tmp_path)


def test_the_command_line_chooses_and_names_the_folder_by_steps_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", "--steps", "2", "--seed", "5", "--only", "ntxent"])
    table = sweep_main("two_losses", GOOD)
    assert list(accuracies(table)) == ["ntxent"]
    assert {row.seed for row in table.rows if row.ways} == {5}
    text = (tmp_path / "runs" / "two_losses" / "2_steps_30_episodes_seed5" / "ntxent" / "config.txt").read_text()
    assert "steps = 2" in text


def test_a_misspelt_name_is_one_line_with_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", "--only", "ntxnet"])
    with pytest.raises(SystemExit, match="did you mean 'ntxent'"):
        sweep_main("two_losses", GOOD)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> ResultTable:
        raise ValueError("something else")

    monkeypatch.setattr(sweep_module, "sweep", broken)
    monkeypatch.setattr(sys, "argv", ["sweep"])
    with pytest.raises(ValueError, match="something else"):
        sweep_main("two_losses", GOOD)


def test_only_some_are_run_and_what_is_finished_stays_in_the_table(tmp_path: Path) -> None:
    both = sweep(GOOD, tmp_path)
    again = sweep([BAD, *GOOD], tmp_path, only=["contrastive"])
    assert again.rows == both.rows
    assert again.failures == {}
    alone = sweep([BAD, *GOOD], tmp_path / "new", only=["contrastive"])
    assert set(accuracies(alone)) == {"contrastive"}


def test_what_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "ntxent", replace(GOOD[1], run_dir=tmp_path / "ntxent"), True):
        table = sweep(GOOD, tmp_path)
    assert accuracies(table).keys() == {"contrastive"}
    assert table.failures == {"ntxent": "another process is at it"}
    # the other process ends while this one is at its own: both are in the table that this one writes
    run(replace(GOOD[1], run_dir=tmp_path / "ntxent"), resume=True)
    again = sweep(GOOD, tmp_path, only=["contrastive"])
    assert accuracies(again).keys() == {"contrastive", "ntxent"}
    assert not again.failures
