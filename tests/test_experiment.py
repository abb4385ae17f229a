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
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    NTXentLoss,
    SelfSupervisedLoss,
)
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import FixedSetOfTriplets, MPerClassSampler, TuplesToWeightsSampler
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import experiments
from experiments import quickstart
from pml_fewshot.batches import BatchSpec
from pml_fewshot.checkpoint import load_checkpoint, load_embedder
from pml_fewshot.command_line import main
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultRow, ResultTable
from pml_fewshot.experiment import run
from pml_fewshot.experiment_config import ExperimentConfig
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.parts import build
from pml_fewshot.trainers.divergence import TrainingDiverged
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.maml import MAMLTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer
from tests.test_reproduce import change_about

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
    promised = {"config.txt", "config.json", "logs.db", "train.csv", "last.pt", "embedder.safetensors"}
    tables = {"results.csv", "results.md", "results.tex", "figures.csv"}
    assert files - {"tensorboard", ".lock"} == promised | tables | {"validation.csv"}


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
    assert re.search(r"^python 3\.\d+\.\d+ on .*\nthreads \d+\ndevice cpu$", text, re.MULTILINE)
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


def test_a_network_too_narrow_for_a_spec_raises_before_any_training(tmp_path: Path) -> None:
    narrow = partial(MAMLTrainer, network=partial(nn.Sequential, TRUNK, partial(nn.Linear, 8, 3)), inner_lr=0.1)
    with pytest.raises(ValueError, match="expected a network with 5 outputs, one for each way"):
        run(replace(TINY, run_dir=tmp_path / "run", trainer=narrow, train_spec=EpisodeSpec(3, 1, 2), retrieval=None))
    assert not (tmp_path / "run").exists()


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

    # fewer classes than in the file, which only cost time; shots, queries and turns are those of the file
    spec = config.train_spec
    is_maml = isinstance(build(config.trainer), MAMLTrainer)
    if isinstance(spec, BatchSpec):
        spec = replace(spec, classes=5)
    elif not is_maml:  # its network has as many outputs as the file's ways
        spec = replace(spec, ways=min(spec.ways, 5))
    small = replace(config, train_spec=spec, steps=2, num_episodes=10, val_episodes=10)
    table = run(replace(small, data=load, run_dir=tmp_path / "run", device="cpu"))
    own = [row for row in table.rows if row.method == config.name and row.figure == "accuracy"]
    assert len(own) == len(config.eval_specs)
    assert all(0 <= row.value <= 1 for row in table.rows)
    part = "network" if is_maml else "embedder"
    assert (tmp_path / "run" / f"{part}.safetensors").is_file()


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


# --- ordinary batches -------------------------------------------------------------------------------------------------


def no_validation() -> Splits:
    return Splits(tiny_set("a", 8, 0), None, tiny_set("c", 6, 2))


EMBEDDER = partial(Embedder, trunk=TRUNK)
BATCHES = replace(
    TINY, name="batches", data=no_validation, trainer=partial(MetricTrainer, EMBEDDER), train_spec=BatchSpec(4, 3)
)
HARD_ITEMS = partial(TuplesToWeightsSampler, miner=MultiSimilarityMiner(), dataloader_num_workers=0)


def weights_after(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "last.pt")["trainer"]


