"""The tables of docs/results from run folders, on experiments of a fraction of a second."""

import csv
import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from experiments.omniglot_maml import CONFIG, PrototypeHead, evaluate_more, one_against_all
from experiments.reproduce_papers.__main__ import CONFIGS, DOCS, main, reproduce
from experiments.reproduce_papers.lake import evaluate_lake, load_runs
from experiments.reproduce_papers.papers import ablations, gray, lake_rows, rows_of_papers
from experiments.reproduce_papers.rows import PAPER_SEEDS, Row
from experiments.reproduce_papers.tables import found_in, write_tables
from pml_fewshot import (
    Conv4,
    Embedder,
    ExperimentConfig,
    FewShotDataset,
    MAMLTrainer,
    ProtoNetTrainer,
    PrototypicalLoss,
    ResultTable,
    Splits,
    benchmark,
    run,
    swap,
)
from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.experiment.comparison import compare_runs
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.state import history_of
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set

SEEDS = (0, 1)
PROTONET = replace(TINY_EXPERIMENTS["protonet"], steps=2, published={"A. and B. 2000": {"5-way 1-shot": "12.3"}})
CHANGED = swap(PROTONET, loss=partial(PrototypicalLoss, scale=2.0))
NORMALIZED = partial(nn.Sequential, partial(nn.Flatten), partial(nn.BatchNorm1d, 16), partial(nn.Linear, 16, 5))
PROTO = Row("tiny/protonet", "ProtoNet", PROTONET, note="of ten images")


def on_others(trainer: FewShotTrainer, config: ExperimentConfig) -> ResultTable:
    return benchmark({config.name: trainer}, tiny_set("d", 7, 4), config.eval_specs, None, 30, timed=False)


ROWS = [
    PROTO,
    Row("tiny/siamese", "Siamese", replace(TINY_EXPERIMENTS["siamese"], steps=2)),
    Row("tiny/matching", "Matching", replace(TINY_EXPERIMENTS["matching"], steps=2)),
    Row("tiny/maml", "MAML", swap(replace(TINY_EXPERIMENTS["maml"], steps=2), network=NORMALIZED)),
    Row("across/elsewhere", "elsewhere", PROTONET, PROTO, on_others, published={}),
]


