"""A run folder used again: its trained trainer, other evaluations of it, and runs compared with each other."""

import re
import shutil
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from pml_fewshot import (
    EpisodeStream,
    EpisodicEvaluator,
    ProtoNetTrainer,
    ResultTable,
    RetrievalTester,
    benchmark,
    compare,
    load_trained,
    ridge_regression,
    run,
)
from pml_fewshot.checks import LockedError, MissingFileError, UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.experiment import comparison, trained
from pml_fewshot.experiment.comparison import compare_runs
from pml_fewshot.experiment.stored_config import what_is_lost
from pml_fewshot.experiment.trained import EVALUATIONS, evaluate_again
from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.sampling.episodes import EpisodeSpec
from tests.tiny_experiments import EMBEDDER, TINY_EXPERIMENTS, Finished, tiny_set, tiny_splits

OTHER = EpisodeSpec(ways=3, shots=2, queries=4)


@pytest.mark.parametrize("name", TINY_EXPERIMENTS)
def test_the_trained_trainer_of_every_kind_gives_the_runs_figures(name: str, tmp_path: Path) -> None:
    config = replace(TINY_EXPERIMENTS[name], steps=8, run_dir=tmp_path / name)
    table, state = run(config), torch.get_rng_state()
    trainer = load_trained(tmp_path / name, TINY_EXPERIMENTS[name], "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part.training for part in trainer.modules())
    evaluator = EpisodicEvaluator(config.eval_specs[0], config.num_episodes, config.eval_seed)
    assert evaluator.evaluate(trainer, tiny_splits().test).mean == table.rows[0].value


def test_a_config_whose_trainer_is_an_instance_keeps_its_own_weights(finished: Finished) -> None:
    instance = finished.config.trainer()
    before = {name: value.clone() for name, value in instance.state_dict().items()}
    with pytest.raises(UsageError, match=r"expected the config of the run in .*, got another trainer"):
        load_trained(finished.folder, replace(finished.config, trainer=instance))
    assert load_trained(finished.folder, finished.config) is not instance
    assert all(torch.equal(value, before[name]) for name, value in instance.state_dict().items())
    with pytest.raises(MissingFileError, match=r"config\.json"):
        load_trained(finished.folder.parent, finished.config)


def test_rows_of_other_episodes_metrics_and_splits_are_added_with_where_they_come_from(copied: Finished) -> None:
    before = {path.name: path.read_bytes() for path in copied.folder.iterdir() if path.is_file()}
    first = evaluate_again(copied.folder, copied.config, eval_specs=[OTHER], num_episodes=40, eval_seed=3)
    second = evaluate_again(copied.folder, copied.config, split="val", retrieval=RetrievalTester("recall_at_3"))
    assert {path.name: path.read_bytes() for path in copied.folder.iterdir() if path.is_file()} == before
    trainer = load_trained(copied.folder, copied.config)
    row = first.rows[0]
    assert row.value == EpisodicEvaluator(OTHER, 40, 3).evaluate(trainer, tiny_splits().test).mean
    assert (row.ways, row.shots, row.count, row.seed, row.split) == (3, 2, 40, 3, "test")
    assert {row.split for row in second.rows} == {"val"}
    assert (
        second.rows[0].value
        == EpisodicEvaluator(copied.config.eval_specs[0], 30).evaluate(trainer, tiny_splits().val).mean
    )
    assert (
        second.rows[1].value == RetrievalTester("recall_at_3").test(trainer.embedder, tiny_splits().val)["recall_at_3"]
    )
    for each in (*first.rows, *second.rows):
        assert re.search(r"weights of step \d+, evaluated after the run", each.note)
    evaluate_again(copied.folder, copied.config, eval_specs=[OTHER], num_episodes=40, eval_seed=3)  # no row twice
    assert ResultTable.read(copied.folder / EVALUATIONS).rows == [*first.rows, *second.rows]


def test_a_folder_of_images_is_evaluated_at_the_runs_size(copied: Finished, tmp_path: Path) -> None:
    images = tiny_set("new ", 6, 9)
    for pixels, label in zip(images.images, images.labels.tolist(), strict=True):
        (tmp_path / "photos" / f"class {label}").mkdir(parents=True, exist_ok=True)
        number = len(list((tmp_path / "photos" / f"class {label}").iterdir()))
        Image.fromarray(pixels[0].numpy()).save(tmp_path / "photos" / f"class {label}" / f"{number}.png")
    rows = evaluate_again(copied.folder, copied.config, tmp_path / "photos", eval_specs=[OTHER], retrieval=None).rows
    by_hand = EpisodicEvaluator(OTHER, 30).evaluate(load_trained(copied.folder, copied.config), images)
    assert (rows[0].classes, rows[0].split) == (6, "")
    assert rows[0].ci95 > 0
    assert abs(rows[0].value - by_hand.mean) < 3 * (rows[0].ci95 + by_hand.ci95)  # other items in the episodes
    assert re.search(r"data photos; data checksum [0-9a-f]{16}", rows[0].note)
    given = evaluate_again(copied.folder, copied.config, images, eval_specs=[OTHER], retrieval=RetrievalTester()).rows
    assert given[0].value == by_hand.mean


def test_a_run_whose_evaluation_failed_is_evaluated_by_its_weights(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails(trainer: nn.Module, splits: Any, config: Any) -> ResultTable:
        calls.append(config.num_episodes)
        if config.num_episodes > 2:  # not where it is tried before
            raise RuntimeError("out of luck")
        return ResultTable()

    config = replace(TINY_EXPERIMENTS["protonet"], steps=4, run_dir=tmp_path / "run", extra_evaluations=fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(config)
    assert calls == [2, 30]
    (row, *_) = evaluate_again(tmp_path / "run", config).rows
    alone = run(replace(config, run_dir=tmp_path / "alone", extra_evaluations=None))
    assert row.value == alone.rows[0].value


def test_other_data_and_a_folder_that_is_written_are_refused(copied: Finished) -> None:
    other = replace(copied.config, data=lambda: replace(tiny_splits(), test=tiny_set("c", 6, 8)))
    with pytest.raises(
        UsageError, match=r"expected the data of the run in .*, got other images, labels or classes in test"
    ):
        evaluate_again(copied.folder, other)
    with FileLock(copied.folder / ".lock"), pytest.raises(LockedError, match="that no other process writes"):
        evaluate_again(copied.folder, copied.config)


def seeds(folder: Path, count: int = 3, **changes: Any) -> list[Path]:
    for seed in range(count):
        run(
            replace(
                TINY_EXPERIMENTS["protonet"],
                steps=6,
                seed=seed,
                num_episodes=60,
                run_dir=folder / f"seed{seed}",
                **changes,
            )
        )
    return [folder / f"seed{seed}" for seed in range(count)]


def test_runs_are_compared_on_the_same_episodes_the_best_first(tmp_path: Path) -> None:
    folders = seeds(tmp_path)
    run(replace(TINY_EXPERIMENTS["metric"], steps=6, num_episodes=60, run_dir=tmp_path / "metric"))
    found = compare_runs([*folders, tmp_path / "metric"])
    firsts: dict[str, float] = {}
    for row in found.table.rows:
        firsts.setdefault(row.method, row.value)
    assert list(firsts.values()) == sorted(firsts.values(), reverse=True)
    labels = [f"protonet (seed{seed})" for seed in range(3)]
    of_all = "mean of protonet (seed0, seed1, seed2)"
    assert firsts.keys() == {*labels, "metric", of_all}
    assert firsts[of_all] == pytest.approx(sum(firsts[label] for label in labels) / 3)
    mean = next(row for row in found.table.rows if row.trained == 3)
    assert mean.ci95 > min(row.ci95 for row in found.table.rows if row.method in labels and row.ways)
    assert f"seed: 0 ({labels[0]}), 1 ({labels[1]}), 2 ({labels[2]}), 0 (metric)" in found.changes
    assert any(change.startswith("trainer: ") and "MetricTrainer (metric)" in change for change in found.changes)
    results = {}
    for label, folder in zip([*labels, "metric"], [*folders, tmp_path / "metric"], strict=True):
        row = ResultTable.read(folder).rows[0]
        spec = EpisodeSpec(row.ways or 0, row.shots or 0, row.queries or 0)
        assert row.values is not None
        results[label] = EpisodicResult(row.value, row.ci95, row.values, spec, 0, row.episodes_hash)
    best = max(results, key=lambda label: results[label].mean)
    for label in results.keys() - {best}:
        assert f"5-way 1-shot: {label} minus {best}: {compare(results[label], results[best])}" in found.differences
    assert sum(line.startswith("P@1: ") and "60 queries" in line for line in found.differences) == 3
    assert all(line in str(found) for line in (*found.changes, *found.differences))


def test_what_is_not_on_the_same_episodes_is_not_subtracted_and_later_evaluations_are(tmp_path: Path) -> None:
    first, second = seeds(tmp_path, 2, retrieval=None)
    config = replace(TINY_EXPERIMENTS["protonet"], retrieval=None)
    run(replace(config, steps=6, num_episodes=60, eval_seed=5, run_dir=tmp_path / "other"))
    assert compare_runs([first, tmp_path / "other"]).differences == []
    for folder in (first, second):
        evaluate_again(folder, config, eval_specs=[OTHER])
    found = compare_runs([first, second])
    assert [line.split(":")[0] for line in found.differences] == ["5-way 1-shot", "3-way 2-shot"]


def test_several_figures_on_the_same_episodes_have_a_mean_each_and_a_copy_is_no_other_training(tmp_path: Path) -> None:
    def by_ridge(trainer: Any, splits: Any, config: Any) -> ResultTable:
        sizes = (config.eval_specs, None, config.num_episodes, config.eval_seed)
        return benchmark({"ridge": trainer}, splits, *sizes, head=ridge_regression, timed=False)

    folders = seeds(tmp_path, 2, extra_evaluations=by_ridge)
    shutil.copytree(folders[0], tmp_path / "copy")
    found = compare_runs([*folders, tmp_path / "copy"]).table
    stored = [ResultTable.read(folder).rows for folder in folders]
    means = {row.method: row for row in found.rows if row.trained == 2 and row.ways}
    own, ridge = sorted(means, key=len)
    assert own.startswith("mean of protonet (")
    assert ridge == f"{own}: ridge"
    for name, number in ((own, 0), (ridge, -1)):
        assert means[name].value == pytest.approx(sum(rows[number].value for rows in stored) / 2)
        assert means[name].classifier == stored[0][number].classifier


def test_a_run_that_was_continued_but_not_finished_is_not_compared(tmp_path: Path) -> None:
    first, second = seeds(tmp_path, 2)
    broken = replace(TINY_EXPERIMENTS["protonet"], steps=9, num_episodes=60, run_dir=first)

    def stop(self: Any, batch: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(load_trained(first, broken)), "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            run(broken, resume=True)
    with pytest.raises(UsageError, match=r"finished run in .*seed0, got figures of another steps; finish it with"):
        compare_runs([first, second])


def test_retrieval_of_other_classes_is_not_subtracted(tmp_path: Path) -> None:
    first, second = seeds(tmp_path, 2, retrieval=None)
    tester, config = RetrievalTester("precision_at_1"), TINY_EXPERIMENTS["protonet"]
    for folder, prefix in ((first, "x"), (second, "y")):
        evaluate_again(folder, config, tiny_set(prefix, 6, 5), retrieval=tester)
    assert not [line for line in compare_runs([first, second]).differences if line.startswith("P@1")]
    for folder in (first, second):
        evaluate_again(folder, config, tiny_set("z", 6, 5), retrieval=tester)
    assert len([line for line in compare_runs([first, second]).differences if line.startswith("P@1")]) == 1


def test_a_factory_of_one_object_and_a_used_instance_give_trainers_of_their_own(tmp_path: Path) -> None:
    shared = instantiate(EMBEDDER)
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    config = replace(TINY_EXPERIMENTS["protonet"], trainer=lambda: ProtoNetTrainer(shared), steps=4)
    tables = [run(replace(config, run_dir=tmp_path / str(n))) for n in range(2)]
    assert repr(tables[0].rows) == repr(tables[1].rows)
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
    first, second = (load_trained(tmp_path / str(n), config) for n in range(2))
    assert first.embedder is not second.embedder
    for name in ("protonet", "maml"):
        used = instantiate(TINY_EXPERIMENTS[name].trainer)
        config = replace(TINY_EXPERIMENTS[name], trainer=used, steps=4, run_dir=tmp_path / name)
        run(config)
        EpisodicEvaluator(config.eval_specs[0], 3).evaluate(used, tiny_splits().test)
        used(next(EpisodeStream(tiny_splits().train, config.train_spec, 0)))
        load_trained(tmp_path / name, config)
        run(replace(config, steps=6), resume=True)


def test_fewer_than_two_runs_or_one_twice_are_refused(finished: Finished) -> None:
    for folders in ([], [finished.folder], [finished.folder, finished.folder / ".." / finished.folder.name]):
        with pytest.raises(UsageError, match="expected two or more different runs, got"):
            compare_runs(folders)


def test_the_commands_print_what_the_functions_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = seeds(tmp_path, 2)
    monkeypatch.setattr(trained, "find_config", lambda *_: TINY_EXPERIMENTS["protonet"])
    options = ["--eval-spec.ways", "3", "--num-episodes", "40", "--retrieval", "recall_at_2", "NMI", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["evaluate", str(folders[0]), *options])
    trained.main()
    table = ResultTable.read(folders[0] / EVALUATIONS)
    assert next((row.figure, row.ways, row.count) for row in table.rows) == ("accuracy", 3, 40)
    assert [row.figure for row in table.rows[1:]] == ["recall_at_2", "NMI"]
    assert str(table) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["compare", *map(str, folders)])
    comparison.main()
    assert capsys.readouterr().out == f"{compare_runs(folders)}\n"
    monkeypatch.setattr("sys.argv", ["compare", str(folders[0])])
    with pytest.raises(SystemExit, match="error: expected two or more different runs"):
        comparison.main()


def test_importing_the_program_leaves_the_function_of_its_name() -> None:
    import pml_fewshot
    import pml_fewshot.compare

    assert pml_fewshot.compare is compare


def test_a_config_that_no_later_program_will_find_is_told_before_the_training(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    says = "the config of protonet is not {}: keep it, because `reproduce` and `load_trained` will ask for it"
    assert what_is_lost(finished.config) == says.format("in a module")  # a notebook
    program.__spec__ = ModuleSpec("experiments.mine", None)
    assert what_is_lost(finished.config) == says.format("at the top of experiments.mine")
    program.MINE = [finished.config]  # type: ignore[attr-defined]
    assert what_is_lost(finished.config) == ""


def test_values_are_those_of_the_episodes_and_a_damaged_file_is_one_error(copied: Finished) -> None:
    trainer = load_trained(copied.folder, copied.config)
    result = EpisodicEvaluator(copied.config.eval_specs[0], 30).evaluate(trainer, tiny_splits().test)
    row = ResultTable.read(copied.folder).rows[0]
    assert row.values is not None
    assert torch.equal(row.values, result.per_episode)
    assert np.load(copied.folder / "values.npz")["0"].tolist() == result.per_episode.tolist()
    whole = (copied.folder / "values.npz").read_bytes()
    (copied.folder / "values.npz").write_bytes(whole[:-30])
    with pytest.raises(UsageError, match=r"expected values of figures in .*values\.npz, got a broken file"):
        ResultTable.read(copied.folder)