def same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainer": partial(SiameseTrainer, EMBEDDER)},
        {"augment": RandomAffine(), "seed": 3},
        {"sampler": partial(MPerClassSampler, m=3, batch_size=12, length_before_new_iter=24)},
        {"sampler": HARD_ITEMS},
        {
            "trainer": partial(MetricTrainer, EMBEDDER, partial(SelfSupervisedLoss, loss=NTXentLoss)),
            "train_spec": BatchSpec(4, 3, views=2),
            "augment": RandomAffine(),
        },
    ],
    ids=["plain", "siamese", "augmented", "m per class", "hard items", "two views"],
)
def test_run_on_batches_is_the_training_made_by_hand(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(BATCHES, run_dir=tmp_path / "run", steps=12, **options)
    table = run(config)
    torch.manual_seed(config.seed)
    trainer = build(config.trainer)
    stream = BatchStream(
        no_validation().train, config.train_spec, config.seed, config.augment, config.sampler, trainer.embedder
    )
    fit(trainer, stream, Adam(trainer.parameters(), lr=0.01), 12, progress=False)
    assert same_state(weights_after(tmp_path / "run"), trainer.state_dict())
    for spec, row in zip(config.eval_specs, table.rows, strict=False):
        result = EpisodicEvaluator(spec, 30, seed=config.seed).evaluate(trainer, tiny_splits().test)
        assert (result.mean, result.episodes_hash) == (row.value, row.episodes_hash)


def test_config_txt_names_batches_and_sampler(tmp_path: Path) -> None:
    sampler = partial(MPerClassSampler, m=3, batch_size=12, length_before_new_iter=24)
    run(replace(BATCHES, run_dir=tmp_path / "run", sampler=sampler, loss_lr=0.5, loss_patience=7))
    text = (tmp_path / "run" / "config.txt").read_text()
    assert "train_spec = BatchSpec(classes=4, per_class=3, views=1)\n" in text
    assert re.search(r"^sampler = .*MPerClassSampler.*m=3", text, re.MULTILINE)
    assert "loss_lr = 0.5\n" in text
    assert "loss_patience = 7\n" in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_spec": BatchSpec(9, 2)}, "at least 9 classes .* got 8"),
        ({"train_spec": BatchSpec(4, 11)}, "at least 11 items"),
        ({"train_spec": BatchSpec(4, 3, views=2)}, "expected augmentation for two views"),
        ({"train_spec": EpisodeSpec(5, 1, 3), "sampler": HARD_ITEMS}, r"expected train_spec=BatchSpec\(.*5-way 1-shot"),
        (
            {"sampler": partial(FixedSetOfTriplets, num_triplets=3)},
            "at least 12 items from FixedSetOfTriplets, .*got 9",
        ),
        (
            {"trainer": partial(MetricTrainer, EMBEDDER, partial(ArcFaceLoss, 7, 8)), "train_spec": BatchSpec(8, 2)},
            "labels below 7, the num_classes of ArcFaceLoss, got 7",
        ),
        ({"loss_patience": 0}, "loss_patience"),
        ({"loss_lr": -1.0, "trainer": partial(MetricTrainer, EMBEDDER, partial(ArcFaceLoss, 8, 8))}, "learning rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_batches_raise_before_a_step_and_leave_no_folder(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = replace(BATCHES, run_dir=tmp_path / "run", steps=20, **wrong)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()


def test_skipped_steps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_class(labels: Any) -> list[int]:
        return [i for i, label in enumerate(labels) if label == 3][:6]

    trainer = partial(MetricTrainer, EMBEDDER, NTXentLoss)
    run(replace(BATCHES, run_dir=tmp_path / "run", train_spec=BatchSpec(2, 3), sampler=one_class, trainer=trainer))
    assert "4 steps skipped: nothing to learn from in their batches" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "last.pt")["history"]["skipped"] == 4
    run(replace(BATCHES, run_dir=tmp_path / "other"))
    assert "steps skipped" not in capsys.readouterr().out


# --- a rate for the loss's own parameters -----------------------------------------------------------------------------

WITH_WEIGHTS = {
    "class weights": partial(MetricTrainer, EMBEDDER, partial(ArcFaceLoss, 8, 8)),
    "similarity": partial(
        SiameseTrainer, EMBEDDER, partial(ContrastiveLoss, 1.0, -1.0, distance=partial(WeightedL1Similarity, 8))
    ),
}


def changed_weights(trainer: partial, folder: Path, lr: float, loss_lr: float | None) -> dict[str, torch.Tensor]:
    """What a step of gradient descent has added to each weight of embedder and loss."""
    config = replace(BATCHES, trainer=trainer, optimizer=partial(SGD, lr=lr), loss_lr=loss_lr, steps=1)
    torch.manual_seed(config.seed)
    before = {name: weight.detach().clone() for name, weight in build(trainer).named_parameters()}
    run(replace(config, run_dir=folder))
    after = weights_after(folder)
    return {name: after[name] - weight for name, weight in before.items()}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_loss_lr_is_the_rate_of_the_loss_alone(name: str, tmp_path: Path) -> None:
    one = changed_weights(WITH_WEIGHTS[name], tmp_path / "one", 0.1, None)
    two = changed_weights(WITH_WEIGHTS[name], tmp_path / "two", 0.1, 0.3)
    none = changed_weights(WITH_WEIGHTS[name], tmp_path / "none", 0.1, 0.0)
    only = changed_weights(WITH_WEIGHTS[name], tmp_path / "only", 0.0, 0.1)
    assert {key.split(".")[0] for key in one} == {"embedder", "loss"}
    assert all(any(step.any() for key, step in one.items() if key.startswith(part)) for part in ("embedder", "loss"))
    for key, step in one.items():
        of_loss = key.startswith("loss.")
        torch.testing.assert_close(two[key], 3 * step if of_loss else step, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(none[key], 0 * step if of_loss else step, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(only[key], step if of_loss else 0 * step, rtol=1e-4, atol=1e-6)


def test_loss_lr_changes_nothing_where_the_loss_has_no_parameters(tmp_path: Path) -> None:
    run(replace(BATCHES, run_dir=tmp_path / "a"))
    run(replace(BATCHES, run_dir=tmp_path / "b", loss_lr=5.0))
    assert same_state(weights_after(tmp_path / "a"), weights_after(tmp_path / "b"))


def test_scheduler_takes_both_rates_down(tmp_path: Path) -> None:
    config = replace(BATCHES, trainer=WITH_WEIGHTS["class weights"], loss_lr=0.2, steps=3)
    run(replace(config, run_dir=tmp_path / "run", scheduler=partial(StepLR, step_size=1, gamma=0.1)))
    rates = [group["lr"] for group in load_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.01 * 1e-3, 0.2 * 1e-3])


# --- the loss that no longer falls, and other judges ------------------------------------------------------------------


@pytest.mark.parametrize("loss_patience", [20, 60])
def test_loss_patience_ends_a_run_with_the_weights_of_the_lowest_loss(loss_patience: int, tmp_path: Path) -> None:
    config = replace(BATCHES, steps=3000, optimizer=partial(SGD, lr=1e-4), loss_patience=loss_patience)
    run(replace(config, run_dir=tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    history = state["history"]
    lowest = min(history["losses"], key=lambda entry: entry[1])[0]
    assert history["stopped"] == "loss no longer falling"
    assert history["best_step"] == lowest
    assert loss_patience <= history["steps"] - lowest < loss_patience + 20
    trainer = build(config.trainer)
    load_embedder(tmp_path / "run" / "embedder.safetensors", trainer.embedder)
    exported = trainer.embedder.state_dict()
    assert all(torch.equal(value, state["best"][f"embedder.{name}"]) for name, value in exported.items())
    assert not all(torch.equal(value, state["trainer"][f"embedder.{name}"]) for name, value in exported.items())


def test_judge_more_adds_its_rows_to_the_table(tmp_path: Path) -> None:
    calls: list[tuple[nn.Module, Splits]] = []
    specs = (EpisodeSpec(3, 2, 4), EpisodeSpec(2, 1, 1))

    def judge(trainer: nn.Module, splits: Splits, _: ExperimentConfig) -> ResultTable:
        calls.append((trainer, splits))
        assert not any(part.training for part in trainer.modules())
        return benchmark({"more": trainer}, splits.val, specs, None, 25, 9, timed=False)

    config = replace(BATCHES, data=tiny_splits, run_dir=tmp_path / "run", judge_more=judge)
    table = run(config)
    ((_, splits),) = calls
    assert splits.val is not None
    assert [len(part.class_names) for part in (splits.train, splits.val, splits.test)] == [8, 5, 6]
    plain = run(replace(config, run_dir=tmp_path / "plain", judge_more=None))
    assert table.rows[: len(plain.rows)] == plain.rows
    more = table.rows[len(plain.rows) :]
    assert [(row.method, row.ways, row.shots, row.count, row.seed) for row in more] == [
        ("more", 3, 2, 25, 9),
        ("more", 2, 1, 25, 9),
    ]
    judged = build(config.trainer)
    load_embedder(tmp_path / "run" / "embedder.safetensors", judged.embedder)
    for spec, row in zip(specs, more, strict=True):
        assert row.value == EpisodicEvaluator(spec, 25, 9).evaluate(judged, tiny_splits().val).mean
    _, rows = read_csv(tmp_path / "run" / "figures.csv")
    assert [float(row["value"]) for row in rows] == [row.value for row in table.rows]
    assert "more" in (tmp_path / "run" / "results.md").read_text()


# --- the command line of batches --------------------------------------------------------------------------------------


def batch_line(monkeypatch: pytest.MonkeyPatch, *arguments: str, config: ExperimentConfig = BATCHES) -> ResultTable:
    monkeypatch.setattr(sys, "argv", ["batches", *arguments])
    return main(config)


def test_size_of_batches_can_be_changed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = str(tmp_path / "run")
    table = batch_line(monkeypatch, "--train-spec.per-class", "2", "--run-dir", run_dir, "--seed", "4", "--steps", "3")
    text = (tmp_path / "run" / "config.txt").read_text()
    assert "train_spec = BatchSpec(classes=4, per_class=2, views=1)\n" in text
    assert "steps = 3\n" in text
    expected = run(replace(BATCHES, run_dir=tmp_path / "same", train_spec=BatchSpec(4, 2), seed=4, steps=3))
    assert table.csv() == expected.csv()
    assert same_state(weights_after(tmp_path / "run"), weights_after(tmp_path / "same"))


def test_without_options_the_batches_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(BATCHES, sampler=HARD_ITEMS, loss_lr=0.5, loss_patience=9, augment=RandomAffine())
    table = batch_line(monkeypatch, "--run-dir", str(tmp_path / "line"), config=config)
    assert table.csv() == run(replace(config, run_dir=tmp_path / "run")).csv()
    first, second = (
        re.sub("run_dir = .*", "", (tmp_path / name / "config.txt").read_text()) for name in ("line", "run")
    )
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train-spec.classes", "9"), "error: expected at least 9 classes"),
        (("--train-spec.per-class", "11"), "error: expected at least 11 items"),
        (("--train-spec.views", "2"), "error: expected augmentation for two views"),
    ],
)
def test_bad_batches_of_the_command_line_end_in_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_line(monkeypatch, *arguments)
    assert str(stopped.value.code).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train-spec.classes", "1"), "expected at least 2 classes in a batch, got 1"),
        (("--train-spec.per-class", "0"), "expected per_class to be an integer of at least 1, got 0"),
        (("--train-spec.views", "3"), "expected 1 or 2 views, got 3"),
    ],
)
def test_batches_that_cannot_be_are_refused_as_misspelt_options_are(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_line(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))
    assert list(tmp_path.iterdir()) == []


