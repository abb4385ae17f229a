"""search: the best trial by validation, shared by workers that may die; the test classes are seen by the best alone."""

import csv
import json
import re
import socket
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from torch.optim import SGD, Adam

from pml_fewshot import ExperimentConfig, FewShotDataset, ProtoNetTrainer, Splits, UsageError, run, search
from pml_fewshot.experiment import search as search_module
from pml_fewshot.experiment.search import SearchResult, search_main
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.interruption import TrainingInterrupted
from tests.killing import digest
from tests.sharing import BASE, KILLED, TRIALS, config_of_trial, never_pruned, printed
from tests.tiny_experiments import rows_of, tiny_splits

optuna = pytest.importorskip("optuna")

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = replace(BASE, scheduler=None, steps=8)
GOOD, HOPELESS, DIVERGES = 0.1, 0.0, 1e30  # learning rates


def with_rate(trial: Any) -> ExperimentConfig:
    return replace(SHORT, optimizer=partial(Adam, lr=trial.suggest_float("lr", 1e-3, 1e-1, log=True)))


def of_numbers(*rates: float, base: ExperimentConfig = SHORT) -> Callable[[Any], ExperimentConfig]:
    """The rates of the trials in their order."""

    def config_of_trial(trial: Any) -> ExperimentConfig:
        trial.suggest_float("x", 0, 1)
        return replace(base, optimizer=partial(SGD, lr=rates[trial.number]))

    return config_of_trial


