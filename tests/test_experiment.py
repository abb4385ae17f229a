"""run and main: the run folder, errors before hours of training, the command line, every experiment for two steps."""

import csv
import importlib
import inspect
import os
import pkgutil
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import experiments
from experiments import quickstart
from pml_fewshot.checkpoint import load_checkpoint, load_embedder
from pml_fewshot.command_line import main
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultRow, ResultTable
from pml_fewshot.experiment import ExperimentConfig, run
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.parts import build
from pml_fewshot.trainers.fit import TrainingDiverged
from pml_fewshot.trainers.protonet import ProtoNetTrainer

ROOT = Path(__file__).parent.parent


def tiny_set(prefix: str, classes: int, seed: int) -> FewShotDataset:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(40, 216, (classes, 1, 1, 4, 4), generator=generator)
    images = (pattern + torch.randint(-60, 61, (classes, 10, 1, 4, 4), generator=generator)).clamp(0, 255).byte()
    labels = torch.arange(classes).repeat_interleave(10)
    return FewShotDataset(images.flatten(0, 1), labels, [f"{prefix}{c}" for c in range(classes)], "made up")


def tiny_splits() -> Splits:
    return Splits(tiny_set("a", 8, 0), tiny_set("b", 5, 1), tiny_set("c", 6, 2))


TRUNK = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 8))
TINY = ExperimentConfig(
    name="tiny",
    data=tiny_splits,
    trainer=partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=TRUNK)),
    optimizer=partial(Adam, lr=0.01),
    train_spec=EpisodeSpec(5, 1, 3),
    eval_specs=(EpisodeSpec(5, 1, 5), EpisodeSpec(5, 5, 5)),
    steps=4,
    validate_every=2,
    num_episodes=30,
    val_episodes=10,
    device="cpu",
)


def rows_of(folder: Path, group: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(folder / "logs.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {group}")]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without run_dir go below the working folder: not into the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PML_FEWSHOT_DATA", raising=False)


# --- the run folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, Path, ResultTable]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    config = replace(quickstart.CONFIG, steps=2, num_episodes=20, val_episodes=20, run_dir=folder, device="cpu", seed=7)
    return config, folder, run(config)


Quick = tuple[ExperimentConfig, Path, ResultTable]


def test_run_folder_holds_all_that_is_promised(quick: Quick) -> None:
    files = {path.name for path in quick[1].iterdir()}
    promised = {"config.txt", "logs.db", "train.csv", "last.pt", "embedder.safetensors"}
    tables = {"results.csv", "results.md", "results.tex", "figures.csv"}
    assert files - {"tensorboard"} == promised | tables | {"validation.csv"}


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def test_figures_csv_is_the_table_at_full_precision(quick: Quick) -> None:
    config, folder, table = quick
    names, rows = read_csv(folder / "figures.csv")
    assert names == [field.name for field in fields(ResultRow)]
    assert len(rows) == len(table.rows) == 3 + 3
    for row, expected in zip(rows, table.rows, strict=True):
        assert (row["method"], row["figure"]) == ("quickstart", expected.figure)
        assert (float(row["value"]), float(row["ci95"])) == (expected.value, expected.ci95)
        assert 0 <= float(row["value"]) <= 1
        assert float(row["ci95"]) > 0
        assert (row["split"], row["classes"]) == ("test", "303")
    for row, spec in zip(rows, config.eval_specs, strict=False):
        assert row["figure"] == "accuracy"
        sizes = tuple(int(row[name]) for name in ("ways", "shots", "queries", "count", "seed"))
        assert sizes == (spec.ways, spec.shots, spec.queries, 20, 7)
        assert re.fullmatch("[0-9a-f]{16}", row["episodes_hash"])
        assert row["protocol"] == "inductive"
    assert [row["figure"] for row in rows[3:]] == ["precision_at_1", "r_precision", "mean_average_precision_at_r"]
    assert [row["ways"] for row in rows[3:]] == [""] * 3
    assert [int(row["count"]) for row in rows[3:]] == [303 * 20] * 3
    assert [row["seconds"] for row in rows] == [""] * 6  # a run that is repeated gives the same files