def test_options_of_episodes_are_none_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_line(monkeypatch, "--train-spec.ways", "3")
    assert stopped.value.code == 2
    assert "--train-spec.ways" in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_help_explains_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_line(monkeypatch, "--help")
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
    for option in ("--train-spec.classes", "--train-spec.per-class", "--train-spec.views", "--eval-spec.ways"):
        assert option in text
    assert "classes in a batch" in text
    assert "items of each class" in text


@pytest.mark.parametrize("sampler", [None, HARD_ITEMS], ids=["drawn", "hard items"])
def test_interrupted_batches_go_on_from_the_command_line(
    sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a memory and a learned distance in the loss: all of it comes from the checkpoint."""
    memory = partial(
        CrossBatchMemory, loss=partial(ContrastiveLoss, 1.0, -1.0, distance=partial(WeightedL1Similarity, 8))
    )
    trainer = partial(MetricTrainer, EMBEDDER, partial(memory, embedding_size=8, memory_size=40))
    config = replace(
        BATCHES, data=tiny_splits, trainer=trainer, sampler=sampler, augment=RandomAffine(), loss_lr=0.05, steps=12
    )

    def cut(trainer: nn.Module, splits: Splits, config: ExperimentConfig) -> ResultTable:
        raise KeyboardInterrupt

    expected = run(replace(config, run_dir=tmp_path / "whole"))
    # the first half of the training, as if it had been interrupted behind its sixth step
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, run_dir=tmp_path / "cut", steps=6, judge_more=cut))
    change_about(tmp_path / "cut", "config", "fields", "steps", value=12)
    change_about(tmp_path / "cut", "config", "fields", "judge_more", value=None)
    table = batch_line(monkeypatch, "--run-dir", str(tmp_path / "cut"), "--resume", config=config)
    assert table.csv() == expected.csv()
    assert same_state(weights_after(tmp_path / "cut"), weights_after(tmp_path / "whole"))


def test_a_folder_of_other_files_is_neither_resumed_nor_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a run, an empty folder or none"):
        run(replace(TINY, run_dir=tmp_path / "run"), resume=True)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_start_that_fails_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trainer = partial(ProtoNetTrainer, embedder=partial(Embedder, trunk=TRUNK), turns=9)
    with pytest.raises(ValueError, match="turns"):
        run(replace(TINY, run_dir=tmp_path / "run", trainer=trainer), resume=True)
    assert (tmp_path / "run").is_dir()


def test_resuming_what_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--resume"], ["--resume", "--run-dir", str(tmp_path / "typo")]):
        monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
        with pytest.raises(SystemExit, match="error: expected the folder of a run to go on with"):
            main(TINY)
    assert not (tmp_path / "typo").exists()


def test_more_figures_get_the_runs_seed_and_number_of_episodes(tmp_path: Path) -> None:
    seen = []

    def more(trainer: ProtoNetTrainer, splits: Splits, config: ExperimentConfig) -> ResultTable:
        seen.append((type(trainer), len(splits.test), config.seed, config.num_episodes))
        return ResultTable()

    run(replace(TINY, run_dir=tmp_path / "run", judge_more=more, seed=4))
    assert seen == [(ProtoNetTrainer, 60, 4, 30)]