def ended(result: SearchResult) -> dict[int, tuple[Any, ...]]:
    return {each.number: (each.state.name, each.params, each.value) for each in result.study.trials}


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return {line["trial"]: line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def alone(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """The search of `tests.sharing` by one worker that nobody interrupts."""
    return never_pruned(tmp_path_factory.mktemp("alone") / "shared", kills=False)


def test_a_trial_is_a_run_and_the_best_of_them_is_evaluated(alone: SearchResult, tmp_path: Path) -> None:
    validated = {}
    for trial in alone.study.trials:
        config = replace(config_of_trial(trial, kills=False), run_dir=tmp_path / str(trial.number))
        table = run(config)
        validated[trial.number] = max(row["accuracy"] for row in rows_of(tmp_path / str(trial.number), "validation"))
        assert trial.value == validated[trial.number]
        if trial.number == alone.study.best_trial.number:
            assert table.rows == alone.table.rows
    assert alone.study.best_trial.number == max(validated, key=lambda number: validated[number])
    assert len({trial.params["lr"] for trial in alone.study.trials}) == TRIALS
    folder = alone.config.run_dir.parent  # type: ignore[union-attr]
    evaluated = [each.parent.name for each in folder.glob("*/figures.csv")]
    assert evaluated == [f"trial_{alone.study.best_trial.number}"]
    lines = table_of(folder)
    assert {int(number): float(line["accuracy"]) for number, line in lines.items()} == validated
    assert list(validated) != [int(number) for number in lines], "sorted by accuracy, not by number"
    assert sorted(validated, key=lambda number: -validated[number])[0] == int(next(iter(lines)))


def pixels(dataset: FewShotDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


def test_no_trial_sees_test_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rehearsal before a training embeds an image of them, nor any evaluation."""
    embedded: set[bytes] = set()
    before: set[bytes] = set()
    real_bank, real_run = ProtoNetTrainer.bank, search_module.run

    def bank(self: FewShotTrainer, dataset: FewShotDataset) -> torch.Tensor:
        embedded.update(pixels(dataset))
        return real_bank(self, dataset)

    def at_the_end(config: ExperimentConfig, resume: bool) -> Any:
        before.update(embedded)
        return real_run(config, resume=resume)

    monkeypatch.setattr(ProtoNetTrainer, "bank", bank)
    monkeypatch.setattr(search_module, "run", at_the_end)
    search(with_rate, 2, tmp_path / "search")
    splits = tiny_splits()
    assert splits.val is not None
    assert pixels(splits.val) <= before
    assert not pixels(splits.test) & before
    assert pixels(splits.test) <= embedded, "the spy sees them when the best one is evaluated"


@pytest.mark.long
def test_a_hopeless_trial_is_ended_early(tmp_path: Path) -> None:
    base = replace(SHORT, steps=24)
    rates = (GOOD, GOOD, GOOD, HOPELESS)
    result = search(of_numbers(*rates, base=base), 4, tmp_path, pruner=optuna.pruners.MedianPruner(3))
    assert [state for state, *_ in ended(result).values()] == ["COMPLETE"] * 3 + ["PRUNED"]
    rows = [rows_of(tmp_path / f"trial_{number}", "validation") for number in range(4)]
    accuracies = [{row["step"]: row["accuracy"] for row in each} for each in rows]
    *earlier, last = accuracies
    step = max(last)
    assert step < 24
    assert load_checkpoint(tmp_path / "trial_3" / "last.pt")["history"]["steps"] <= step
    best_so_far = [max(each[s] for s in each if s <= step) for each in accuracies]
    assert best_so_far[3] < statistics.median(each[step] for each in earlier)
    assert table_of(tmp_path)["3"]["state"] == "pruned"
    assert float(table_of(tmp_path)["3"]["accuracy"]) == best_so_far[3]


@pytest.mark.long
def test_trials_that_fail_or_diverge_are_lines_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(trial: Any) -> Any:
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 1 and isinstance(trial.study if hasattr(trial, "study") else None, optuna.Study):
            raise RuntimeError("a bug | of the user's")
        changed = {"val_episodes": 11} if trial.number == 3 else {}
        return replace(of_numbers(GOOD, GOOD, DIVERGES, GOOD)(trial), loss_lr=x, **changed)

    result = search(some, 4, tmp_path, f"sqlite:///{tmp_path / 'study.db'}")
    assert [state for state, *_ in ended(result).values()] == ["COMPLETE", "FAIL", "PRUNED", "FAIL"]
    notes = {number: line["note"] for number, line in table_of(tmp_path).items()}
    assert notes["1"] == "RuntimeError: a bug | of the user's"
    assert notes["2"].startswith("diverged: expected a finite loss")
    assert "expected trials that are validated on the same episodes" in notes["3"]
    assert r"a bug \| of the user's" in (tmp_path / "trials.md").read_text()
    assert 'raise RuntimeError("a bug | of the user' in capsys.readouterr().err, "the traceback is shown"
    # all of them have ended; one more goes on
    assert len(search(some, 4, tmp_path, f"sqlite:///{tmp_path / 'study.db'}").study.trials) == 4


def test_when_nothing_works_the_search_ends(tmp_path: Path) -> None:
    def broken(trial: Any) -> ExperimentConfig:
        return replace(SHORT, sampler=None, trainer=partial(ProtoNetTrainer, embedder=partial(int, "no embedder")))

    with pytest.raises(UsageError, match="expected a trial that comes to its end, got 3 in a row that failed"):
        search(broken, 20, tmp_path / "a")
    with pytest.raises(UsageError, match="got 2 that did not"):
        search(broken, 2, tmp_path / "b")
    # repaired, the same search goes on
    result = search(with_rate, 4, tmp_path / "a")
    assert [state for state, *_ in ended(result).values()] == ["FAIL"] * 3 + ["COMPLETE"]


@pytest.mark.long
def test_an_interrupted_search_continues_to_the_same_end(
    alone: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = ProtoNetTrainer.forward, 0

    def interrupted(self: ProtoNetTrainer, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2 * BASE.steps + 10:  # in the third trial, whose last checkpoint is of its step 9
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(ProtoNetTrainer, "forward", interrupted)
    with pytest.raises(TrainingInterrupted, match="the same command again continues"):
        never_pruned(tmp_path / "search", kills=False)
    assert {number: line["state"] for number, line in table_of(tmp_path / "search").items()}.keys() == {"0", "1"}
    again = never_pruned(tmp_path / "search", kills=False)
    assert steps == TRIALS * BASE.steps + 1, "only the step that was interrupted is made twice"
    assert ended(again) == ended(alone)
    assert again.table.rows == alone.table.rows


def check_shared(folder: Path, storage: Any, alone: SearchResult) -> None:
    """The trial of the killed worker was finished by one other, bit for bit as if nothing had happened."""
    assert printed(folder).count("(complete)") == TRIALS, "each was finished once"
    study = never_pruned(folder, storage, kills=False).study  # which reads what they have found
    found = {each.number: (each.state.name, each.params, each.value) for each in study.trials}
    assert found == ended(alone)
    assert [len(each.user_attrs.get("taken_over", ())) for each in study.trials] == [
        int(number == KILLED) for number in range(TRIALS)
    ]
    own = alone.config.run_dir.parent  # type: ignore[union-attr]
    for name in (f"trial_{number}" for number in range(TRIALS)):
        assert digest(load_checkpoint(folder / name / "last.pt")) == digest(load_checkpoint(own / name / "last.pt"))
        for group in ("train", "validation"):
            assert rows_of(folder / name, group) == rows_of(own / name, group)


@pytest.mark.slow
def test_workers_share_trials_and_take_over_that_of_a_killed_one(alone: SearchResult, shared_by_workers: Path) -> None:
    check_shared(shared_by_workers / "file" / "shared", None, alone)


@pytest.mark.slow
def test_workers_share_a_postgresql(
    alone: SearchResult, shared_by_workers: Path, postgres: str, tmp_path: Path
) -> None:
    if "://" not in postgres:
        pytest.skip(postgres)
    folder = shared_by_workers / "database" / "shared"
    check_shared(folder, postgres, alone)
    assert not (folder / "study.journal").exists()
    with pytest.raises(UsageError, match="as it was begun, got another folder; share the folder among all workers"):
        never_pruned(tmp_path / "shared", postgres)


@pytest.mark.long
def test_a_trial_in_which_every_worker_dies_is_given_up(tmp_path: Path) -> None:
    study = search(with_rate, 1, tmp_path).study
    poison = study.ask()  # its lock is free: its worker is dead
    poison.set_user_attr("taken_over", [0, 0])  # without a checkpoint
    other = study.ask()
    other.set_user_attr("taken_over", [0, 5, 0])  # with one in between
    result = search(with_rate, 3, tmp_path)
    assert [state for state, *_ in ended(result).values()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "got 3 workers that died in it without a new checkpoint" in table_of(tmp_path)["1"]["note"]


def test_half_a_line_in_the_journal_costs_nothing(tmp_path: Path) -> None:
    """As a full disk or a power cut leaves it."""
    before = ended(search(with_rate, 1, tmp_path))
    with (tmp_path / "study.journal").open("a") as journal:
        journal.write('{"op_code":4,"wor')
    after = ended(search(with_rate, 2, tmp_path))
    assert len(after) == 2
    assert after[0] == before[0]
    journal = tmp_path / "study.journal"
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_no_worker_sees_a_running_trial_whose_lock_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take it over: so a trial ends, and its lock is released, within the lock in which others look."""
    real, told = optuna.Study.tell, []

    def tell(self: Any, trial: Any, *values: Any, **options: Any) -> Any:
        for name in (".lock", f".trial_{trial.number}.lock"):
            with pytest.raises(Timeout):
                FileLock(tmp_path / name, timeout=0).acquire()
        told.append(trial.number)
        return real(self, trial, *values, **options)

    monkeypatch.setattr(optuna.Study, "tell", tell)
    search(with_rate, 2, tmp_path)
    assert told == [0, 1]


def test_samplers_that_end_a_study_are_heard(tmp_path: Path) -> None:
    grid = optuna.samplers.GridSampler({"lr": [0.01, 0.1]})
    result = search(with_rate, 2, tmp_path, sampler=grid)
    assert sorted(each.params["lr"] for each in result.study.trials) == [0.01, 0.1]


@pytest.mark.long
def test_a_trial_is_as_good_as_its_best_validation(tmp_path: Path) -> None:
    """As a run is, which ends with the weights of that; not as its last one."""
    base = replace(SHORT, steps=24)
    result = search(of_numbers(1.0, 3.0, base=base), 2, tmp_path)
    found = [[row["accuracy"] for row in rows_of(tmp_path / f"trial_{n}", "validation")] for n in range(2)]
    assert [each.value for each in result.study.trials] == [max(accuracies) for accuracies in found]
    assert any(accuracies[-1] < max(accuracies) for accuracies in found), "or the last could be meant"


def test_the_users_recorder_gets_everything_too(tmp_path: Path) -> None:
    noted: list[Any] = []

    class Own:
        def __init__(self, folder: Path) -> None:
            noted.append(folder.name)

        def record(self, group: str, step: int, **values: float) -> None:
            noted.append((group, step))

        def save(self) -> None: ...

        def forget_after(self, step: int, groups: Any) -> None: ...

        def close(self) -> None:
            noted.append("closed")

    search(lambda trial: replace(with_rate(trial), recorder=Own), 1, tmp_path)
    assert noted[: noted.index("closed")][0] == "trial_0"
    assert {("train", 8), ("validation", 4), ("validation", 8)} <= set(noted)


def without_val() -> Splits:
    return Splits(tiny_splits().train, None, tiny_splits().test)


BAD: dict[str, tuple[Any, str]] = {
    "no validation classes": (lambda t: replace(SHORT, data=without_val), "expected validation classes, by which"),
    "trained on them": (lambda t: replace(SHORT, train_on_validation=True), "got train_on_validation"),
    "no config": (lambda t: with_rate, "expected an ExperimentConfig from config_of_trial, got function"),
    "too many ways": (
        lambda t: replace(SHORT, eval_specs=(SHORT.eval_specs[0], replace(SHORT.eval_specs[0], ways=50))),
        "expected at least 50 classes",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_configs_are_told_before_a_trial(bad: str, tmp_path: Path) -> None:
    make, message = BAD[bad]
    with pytest.raises(UsageError, match=message):
        search(make, 2, tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    search(with_rate, 1, tmp_path)
    with pytest.raises(UsageError, match=r"as it was begun, got another steps; .* name another folder"):
        search(lambda trial: replace(with_rate(trial), steps=9), 2, tmp_path)
    with pytest.raises(UsageError, match="expected trials to be an integer of at least 1, got 0"):
        search(with_rate, 0, tmp_path)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.db", "expected a URL of a database, got: Could not parse"),
        (
            "sqlite:////nowhere/at/all.db",
            "expected a storage that answers at sqlite:////nowhere/at/all.db, got: .*open",
        ),
        (5, "expected storage as a URL or one of Optuna's storages, got 5"),
        ("nosuch://me@host/name", "nosuch"),
        pytest.param("postgresql+psycopg2://me:secret@127.0.0.1:1/x", r"at postgresql\+psycopg2://me:\*\*\*@127"),
        pytest.param("mysql+nosuchdriver://me@host/name", "nosuchdriver"),
    ],
)
def test_a_storage_that_does_not_answer_is_one_line(storage: Any, message: str, tmp_path: Path) -> None:
    if "psycopg2" in str(storage):
        pytest.importorskip("psycopg2")
    with pytest.raises(UsageError, match=message) as caught:
        search(with_rate, 2, tmp_path / "search", storage)
    assert len(str(caught.value)) < 500
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_database_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2")
    monkeypatch.setattr(search_module, "CONNECT_SECONDS", 2)  # the fewest that libpq takes
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UsageError, match="timeout expired"):
        search(with_rate, 2, tmp_path / "search", f"postgresql+psycopg2://me@127.0.0.1:{silent.getsockname()[1]}/x")


@pytest.mark.long
def test_a_storage_that_is_lost_leaves_the_trial_to_be_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    real = optuna.Trial.report

    def lost(self: Any, value: float, step: int) -> None:
        if step == 8 and not (tmp_path / "lost").exists():
            (tmp_path / "lost").touch()
            raise optuna.exceptions.StorageInternalError("the server closed the connection")
        real(self, value, step)

    monkeypatch.setattr(optuna.Trial, "report", lost)
    with pytest.raises(UsageError, match="got: the server closed the connection; start it"):
        search(with_rate, 2, tmp_path / "search", url)
    result = search(with_rate, 2, tmp_path / "search", url)
    assert [state for state, *_ in ended(result).values()] == ["COMPLETE", "COMPLETE"]
    assert len(result.study.trials[0].user_attrs["taken_over"]) == 1
    assert ended(search(with_rate, 2, tmp_path / "whole", pruner=optuna.pruners.NopPruner())) == ended(result)


def test_optuna_is_an_extra_and_torchrun_is_not_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="expected workers of a search that are started one by one, got torchrun"):
        search(with_rate, 2, tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'pml_fewshot[search]'")):
        search(with_rate, 2, tmp_path)


@pytest.mark.long
def test_the_command_line_changes_all_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search", "--steps", "4", "--seed", "5", "--num-episodes", "20", "--trials", "2"])
    result = search_main("rates", with_rate)
    folder = tmp_path / "runs" / "rates" / "search_4_steps_seed5"
    assert len(result.study.trials) == 2
    assert result.config.steps == 4
    assert {row.count for row in result.table.rows if row.ways} == {20}
    assert (folder / "trials.md").read_text() in capsys.readouterr().out
    assert "seed = 5" in (folder / "trial_1" / "config.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["search", "--storage", "nonsense"])
    with pytest.raises(SystemExit, match="error: expected a URL of a database"):
        search_main("rates", with_rate)