def lines(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all rows by two seeds, and their tables."""
    folder = tmp_path_factory.mktemp("papers")
    assert reproduce(ROWS, folder / "runs", SEEDS) == {}
    (folder / "tables").mkdir()
    write_tables(folder / "runs", ROWS, folder / "tables")
    return folder


def values(folder: Path, place: str, method: str = "") -> list[Any]:
    rows = [ResultTable.read(folder / "runs" / place / f"seed{seed}").rows for seed in SEEDS]
    return [next(r for r in own if r.ways and r.method.endswith(method)).values for own in rows]


def test_a_line_is_the_mean_over_seeds_with_the_papers_below(made: Path) -> None:
    ours, paper, siamese, _, maml = lines(made / "tables" / "tiny.csv")
    found = values(made, "tiny/protonet")
    mean, ci95 = average(found)
    assert ours["5-way 1-shot"] == f"{100 * mean:.2f} +- {100 * ci95:.2f}"
    for line, place in ((ours, "tiny/protonet"), (siamese, "tiny/siamese"), (maml, "tiny/maml")):
        first, second = (each.mean().item() for each in values(made, place))
        assert line["spread of seeds"] == f"{100 * abs(first - second):.2f}"
    assert (ours["seed"], ours["steps"], ours["episodes"]) == ("0, 1", "2", "30")
    assert ours["note"] == "of ten images; made up"
    command = "python -m experiments.reproduce_papers --data-root DIR --only tiny/protonet"
    assert ours["command"] == f"{command} --seeds 0 1"
    assert PROTO.command(PAPER_SEEDS) == command
    assert ours["commit"]
    assert "CPU core" in ours["machine"]
    assert (paper["method"], paper["source"], paper["5-way 1-shot"]) == ("ProtoNet", "A. and B. 2000", "12.3")
    assert (siamese["method"], maml["method"]) == ("Siamese", "MAML, transductive")


def test_each_seed_has_its_line(made: Path) -> None:
    protonet = [line for line in lines(made / "tables" / "tiny_seeds.csv") if line["method"] == "ProtoNet"]
    shown = [f"{100 * each.mean().item():.2f}" for each in values(made, "tiny/protonet")]
    assert [line["5-way 1-shot"].split(" +- ")[0] for line in protonet] == shown
    assert [line["seed"] for line in protonet] == ["0", "1"]


def test_differences_are_paired_over_episodes_and_seeds_within_a_protocol(made: Path) -> None:
    pairs = lines(made / "tables" / "tiny_differences.csv")
    first = pairs[0]
    assert (first["method"], first["minus"], first["seed"]) == ("ProtoNet", "Siamese", "0, 1")
    assert first["command"].endswith("--only tiny/protonet tiny/siamese --seeds 0 1")
    ours, theirs = values(made, "tiny/protonet"), values(made, "tiny/siamese")
    mean, ci95 = average([a - b for a, b in zip(ours, theirs, strict=True)])
    assert first["5-way 1-shot"] == f"{100 * mean:+.2f} +- {100 * ci95:.2f}"
    assert not any("MAML" in line["method"] + line["minus"] for line in pairs)  # transductive among inductive ones


def test_weights_are_evaluated_on_other_classes_without_training_again(made: Path) -> None:
    place = made / "runs" / "across" / "elsewhere" / "seed0"
    assert {each.name for each in place.iterdir()} >= {"figures.csv", "values.npz"}
    assert not (place / "last.pt").exists()
    assert {row.classes for row in ResultTable.read(place).rows} == {7}
    (line,) = lines(made / "tables" / "across.csv")
    assert (line["method"], line["steps"]) == ("elsewhere", "2")


def test_an_evaluation_that_fails_does_so_before_the_training(tmp_path: Path) -> None:
    def broken(trainer: FewShotTrainer, config: ExperimentConfig) -> ResultTable:
        assert (config.num_episodes, trainer.training) == (2, False)
        raise UsageError("expected the runs, got none")

    row = Row("across/elsewhere", "elsewhere", PROTONET, PROTO, broken)
    with pytest.raises(UsageError, match="expected the runs"):
        row.make(tmp_path, 0, None)
    assert not list(tmp_path.iterdir())


def test_figures_count_while_they_are_of_the_weights_that_there_are(made: Path, tmp_path: Path) -> None:
    row = Row("across/elsewhere", "elsewhere", PROTONET, PROTO, on_others)
    for each in ("across/elsewhere/seed0", "tiny/protonet/seed0"):
        shutil.copytree(made / "runs" / each, tmp_path / each)
    assert row.finished(tmp_path, 0)
    shutil.rmtree(PROTO.place(tmp_path, 0))
    assert row.finished(tmp_path, 0)
    run(replace(PROTONET, seed=0, steps=1, run_dir=PROTO.place(tmp_path, 0)))
    assert not row.finished(tmp_path, 0)


def test_what_is_kept_has_the_minutes_and_no_path(made: Path) -> None:
    for row, run_folder in ((PROTO.name, PROTO.name), ("across/elsewhere", PROTO.name)):
        text = (made / "tables" / "trainings" / row / "seed0" / "config.json").read_text()
        seconds = history_of(load_checkpoint(made / "runs" / run_folder / "seed0" / "last.pt")).seconds
        assert json.loads(text)["minutes"] == seconds / 60
        assert str(made) not in text


def test_one_maml_network_is_evaluated_in_all_sizes_by_both_batch_norms() -> None:
    images = torch.randint(0, 256, (24 * 20, 1, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    letters = FewShotDataset(images, torch.arange(24).repeat_interleave(20), [f"c{number}" for number in range(24)])
    config = replace(CONFIG, num_episodes=10)
    table = evaluate_more(CONFIG.trainer().eval(), Splits(letters, None, letters, shared_classes=True), config)
    found = [(row.ways, row.shots, row.protocol, row.count) for row in table.rows]
    assert found == [
        (20, 1, "transductive", 2),
        (20, 5, "transductive", 2),
        (5, 1, "inductive", 10),
        (5, 5, "inductive", 10),
        (20, 1, "inductive", 2),
        (20, 5, "inductive", 2),
    ]


def test_more_steps_make_older_figures_void(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    longer = replace(PROTONET, steps=3)
    row = Row("tiny/protonet", "ProtoNet", longer)
    rows = [row, Row("across/elsewhere", "elsewhere", longer, row, on_others, published={})]
    run(replace(longer, run_dir=row.place(tmp_path / "runs", 0)), resume=True)
    assert [row.seeds(tmp_path / "runs") for row in rows] == [[0], []]  # seed 1 has two steps
    assert reproduce(rows, tmp_path / "runs", (0,)) == {}
    assert [row.seeds(tmp_path / "runs") for row in rows] == [[0], [0]]


def test_runs_of_another_recipe_are_not_mixed_in(made: Path) -> None:
    assert Row("tiny/protonet", "ProtoNet", CHANGED).seeds(made / "runs") == []


def test_figures_without_their_values_have_wider_means_and_no_differences(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tables" / "trainings", tmp_path / "trainings")
    (tmp_path / "trainings" / "tiny" / "siamese" / "seed0" / "values.npz").unlink()
    write_tables(tmp_path / "none", ROWS, tmp_path)
    pairs = {(line["method"], line["minus"]): line["seed"] for line in lines(tmp_path / "tiny_differences.csv")}
    assert (pairs["ProtoNet", "Matching"], pairs["ProtoNet", "Siamese"]) == ("0, 1", "1")
    (siamese,) = (line for line in lines(tmp_path / "tiny.csv") if line["method"] == "Siamese")
    first, second = values(made, "tiny/siamese")
    episodes = 1.96 * (first.std() + second.std()) / 2 / len(first) ** 0.5
    seeds = 12.7062 * abs(first.mean() - second.mean()) / 2  # Student's t of one degree of freedom
    mean = (first.mean() + second.mean()) / 2
    assert siamese["5-way 1-shot"] == f"{100 * mean:.2f} +- {100 * (episodes**2 + seeds**2) ** 0.5:.2f}"


def test_what_is_finished_is_not_run_again(made: Path) -> None:
    files = [*(made / "runs").rglob("last.pt"), *(made / "runs").rglob("figures.csv")]
    before = {file: file.stat().st_mtime_ns for file in files}
    reproduce(ROWS, made / "runs", SEEDS)
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_what_other_machines_ran_is_kept_and_counts(made: Path, tmp_path: Path) -> None:
    for seed in SEEDS:
        runs = tmp_path / f"machine{seed}" / "tiny" / "protonet"
        shutil.copytree(made / "runs" / "tiny" / "protonet" / f"seed{seed}", runs / f"seed{seed}")
        write_tables(tmp_path / f"machine{seed}", ROWS[:1], tmp_path)
        assert lines(tmp_path / "tiny.csv")[0]["seed"] == ("0", "0, 1")[seed]
    assert lines(tmp_path / "tiny.csv")[0].items() <= lines(made / "tables" / "tiny.csv")[0].items()
    assert found_in(tmp_path / "trainings", ROWS[0])[0].seeds == [0, 1]
    row = Row("tiny/protonet", "ProtoNet", CHANGED)
    assert found_in(tmp_path / "trainings", row) == []
    assert reproduce([row], tmp_path / "changed", (1,)) == {}
    write_tables(tmp_path / "changed", [row], tmp_path)
    assert [line["seed"] for line in lines(tmp_path / "tiny_seeds.csv")] == ["1"]  # no longer mixed with the other's


def test_an_interruption_leaves_no_figures_of_another_recipe(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(made / "tables" / "trainings", tmp_path / "trainings")
    row = Row("tiny/protonet", "ProtoNet", CHANGED)
    assert reproduce([row], tmp_path / "changed", (1,)) == {}
    for part in ("ResultTable.write_figures", "write_config"):
        with monkeypatch.context() as patch:
            patch.setattr(f"experiments.reproduce_papers.tables.{part}", stop)
            with pytest.raises(KeyboardInterrupt):
                write_tables(tmp_path / "changed", [row], tmp_path)
        assert found_in(tmp_path / "trainings", row) == []
    write_tables(tmp_path / "changed", [row], tmp_path)
    assert found_in(tmp_path / "trainings", row)[0].seeds == [1]


def test_accuracies_of_single_episodes_are_kept(made: Path) -> None:
    kept = made / "tables" / "trainings" / "tiny" / "protonet" / "seed1"
    ours, theirs = (ResultTable.read(place).rows for place in (kept, made / "runs" / "tiny" / "protonet" / "seed1"))
    assert ours == theirs
    assert torch.equal(ours[0].values, theirs[0].values)
    assert all((each.values is not None) == each.of_episodes for each in ours)
    assert str(made) not in (kept / "config.json").read_text()
    others = made / "runs" / "tiny" / "siamese" / "seed1"
    expected = compare_runs([made / "runs" / "tiny" / "protonet" / "seed1", others])
    assert compare_runs([kept, others]).differences[0] == expected.differences[0]


def test_the_tables_of_the_docs_are_those_of_what_is_kept(tmp_path: Path) -> None:
    results, rows = DOCS / "results", [*rows_of_papers(), *ablations()]
    shutil.copytree(results / "trainings", tmp_path / "trainings")
    for file in results.glob("*.csv"):
        shutil.copy(file, tmp_path)
    for table in {row.table for row in rows}:
        for part in ("seeds", "differences"):
            (tmp_path / f"{table}_{part}.csv").unlink(missing_ok=True)
    write_tables(tmp_path / "none", rows, tmp_path)
    for file in tmp_path.glob("*.csv"):
        assert file.read_text() == (results / file.name).read_text()
    kept = {path.relative_to(results / "trainings").parts[:2] for path in (results / "trainings").rglob("figures.csv")}
    assert kept <= {tuple(row.name.split("/")) for row in rows}


def test_a_failure_is_a_line_that_says_why_until_it_is_gone(tmp_path: Path) -> None:
    def broken() -> Splits:
        raise RuntimeError("no\nsuch set")

    rows = [Row("tiny/broken", "broken", replace(PROTONET, data=broken)), PROTO]
    failed = reproduce(rows, tmp_path / "runs", (0,))
    assert failed == {"tiny/broken/seed0": "RuntimeError: no\nsuch set"}
    write_tables(tmp_path / "runs", rows, tmp_path, failed)
    shown = {(line["method"], line["source"]): line["note"] for line in lines(tmp_path / "tiny.csv")}
    assert shown["broken", "failed"] == "seed0: RuntimeError: no such set"
    assert ("ProtoNet", "this library") in shown
    write_tables(tmp_path / "runs", rows, tmp_path)  # of a call that did not try it
    assert "failed" in {line["source"] for line in lines(tmp_path / "tiny.csv")}
    write_tables(tmp_path / "runs", rows, tmp_path, {}, ["tiny/broken"])
    assert {line["source"] for line in lines(tmp_path / "tiny.csv")} == {"this library", "A. and B. 2000"}


def test_a_damaged_run_is_a_line_that_says_so(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "siamese" / "seed0" / "last.pt").unlink()
    write_tables(tmp_path / "runs", ROWS, tmp_path)
    shown = {(line["method"], line["source"]): line["note"] for line in lines(tmp_path / "tiny.csv")}
    assert "last.pt" in shown["Siamese", "failed"]
    assert ("Siamese", "this library") not in shown
    shutil.copytree(made / "tables" / "trainings", tmp_path / "kept" / "trainings")
    write_tables(tmp_path / "runs", ROWS, tmp_path / "kept")
    assert (tmp_path / "kept" / "tiny.csv").read_text() == (made / "tables" / "tiny.csv").read_text()
    assert ("ProtoNet", "this library") in shown


@pytest.mark.long
def test_the_budget_saves_the_training_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = Row("tiny/long", "long", replace(PROTONET, steps=10**6, validate_every=10**6))
    handler = signal.getsignal(signal.SIGTERM)
    assert reproduce([long, PROTO], tmp_path, (0,), minutes=0.1) == {}
    assert "the 0.1 minutes are up; the same command again continues" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "protonet").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_rows_have_names_of_their_own_and_ordinary_configs() -> None:
    rows = [*rows_of_papers(), *ablations(), *lake_rows(Path("lake"))]
    assert len({row.name for row in rows}) == len(rows) > 15
    assert {row.name for row in rows} >= {row.trained_by.name for row in rows if row.trained_by}
    assert len({config.name for config in CONFIGS}) > 15


def test_one_inner_step_makes_the_head_a_classifier_by_class_means() -> None:
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 3))
    rate = CONFIG.trainer.keywords["inner_lr"]
    trainer = MAMLTrainer(partial(PrototypeHead, 6, 20), rate, inner_loss=one_against_all).double()
    for ways, shots in ((20, 1), (7, 1), (5, 4)):
        found = trainer.classify(support[None, : ways * shots].unflatten(1, (ways, shots)), query[None])[0]
        means = 12.5 * F.normalize(support[: ways * shots].unflatten(0, (ways, shots)), dim=2).mean(dim=1)
        means = means - means.sum(dim=0) / (1 + math.exp(8))  # the other classes push a little
        expected = -0.05 * torch.cdist(12.5 * F.normalize(query, dim=1), means).square()
        torch.testing.assert_close(found.log_softmax(dim=1), expected.log_softmax(dim=1))


def test_an_unknown_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a row or a table .*omniglot/protonet"):
        main(only=("omniglot/proto",), folder=tmp_path)
    with pytest.raises(UsageError, match="expected --lake DIR for the rows of lake"):
        main(only=("lake/protonet",), folder=tmp_path)


def test_the_list_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(only=("omniglot/maml",), folder=tmp_path / "runs", list_only=True)
    assert "to do     omniglot/maml/seed2\n" in capsys.readouterr().out
    main(only=("omniglot_maml_recipes",), folder=tmp_path / "runs", list_only=True, seeds=(0,))
    assert "to do     omniglot_maml_recipes/two_shots/seed0\n" in capsys.readouterr().out
    main(folder=tmp_path / "runs", list_only=True)
    listed = capsys.readouterr().out
    assert "mini_imagenet/protonet" in listed
    assert "recipes" not in listed
    assert not (tmp_path / "runs").exists()


def test_gray_is_the_luma_that_pillow_has() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 6), generator=torch.Generator().manual_seed(0)).byte()
    found = gray(FewShotDataset(images, torch.tensor([0, 1]), ["a", "b"])).images
    expected = [np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).convert("L")) for each in images]
    assert (found[:, 0].int() - torch.from_numpy(np.stack(expected)).int()).abs().max() <= 1


@pytest.fixture
def runs_of_lake(tmp_path: Path) -> Path:
    """Two runs of three characters, in which an item is its character's drawing, but for one that shows another."""
    rng = np.random.default_rng(0)
    for name in ("run01", "run02"):
        for part in ("training", "test"):
            (tmp_path / name / part).mkdir(parents=True)
        text = []
        drawings = [Image.fromarray(rng.random((105, 105)) < 0.5) for _ in range(3)]
        for number, drawing in enumerate(drawings, start=1):
            drawing.save(tmp_path / name / "training" / f"class{number:02}.png")
            shown = (number % 3) + 1
            drawings[shown - 1].save(tmp_path / name / "test" / f"item{number:02}.png")
            text.append(f"{name}/test/item{number:02}.png {name}/training/class{shown:02}.png")
        if name == "run02":  # its first item is said to be of the first character, and shows the second
            text[0] = f"{name}/test/item01.png {name}/training/class01.png"
        (tmp_path / name / "class_labels.txt").write_text("\n".join(text) + "\n")
    return tmp_path


def test_lakes_runs_are_classified_within_each(runs_of_lake: Path) -> None:
    trainer = ProtoNetTrainer(Embedder(Conv4(channels=8))).eval()
    (row,) = evaluate_lake(trainer, PROTONET, runs_of_lake).rows
    assert row.values is not None
    assert row.values.tolist() == pytest.approx([1, 2 / 3])
    assert (row.ways, row.shots, row.note, row.count) == (3, 1, "2 runs", 2)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda run: (run / "test" / "item02.png").unlink(), MissingFileError, r"item02.png, got no such file"),
        (lambda run: (run / "training" / "class03.png").unlink(), UsageError, r"expected drawings of .*class03.png"),
        (lambda run: (run / "class_labels.txt").write_text("one\n"), UsageError, r"an item and a drawing in each line"),
        (
            lambda run: (run / "class_labels.txt").write_text("run01/test/item01.png run01/training/class01.png"),
            UsageError,
            r"as many items as drawings, got 1 items and 3 drawings",
        ),
        (lambda run: (run / "class_labels.txt").unlink(), UsageError, r"run"),
    ],
)
def test_damaged_runs_are_named(
    runs_of_lake: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(runs_of_lake / "run01")
    if message == "run":  # the other run is whole
        assert load_runs(runs_of_lake, 28)[1].shape == (1, 3)
        return
    with pytest.raises(error, match=message):
        load_runs(runs_of_lake, 28)


def test_no_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"expected run01/class_labels\.txt"):
        load_runs(tmp_path, 28)