def test_results_csv_has_the_same_figures_in_one_line(quick: Quick) -> None:
    config, folder, table = quick
    names, (row,) = read_csv(folder / "results.csv")
    assert names[:2] == ["method", "split"]
    assert (row["method"], row["split"], row["classes"], row["seconds"]) == ("quickstart", "test", "303", "")
    columns = [f"{spec.ways}way_{spec.shots}shot_{spec.queries}query" for spec in config.eval_specs]
    columns += ["precision_at_1", "r_precision", "mean_average_precision_at_r"]
    for column, expected in zip(columns, table.rows, strict=True):
        assert (float(row[column]), float(row[column + "_ci95"])) == (expected.value, expected.ci95)
        assert int(row[column + "_count"]) == expected.count
        assert expected.episodes_hash in row[column + "_protocol"]
    assert (folder / "results.md").read_text() == table.markdown()
    assert (folder / "results.tex").read_text() == table.latex()


def test_config_txt_says_what_the_run_stands_on(quick: Quick) -> None:
    text = (quick[1] / "config.txt").read_text()
    for field in fields(ExperimentConfig):
        assert re.search(rf"^{field.name} = .", text, re.MULTILINE), field.name
    assert "seed = 7\n" in text
    assert "Conv4" in text
    assert "LpDistance" in text
    assert "train = FewShotDataset(17680 images of 1x28x28, 884 classes" in text
    for package in ("pml_fewshot", "torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy"):
        assert re.search(rf"^{package} \d+\.\d+", text, re.MULTILINE), package
    assert re.search(r"^git commit ([0-9a-f]{40}(-dirty)?|unknown .*)$", text, re.MULTILINE)
    assert re.search(r"^python 3\.\d+\.\d+ on .*, \d+ threads, cpu$", text, re.MULTILINE)
    assert "0x" not in text.replace("0x28", "")  # an address; "0x28" cannot stand in "1x28x28"


def test_config_txt_is_written_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run(replace(TINY, run_dir=tmp_path / "run"))
    assert "git commit unknown" in (tmp_path / "run" / "config.txt").read_text()


def test_logs_hold_training_and_validation(quick: Quick) -> None:
    first, train = rows_of(quick[1], "train")
    assert (first["step"], train["step"]) == (1, 2)
    assert train.keys() >= {"loss", "learning_rate", "accuracy"}
    (validation,) = rows_of(quick[1], "validation")
    assert 0 < validation["accuracy"] < 1
    assert validation["ci95"] > 0


def test_exported_embedder_gives_the_figures_of_the_table(tmp_path: Path) -> None:
    table = run(replace(TINY, run_dir=tmp_path / "run", steps=30, seed=3))
    trainer = build(TINY.trainer)
    load_embedder(tmp_path / "run" / "embedder.safetensors", trainer.embedder)
    for spec, row in zip(TINY.eval_specs, table.rows, strict=False):
        result = EpisodicEvaluator(spec, 30, seed=3).evaluate(trainer, tiny_splits().test)
        assert (result.mean, result.ci95, result.episodes_hash) == (row.value, row.ci95, row.episodes_hash)
    assert all(row.note == "made up" for row in table.rows)


def test_last_state_can_be_read(tmp_path: Path) -> None:
    run(replace(TINY, run_dir=tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["history"]["steps"] == 4
    assert [step for step, _, _ in state["history"]["validations"]] == [2, 4]


def test_without_a_run_dir_the_folder_is_named_by_experiment_and_seed(tmp_path: Path) -> None:
    run(replace(TINY, seed=5))
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_seed5", folder.name)
    assert (folder / "results.csv").is_file()


# --- the same seed, the same run --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_table_whatever_was_drawn_before(tmp_path: Path) -> None:
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(tables))
        torch.rand(5)
        tables.append(run(replace(TINY, run_dir=tmp_path / name, seed=seed)).csv())
    assert tables[0] == tables[1]
    for file in ("results.csv", "results.md", "results.tex", "figures.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert tables[0] != tables[2]


def test_two_runs_of_one_config_share_no_parameters(tmp_path: Path) -> None:
    config = replace(
        TINY,
        trainer=partial(TINY.trainer.func, **TINY.trainer.keywords, loss=partial(PrototypicalLoss, learn_scale=True)),
    )
    run(replace(config, run_dir=tmp_path / "a"))
    run(replace(config, run_dir=tmp_path / "b"))
    first, second = (load_checkpoint(tmp_path / name / "last.pt")["trainer"] for name in "ab")
    assert first["loss.log_scale"] != 0
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- options ----------------------------------------------------------------------------------------------------------


def test_cosine_annealing_is_given_the_steps(tmp_path: Path) -> None:
    run(replace(TINY, run_dir=tmp_path / "run", steps=6, validate_every=3, scheduler=CosineAnnealingLR))
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run", "train")]
    # the rate that the step itself was made with: 0.005 (1 + cos(pi (step - 1) / 6)) at steps 1, 3 and 6
    assert rates == pytest.approx([0.01, 0.0075, 0.005 * (1 - 3**0.5 / 2)])


def test_schedulers_with_all_their_arguments_are_left_alone(tmp_path: Path) -> None:
    for name, scheduler in (
        ("step", partial(StepLR, step_size=1, gamma=0.1)),
        ("cosine", partial(CosineAnnealingLR, T_max=8)),
    ):
        run(replace(TINY, run_dir=tmp_path / name, scheduler=scheduler))
    assert rows_of(tmp_path / "step", "train")[-1]["learning_rate"] == pytest.approx(1e-5)
    assert rows_of(tmp_path / "cosine", "train")[-1]["learning_rate"] == pytest.approx(0.00691342)


def test_plateau_ends_a_run(tmp_path: Path) -> None:
    scheduler = partial(ReduceLROnPlateau, factor=0.5, patience=0, min_lr=0.01)
    config = replace(TINY, run_dir=tmp_path / "run", optimizer=partial(SGD, lr=0.01), scheduler=scheduler)
    run(replace(config, steps=2000, validate_every=1, trainer=partial(ProtoNetTrainer, partial(Embedder, TRUNK))))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["history"]["stopped"] == "learning rate at its lowest"


def test_training_on_the_validation_classes_too_leaves_nothing_to_validate_on(tmp_path: Path) -> None:
    run(replace(TINY, run_dir=tmp_path / "run", train_on_validation=True, train_spec=EpisodeSpec(13, 1, 3)))
    assert not (tmp_path / "run" / "validation.csv").exists()  # 13 ways: 8 classes of train and 5 of val


def test_without_validation_classes_the_last_weights_are_judged(tmp_path: Path) -> None:
    def no_validation() -> Splits:
        return Splits(tiny_set("a", 8, 0), None, tiny_set("c", 6, 2))

    run(replace(TINY, run_dir=tmp_path / "run", data=no_validation, train_on_validation=True))
    run(replace(TINY, run_dir=tmp_path / "again", data=no_validation))
    tables = [(tmp_path / name / "results.csv").read_text() for name in ("run", "again")]
    assert tables[0].replace("; trained on train and val classes", "") == tables[1]


def test_retrieval_ranks_by_the_distance_of_the_loss(tmp_path: Path) -> None:
    trainer = partial(
        ProtoNetTrainer,
        embedder=partial(Embedder, trunk=TRUNK),
        loss=partial(PrototypicalLoss, distance=CosineSimilarity),
    )
    base = replace(TINY, trainer=trainer, steps=1)

    def figures(name: str, retrieval: Any) -> list[float]:
        table = run(replace(base, run_dir=tmp_path / name, retrieval=retrieval))
        return [row.value for row in table.rows if row.ways is None]

    from_the_loss = figures("a", RetrievalTester)
    assert from_the_loss == figures("b", partial(RetrievalTester, distance=partial(CosineSimilarity)))
    assert from_the_loss != figures("c", partial(RetrievalTester, distance=TINY_EUCLID))
    assert figures("d", None) == []


TINY_EUCLID = PrototypicalLoss().distance


def test_loader_with_a_root_is_given_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []

    def load(root: Path, some: int = 3) -> Splits:
        given.append(Path(root))
        return tiny_splits()

    def go(**options: Any) -> None:
        config = replace(TINY, data=partial(load, some=4), steps=1, run_dir=tmp_path / f"run{len(given)}", **options)
        run(config)

    go()
    monkeypatch.setenv("PML_FEWSHOT_DATA", "/from/the/variable")
    go()
    go(data_root=Path("/given"))
    assert given == [Path("data"), Path("/from/the/variable"), Path("/given")]


def test_penalties_and_clipping_reach_the_training(tmp_path: Path) -> None:
    weights = []
    for name, options in (("plain", {}), ("l2", {"l2": 0.1}), ("l1", {"l1": 0.1}), ("clip", {"clip_norm": 1e-4})):
        optimizer = partial(SGD, lr=0.1)
        run(replace(TINY, run_dir=tmp_path / name, optimizer=optimizer, **options))  # type: ignore[arg-type]
        weights.append(load_checkpoint(tmp_path / name / "last.pt")["trainer"]["embedder.trunk.1.weight"])
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 4


# --- errors -----------------------------------------------------------------------------------------------------------


def test_second_run_into_one_folder_raises_and_touches_nothing(quick: Quick) -> None:
    config, folder, _ = quick
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(
        FileExistsError, match=r"expected a new or empty run folder, got .*; name another with --run-dir"
    ):
        run(config)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_run_folder_that_is_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty run folder"):
        run(replace(TINY, run_dir=tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


TOO_MANY_TURNS = partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=TRUNK), turns=5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eval_specs": (EpisodeSpec(5, 1, 5), EpisodeSpec(7, 1, 5))}, "at least 7 classes .* got 6"),
        ({"eval_specs": (EpisodeSpec(5, 5, 6),)}, "at least 11 items"),
        ({"eval_specs": (EpisodeSpec(6, 1, 5),)}, "at least 6 classes .* got 5"),  # of validation
        ({"train_spec": EpisodeSpec(9, 1, 5)}, "at least 9 classes .* got 8"),
        ({"eval_specs": ()}, "eval_specs"),
        ({"num_episodes": 1}, "num_episodes"),
        ({"val_episodes": 0}, "num_episodes|val_episodes"),
        ({"steps": 0}, "steps"),
        ({"validate_every": 0}, "validate_every"),
        ({"retrieval": partial(RetrievalTester, metrics=("precsion_at_1",))}, "precision_at_1"),
        ({"retrieval": partial(RetrievalTester, metrcs=())}, "metrcs"),
        ({"scheduler": partial(StepLR, step_sise=3)}, "step_sise"),
        ({"optimizer": partial(Adam, lrr=3)}, "lrr"),
        ({"patience": 2, "train_on_validation": True}, "validation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_raise_before_any_training_and_make_no_folder(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(replace(TINY, run_dir=tmp_path / "run", **wrong))
    assert not (tmp_path / "run" / "last.pt").exists(), "it was trained first"
    assert not (tmp_path / "run").exists(), "the next try with this --run-dir would be refused"


def test_too_many_turns_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 4 turns"):
        run(replace(TINY, run_dir=tmp_path / "run", trainer=TOO_MANY_TURNS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a CUDA device for device='cuda', got none; use device='cpu'"):
        run(replace(TINY, run_dir=tmp_path / "run", device="cuda"))


def test_diverged_training_leaves_its_records(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="learning rate"):
        run(replace(TINY, run_dir=tmp_path / "run", optimizer=partial(SGD, lr=1e30), steps=50, validate_every=10))
    assert (tmp_path / "run" / "config.txt").is_file()
    assert not (tmp_path / "run" / "results.csv").exists()


def test_misspelt_field_raises() -> None:
    with pytest.raises(TypeError, match="setps"):
        replace(TINY, setps=3)  # type: ignore[call-arg]


# --- the command line -------------------------------------------------------------------------------------------------


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ResultTable:
    monkeypatch.setattr(sys, "argv", ["tiny", *arguments])
    return main(TINY)


def test_options_of_the_command_line_change_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = command_line(
        monkeypatch, "--steps", "3", "--seed", "4", "--run-dir", str(tmp_path / "run"), "--num-episodes", "12"
    )
    text = (tmp_path / "run" / "config.txt").read_text()
    assert "steps = 3\n" in text
    assert "seed = 4\n" in text
    assert [(row.count, row.seed) for row in table.rows[:2]] == [(12, 4)] * 2
    assert [row.shots for row in table.rows[:2]] == [1, 5]  # both specs of the file


def test_without_options_the_run_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = command_line(monkeypatch)
    assert table.csv() == run(replace(TINY, run_dir=tmp_path / "run")).csv()


def test_eval_spec_judges_by_one_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    table = command_line(monkeypatch, "--eval-spec.ways", "3", "--eval-spec.shots", "2")
    specs = [(row.ways, row.shots, row.queries) for row in table.rows if row.figure == "accuracy"]
    assert specs == [(3, 2, 5)]  # queries from the first spec of the file


def test_train_spec_can_be_changed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command_line(monkeypatch, "--train-spec.ways", "4", "--run-dir", str(tmp_path / "run"))
    assert "train_spec = EpisodeSpec(ways=4, shots=1, queries=3)" in (tmp_path / "run" / "config.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setps", "3"), "--steps"),
        (("--steps", "three"), "three"),
        (("--device", "tpu"), "cuda"),
        (("--eval-spec.wasy", "3"), "--eval-spec.ways"),
    ],
)
def test_misspelt_options_end_with_a_suggestion(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line(monkeypatch, *arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert message in out + err
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line(monkeypatch, "--help")
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
    for option in ("--steps", "--seed", "--device", "--data-root", "--run-dir", "--num-episodes", "--eval-spec.ways"):
        assert option in text
    assert "training steps" in text
    assert "support items of each class" in text


def test_the_file_is_a_command() -> None:
    command = [sys.executable, "-m", "experiments.quickstart", "--setps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--steps" in done.stdout + done.stderr


# --- every experiment -------------------------------------------------------------------------------------------------

COMMANDS = [module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.ispkg]
MODULES = [name for name in COMMANDS if name != "benchmark_embeddings"]  # which trains nothing and has no config
DATA_ROOT = Path(os.environ.get("PML_FEWSHOT_DATA", ROOT / ".." / "shared" / "data")).resolve()


def config_of(module: str) -> ExperimentConfig:
    return importlib.import_module(f"experiments.{module}").CONFIG


def walk(part: Any) -> Iterator[Any]:
    """A part and all in it: functions, arguments and keywords of partials, members of tuples."""
    yield part
    if isinstance(part, partial):
        part = (part.func, *part.args, *part.keywords.values())
    elif isinstance(part, dict):
        part = tuple(part.values())
    if isinstance(part, tuple | list):
        for member in part:
            yield from walk(member)


def parts_of(config: ExperimentConfig) -> list[Any]:
    return [part for field in fields(config) for part in walk(getattr(config, field.name))]


def has_lambda(config: ExperimentConfig) -> bool:
    return any(getattr(part, "__name__", "") == "<lambda>" for part in parts_of(config))


def test_there_are_experiments() -> None:
    assert "quickstart" in MODULES


def test_a_lambda_anywhere_would_be_found() -> None:
    assert has_lambda(replace(TINY, data=lambda: tiny_splits()))
    assert has_lambda(replace(TINY, trainer=partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=lambda: None))))
    assert has_lambda(replace(TINY, trainer=partial(nn.Sequential, partial(nn.Sequential, (1, lambda: None)))))
    assert not has_lambda(TINY)


@pytest.mark.parametrize("module", MODULES)
def test_experiment_is_an_honest_record(module: str) -> None:
    config = config_of(module)
    assert isinstance(config, ExperimentConfig)
    assert config.name == module
    assert not has_lambda(config), "its repr says nothing"
    modules = [part for part in parts_of(config) if isinstance(part, nn.Module)]
    assert modules == [], "built at import, before the seed is set, and shared by all runs: give a factory"


@pytest.mark.parametrize("module", COMMANDS)
def test_docstring_names_the_command(module: str) -> None:
    text = importlib.import_module(f"experiments.{module}").__doc__ or ""
    assert f"python -m experiments.{module}" in text
    assert len(text.splitlines()[0]) > 20


def few(data: partial, root: Path | None = None) -> Splits:
    """The splits with 20 classes and 20 items of each: enough for two steps of anything."""

    def cut(dataset: FewShotDataset) -> FewShotDataset:
        some = dataset.of_classes(range(min(20, len(dataset.class_names))))
        order = some.labels.argsort(stable=True)
        starts = some.labels.bincount().cumsum(0) - some.labels.bincount()
        rank = torch.arange(len(order)) - starts[some.labels[order]]
        keep = order[rank < 20]
        return FewShotDataset(some.images[keep], some.labels[keep], some.class_names, some.note)

    splits = data(root=root) if root is not None else data()
    return Splits(cut(splits.train), cut(splits.val) if splits.val else None, cut(splits.test))


@pytest.mark.parametrize("module", MODULES)
def test_experiment_runs_for_two_steps(module: str, tmp_path: Path) -> None:
    config = config_of(module)
    data = config.data
    if "root" in inspect.signature(data).parameters:
        try:
            splits = few(data, DATA_ROOT)
        except FileNotFoundError as error:
            pytest.skip(f"its data is not in {DATA_ROOT}: {error}")
    else:
        splits = few(data)

    def load() -> Splits:
        return splits

    # fewer ways than in the file, which only cost time; shots, queries and turns are those of the file
    spec = replace(config.train_spec, ways=min(config.train_spec.ways, 5))
    small = replace(config, train_spec=spec, steps=2, num_episodes=10, val_episodes=10)
    table = run(replace(small, data=load, run_dir=tmp_path / "run", device="cpu"))
    assert sum(row.figure == "accuracy" for row in table.rows) == len(config.eval_specs)
    assert all(0 <= row.value <= 1 for row in table.rows)
    assert (tmp_path / "run" / "embedder.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "error: expected steps to be an integer of at least 1"),
        (("--eval-spec.ways", "5000"), "error: expected at least 5000 classes"),
        (("--eval-spec.shots", "0"), "error: expected shots to be an integer of at least 1"),
    ],
)
def test_bad_values_end_in_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line(monkeypatch, *arguments)
    assert str(stopped.value.code).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_others_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Splits:
        raise ValueError("something in my own loader")

    monkeypatch.setattr("sys.argv", ["experiment"])
    with pytest.raises(ValueError, match="my own loader"):
        main(replace(TINY, data=broken))


def test_a_start_that_fails_leaves_no_run_folder(tmp_path: Path) -> None:
    too_many = replace(TINY, run_dir=tmp_path / "run", trainer=partial(TINY.trainer, turns=50))
    with pytest.raises(ValueError, match=r"expected at most .* turns"):
        run(too_many)
    assert not (tmp_path / "run").exists()
    run(replace(TINY, run_dir=tmp_path / "run"))


def test_a_tester_given_as_an_object_is_left_as_it_was(tmp_path: Path) -> None:
    tester = RetrievalTester()
    table = run(replace(TINY, run_dir=tmp_path / "run", retrieval=tester))
    assert tester.distance is None
    assert table.rows[-1].ranking == "exact, LpDistance(p=2, power=2)"


def test_the_root_that_a_loader_has_already_is_kept(tmp_path: Path) -> None:
    seen = []

    def load(root: Path) -> Splits:
        seen.append(root)
        return tiny_splits()

    run(replace(TINY, run_dir=tmp_path / "a", data=partial(load, root=Path("mine")), data_root=Path("other")))
    run(replace(TINY, run_dir=tmp_path / "b", data=load, data_root=Path("other")))
    assert seen == [Path("mine"), Path("other")]
