"""run: what a run folder holds, what a config's options do, errors before any training, runs that are continued."""

import csv
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss, NTXentLoss, SelfSupervisedLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import FixedSetOfTriplets, MPerClassSampler, TuplesToWeightsSampler
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from pml_fewshot import BatchSpec, BatchStream, EpisodeSpec, EpisodicEvaluator, MetricTrainer, ProtoNetTrainer
from pml_fewshot.checks import ExistingFileError, UsageError
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset, Splits
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig, swap
from pml_fewshot.experiment.prepare import _on_device_if_small
from pml_fewshot.experiment.run import run
from pml_fewshot.experiment.run_folder import check_same, read_config
from pml_fewshot.io.checkpoint import load_checkpoint, load_embedder, save_checkpoint
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.fit import fit
from pml_fewshot.training.interruption import TrainingDiverged
from pml_fewshot.training.schedule import lower_learning_rate
from tests.killing import digest
from tests.tiny_experiments import EMBEDDER, TINY_EXPERIMENTS, Finished, rows_of, tiny, tiny_set, tiny_splits

SPECS = (EpisodeSpec(ways=5, shots=1, queries=5), EpisodeSpec(ways=5, shots=5, queries=5))
PLAIN = partial(Embedder, trunk=partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 8)))
ADAM = partial(Adam, lr=0.01)
TINY = replace(
    tiny("tiny", trainer=partial(ProtoNetTrainer, embedder=PLAIN), optimizer=ADAM, eval_specs=SPECS, augment=None),
    steps=4,
    validate_every=2,
)


def no_validation() -> Splits:
    return Splits(tiny_set("a", 8, 0), None, tiny_set("c", 6, 2))


BATCHES = replace(TINY, data=no_validation, trainer=partial(MetricTrainer, PLAIN), train_spec=BatchSpec(4, 3))
HARD_ITEMS = partial(TuplesToWeightsSampler, miner=MultiSimilarityMiner(), dataloader_num_workers=0)
TWO_VIEWS = partial(SelfSupervisedLoss, loss=NTXentLoss)


def state_of(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "last.pt")


def rates(folder: Path) -> list[float]:
    return [row["learning_rate"] for row in rows_of(folder, "train")]


def test_run_folder_holds_what_is_promised(finished: Finished) -> None:
    files = {path.name for path in finished.folder.iterdir()} - {"tensorboard", ".lock", "results.tex"}
    about = {"config.txt", "config.json", "logs.db", "train.csv", "validation.csv", "last.pt", "embedder.safetensors"}
    assert files == about | {"results.csv", "results.md", "figures.csv", "values.npz"}
    train, validation = (rows_of(finished.folder, group) for group in ("train", "validation"))
    assert (train[0]["step"], train[-1]["step"]) == (1, 24)
    assert train[0].keys() >= {"loss", "learning_rate", "accuracy"}
    assert [row["step"] for row in validation] == [4, 8, 12, 16, 20, 24]
    assert state_of(finished.folder)["history"]["steps"] == 24


def test_files_of_the_table_have_its_figures_at_full_precision(finished: Finished) -> None:
    assert ResultTable.read(finished.folder).rows == finished.table.rows
    (line,) = csv.DictReader((finished.folder / "results.csv").read_text().splitlines())
    assert float(line["5way_1shot_5query"]) == finished.table.rows[0].value
    assert (finished.folder / "results.md").read_text() == str(finished.table)
    row = finished.table.rows[0]
    assert (row.method, row.ways, row.shots, row.queries, row.count, row.seed) == ("protonet", 5, 1, 5, 30, 0)
    assert (row.split, row.classes, row.note, row.protocol) == ("test", 6, "made up", "inductive")
    figures = ["accuracy", "precision_at_1", "r_precision", "mean_average_precision_at_r"]
    assert [row.figure for row in finished.table.rows] == figures
    assert all(0 <= row.value <= 1 and row.ci95 > 0 for row in finished.table.rows)
    assert all(row.seconds is None for row in finished.table.rows)  # a run that is repeated gives the same files


def test_config_txt_names_what_the_run_was_made_with(finished: Finished) -> None:
    text = (finished.folder / "config.txt").read_text()
    for field in fields(ExperimentConfig):
        assert re.search(rf"^{field.name} = .", text, re.MULTILINE), field.name
    spec, train = "EpisodeSpec(ways=5, shots=1, queries=3)\n", "FewShotDataset(80 images of 1x4x4, 8 classes, made up)"
    for line in ("seed = 7\n", f"train_spec = {spec}", f"train = {train}, checksum "):
        assert line in text
    for package in ("torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy"):
        assert re.search(rf"^{package} \d+\.\d+", text, re.MULTILINE), package
    assert re.search(r"^git commit ([0-9a-f]{40}(-dirty)?|unknown .*)$", text, re.MULTILINE)
    assert re.search(r"^python 3\.\d+\.\d+ on .*\nthreads \d+\ndevice cpu$", text, re.MULTILINE)
    assert " at 0x" not in text


def test_without_a_run_dir_the_folder_is_named_by_experiment_and_seed(tmp_path: Path) -> None:
    run(replace(TINY, seed=5))
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_seed5", folder.name)
    assert (folder / "results.csv").is_file()


def test_the_same_seed_gives_the_same_files_whatever_was_drawn_before(tmp_path: Path) -> None:
    config = swap(TINY, loss=PrototypicalLoss(learn_scale=True))  # an instance, which two runs must not share
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(ord(name))
        run(replace(config, run_dir=tmp_path / name, seed=seed))
    for file in ("results.csv", "results.md", "figures.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "figures.csv").read_bytes() != (tmp_path / "c" / "figures.csv").read_bytes()
    assert digest(state_of(tmp_path / "a")["trainer"]) == digest(state_of(tmp_path / "b")["trainer"])
    assert state_of(tmp_path / "a")["trainer"]["loss.log_scale"] != 0
    assert config.trainer.keywords["loss"].log_scale == 0


def test_parts_get_the_arguments_that_they_still_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load(root: Path, some: int = 3) -> Splits:
        given.append(root)
        return tiny_splits()

    def trainer(num_classes: int) -> ProtoNetTrainer:
        given.append(num_classes)
        return instantiate(TINY.trainer)

    variants: list[dict[str, Any]] = [
        {"data": partial(load, some=4)},
        {"data": load, "data_root": Path("given")},
        {"data": partial(load, root=Path("mine")), "data_root": Path("given")},
        {"trainer": trainer},
        {"trainer": trainer, "train_on_validation": True},
    ]
    for number, options in enumerate(variants):
        run(replace(TINY, steps=1, run_dir=tmp_path / str(number), **options))
    monkeypatch.setenv("PML_FEWSHOT_DATA", "variable")
    run(replace(TINY, steps=1, run_dir=tmp_path / "run", data=load))
    assert given == [Path("data"), Path("given"), Path("mine"), 8, 13, Path("variable")]

    cosine = replace(TINY, steps=6, validate_every=3)
    run(replace(cosine, run_dir=tmp_path / "steps", scheduler=CosineAnnealingLR))
    # the rate that the step itself was made with: 0.005 (1 + cos(pi (step - 1) / 6)) at steps 1, 3 and 6
    assert rates(tmp_path / "steps") == pytest.approx([0.01, 0.0075, 0.005 * (1 - 3**0.5 / 2)])
    run(replace(cosine, run_dir=tmp_path / "own", scheduler=partial(LambdaLR, lr_lambda=partial(max, 0.5))))
    assert rates(tmp_path / "own") == pytest.approx([0.005, 0.02, 0.05])  # its arguments are not called


def test_retrieval_ranks_by_the_distance_of_the_loss_or_its_own(tmp_path: Path) -> None:
    base = replace(swap(TINY, loss=partial(PrototypicalLoss, distance=CosineSimilarity(), scale=10)), steps=1)

    def figures(retrieval: Any) -> list[float]:
        table = run(replace(base, run_dir=tmp_path / str(len(list(tmp_path.iterdir()))), retrieval=retrieval))
        return [row.value for row in table.rows if row.ways is None]

    tester = RetrievalTester()
    from_the_loss = figures(tester)
    assert tester.distance is None
    assert from_the_loss == figures(RetrievalTester)
    assert from_the_loss == figures(partial(RetrievalTester, distance=partial(CosineSimilarity)))
    assert from_the_loss != figures(partial(RetrievalTester, distance=LpDistance(normalize_embeddings=False)))
    assert figures(None) == []


@pytest.mark.parametrize(
    "config",
    [
        BATCHES,
        replace(BATCHES, trainer=partial(SiameseTrainer, PLAIN), augment=RandomAffine(), seed=3),
        replace(BATCHES, sampler=partial(MPerClassSampler, m=3, batch_size=12, length_before_new_iter=24)),
        replace(BATCHES, sampler=HARD_ITEMS),
        replace(swap(BATCHES, loss=TWO_VIEWS), train_spec=BatchSpec(4, 3, views=2), augment=RandomAffine()),
    ],
    ids=["plain", "siamese", "m per class", "hard items", "two views"],
)
def test_run_on_batches_is_the_training_made_by_hand(config: ExperimentConfig, tmp_path: Path) -> None:
    table = run(replace(config, run_dir=tmp_path / "run", steps=6))
    torch.manual_seed(config.seed)
    trainer = instantiate(config.trainer)
    settings = (config.train_spec, config.seed, config.augment, config.sampler, trainer.embedder)
    fit(trainer, BatchStream(no_validation().train, *settings), ADAM(trainer.parameters()), 6, progress=False)
    assert digest(state_of(tmp_path / "run")["trainer"]) == digest(trainer.state_dict())
    result = EpisodicEvaluator(SPECS[0], 30, seed=config.eval_seed).evaluate(trainer, tiny_splits().test)
    assert (result.mean, result.episodes_hash) == (table.rows[0].value, table.rows[0].episodes_hash)


def test_skipped_steps_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_class_and_two(labels: Any) -> list[int]:
        return [30, 31, 32, 33, 34, 35, 0, 1, 2, 10, 11, 12]  # ten images of each class

    config = replace(swap(BATCHES, loss=NTXentLoss), train_spec=BatchSpec(2, 3), sampler=one_class_and_two)
    table = run(replace(config, run_dir=tmp_path / "run"))
    assert "2 steps skipped: nothing to learn from in their batches" in capsys.readouterr().out
    assert "2 of 4 training steps skipped" in table.rows[0].note


def test_loss_lr_is_the_rate_of_the_loss_alone(tmp_path: Path) -> None:
    config = replace(swap(BATCHES, loss=partial(ArcFaceLoss, 8, 8)), optimizer=partial(SGD, lr=0.1), steps=1)
    torch.manual_seed(config.seed)
    before = {name: weight.detach().clone() for name, weight in instantiate(config.trainer).named_parameters()}

    def change(loss_lr: float | None) -> dict[str, torch.Tensor]:
        run(replace(config, loss_lr=loss_lr, run_dir=tmp_path / str(loss_lr)))
        return {name: state_of(tmp_path / str(loss_lr))["trainer"][name] - weight for name, weight in before.items()}

    one, three, none = change(None), change(0.3), change(0.0)
    assert {name.split(".")[0] for name, step in one.items() if step.any()} == {"embedder", "loss"}
    for name, step in one.items():
        for other, factor in ((three, 3), (none, 0)):
            expected = factor * step if name.startswith("loss.") else step
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6)


def test_a_one_cycle_schedule_gets_the_steps_and_may_not_override_loss_lr(tmp_path: Path) -> None:
    config = replace(swap(BATCHES, loss=partial(ArcFaceLoss, 8, 8)), loss_lr=0.2, run_dir=tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"expected a scheduler that keeps loss_lr=0\.2 and part_lr=None, got OneCycleLR"
    ):
        run(replace(config, scheduler=partial(OneCycleLR, max_lr=0.1)))
    scheduler = partial(OneCycleLR, max_lr=[0.1, 1.0])
    for name, steps in (("run", 4), ("run", 8), ("at once", 8)):
        run(replace(config, scheduler=scheduler, steps=steps, run_dir=tmp_path / name), resume=True)
    longer, at_once = (state_of(tmp_path / name)["optimizer"] for name in ("run", "at once"))
    assert longer["param_groups"] == at_once["param_groups"]
    assert longer["param_groups"][1]["lr"] == pytest.approx(10 * longer["param_groups"][0]["lr"])


def test_training_on_validation_classes_leaves_none_and_extra_evaluations_add_rows(tmp_path: Path) -> None:
    seen: list[Any] = []

    def more(trainer: nn.Module, splits: Splits, config: ExperimentConfig) -> ResultTable:
        assert not any(part.training for part in trainer.modules())
        seen.append((len(splits.train.class_names), len(splits.test.class_names), config.seed, config.num_episodes))
        return benchmark({"more": trainer}, splits.val, [EpisodeSpec(3, 2, 4)], None, 25, 9, timed=False)

    thirteen = EpisodeSpec(ways=13, shots=1, queries=3)  # 8 classes of train and 5 of val
    config = replace(TINY, run_dir=tmp_path / "run", train_on_validation=True, train_spec=thirteen, seed=4)
    table = run(replace(config, extra_evaluations=more))
    assert not (tmp_path / "run" / "validation.csv").exists()
    assert state_of(tmp_path / "run")["best"] is None
    assert seen == [(8, 6, 4, 2), (8, 6, 4, 30)]  # tried before the training, with 2 episodes
    *rows, row = table.rows
    assert {row.note for row in rows} == {"made up; trained on train and val classes"}
    assert (row.method, row.ways, row.count, row.seed) == ("more", 3, 25, 9)
    trainer = instantiate(config.trainer)
    load_embedder(tmp_path / "run" / "embedder.safetensors", trainer.embedder)
    assert row.value == EpisodicEvaluator(EpisodeSpec(3, 2, 4), 25, 9).evaluate(trainer, tiny_splits().val).mean
    assert ResultTable.read(tmp_path / "run").rows == table.rows


def test_a_finished_run_gives_its_table_at_once_and_is_not_written_over(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in finished.folder.iterdir() if path.name != ".lock"]  # filelock 3.16 empties it
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    monkeypatch.setattr("pml_fewshot.experiment.run.prepare", lambda _: pytest.fail("nothing is left to do"))
    assert run(finished.config, resume=True).rows == finished.table.rows
    assert str(finished.table) in capsys.readouterr().out
    with pytest.raises(ExistingFileError, match=r"expected a new or empty run folder, got .*; name another"):
        run(finished.config)
    assert times() == before


def test_a_trained_run_is_evaluated_otherwise_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, run_dir=tmp_path / "run", retrieval=partial(RetrievalTester, metrics=("recall_at_100",)))
    with pytest.raises(UsageError, match="k of at most"):  # there are 60 test images
        run(config)
    assert not (tmp_path / "run").exists()  # before any step
    monkeypatch.setattr("pml_fewshot.experiment.prepare.rehearse", lambda *_: None)
    with pytest.raises(UsageError, match="k of at most"):
        run(config)
    weights = digest(state_of(tmp_path / "run")["trainer"])
    specs, tester = (SPECS[0], EpisodeSpec(ways=3, shots=1, queries=5)), RetrievalTester(("recall_at_10",))
    other = replace(config, retrieval=tester, eval_specs=specs, num_episodes=np.int64(50), clip_norm=1.0)
    alone = run(replace(other, run_dir=tmp_path / "other", clip_norm=None))
    forward = ProtoNetTrainer.forward
    monkeypatch.setattr(ProtoNetTrainer, "forward", lambda *_: pytest.fail("it is trained already"))
    assert run(other, resume=True).rows == alone.rows
    assert digest(state_of(tmp_path / "run")["trainer"]) == weights
    changed = {line.split()[3]: line for line in read_config(tmp_path / "run")["changes"]}
    assert changed.keys() == {"eval_specs", "num_episodes", "retrieval", "clip_norm"}
    assert changed["clip_norm"] == "after step 4: clip_norm is 1.0, was None"
    assert f"\n{changed['clip_norm']}\n" in (tmp_path / "run" / "config.txt").read_text()
    monkeypatch.setattr(ProtoNetTrainer, "forward", forward)
    with pytest.raises(UsageError, match=r"got another eval_specs\[0\];"):  # which validation uses
        run(replace(other, eval_specs=SPECS[1:]), resume=True)


def test_more_steps_train_a_finished_run_longer(tmp_path: Path) -> None:
    """Without a schedule as if it had had them from the start: 4 is a multiple of validate_every."""
    config = replace(TINY, optimizer=partial(SGD, lr=0.1, momentum=0.9))
    run(replace(config, run_dir=tmp_path / "run"))
    longer = run(replace(config, run_dir=tmp_path / "run", steps=8), resume=True)
    assert longer.rows == run(replace(config, run_dir=tmp_path / "at once", steps=8)).rows
    first, second = (state_of(tmp_path / name) for name in ("run", "at once"))
    assert digest({**first, "history": None}) == digest({**second, "history": None})
    assert "steps = 8\n" in (tmp_path / "run" / "config.txt").read_text()
    assert [row["step"] for row in rows_of(tmp_path / "run", "validation")] == [2, 4, 6, 8]
    with pytest.raises(UsageError, match=r"at least the 8 steps that the run in .* has made, got 6; raise --steps"):
        run(replace(config, run_dir=tmp_path / "run", steps=6), resume=True)


def test_a_schedule_over_the_steps_follows_the_curve_of_the_new_number(tmp_path: Path) -> None:
    config = replace(TINY, scheduler=CosineAnnealingLR, run_dir=tmp_path / "run", validate_every=1)
    run(config)
    state = state_of(tmp_path / "run")
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0)
    run(replace(config, steps=8), resume=True)
    curve = [0.005 * (1 + torch.tensor(step * torch.pi / 12).cos().item()) for step in range(12)]
    assert rates(tmp_path / "run")[4:] == pytest.approx([0.005, 3.08658e-3, 1.464466e-3, 3.80602e-4], rel=1e-5)
    state = state_of(tmp_path / "run")
    lower_learning_rate(state)  # as after a NaN
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    run(replace(config, steps=12), resume=True)
    assert rates(tmp_path / "run")[8:] == pytest.approx([rate / 2 for rate in curve[8:]])
    assert state_of(tmp_path / "run")["history"]["retries"] == 1


def test_a_field_that_a_later_version_adds_is_compared_with_its_default(finished: Finished) -> None:
    stored = read_config(finished.folder)
    del stored["config"]["bf16"], stored["config"]["loss_lr"]
    check_same(finished.config, stored, finished.folder, ())
    with pytest.raises(UsageError, match=r"expected the config of the run in .*, got another loss_lr; make it as"):
        check_same(replace(finished.config, loss_lr=2.0), stored, finished.folder, ())


class BrokenOnce(ProtoNetTrainer):
    """Its loss is NaN at the steps in `at`, each time once."""

    at: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__(instantiate(EMBEDDER))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.at and self.calls == self.at[0]:
            self.at.pop(0)
            return super().forward(batch) * torch.nan
        return super().forward(batch)


def test_a_nan_returns_to_the_checkpoint_with_half_the_rate_and_before_the_first_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("broken", trainer=BrokenOnce, optimizer=partial(SGD, lr=0.08), retries=2, steps=12)
    monkeypatch.setattr(BrokenOnce, "at", [1])
    with pytest.raises(TrainingDiverged, match="step 1 "):
        run(replace(config, run_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(BrokenOnce, "at", [5, 10])
    run(replace(config, run_dir=tmp_path / "run"))
    assert "back to step 4 with half the learning rate" in capsys.readouterr().out
    state = state_of(tmp_path / "run")
    assert (state["history"]["steps"], state["history"]["retries"]) == (12, 2)
    by_step = {row["step"]: row["learning_rate"] for row in rows_of(tmp_path / "run", "train")}
    assert by_step == pytest.approx({1: 0.08, 3: 0.08, 4: 0.08, 6: 0.04, 8: 0.04, 9: 0.04, 12: 0.02})
    monkeypatch.setattr(BrokenOnce, "at", [5, 7, 9])
    with pytest.raises(TrainingDiverged, match="learning rate"):
        run(replace(config, run_dir=tmp_path / "often"))
    assert state_of(tmp_path / "often")["history"]["retries"] == 2
    assert not (tmp_path / "often" / "results.csv").exists()
    monkeypatch.setattr(BrokenOnce, "at", [9])
    with pytest.raises(TrainingDiverged):  # what was counted survives the process
        run(replace(config, run_dir=tmp_path / "often"), resume=True)


def other_test_images() -> Splits:
    test = tiny_splits().test
    return replace(tiny_splits(), test=FewShotDataset(test.images.repeat(1, 3, 1, 1), test.labels, test.class_names))


NOT_EXPORTABLE = type("NotExportable", (nn.Flatten,), {"get_extra_state": lambda self: 3, "set_extra_state": print})
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (TINY, {"eval_specs": (SPECS[0], EpisodeSpec(7, 1, 5))}, "at least 7 classes .* got 6"),
        (TINY, {"eval_specs": (EpisodeSpec(5, 5, 6),)}, "at least 11 items"),
        (TINY, {"eval_specs": (EpisodeSpec(6, 1, 5),)}, "at least 6 classes .* got 5"),  # of validation
        (TINY, {"train_spec": EpisodeSpec(9, 1, 5)}, "at least 9 classes .* got 8"),
        (TINY, {"retrieval": partial(RetrievalTester, metrics=("precsion_at_1",))}, "precision_at_1"),
        (TINY, {"patience": 2, "train_on_validation": True}, "validat"),
        (TINY, {"trainer": partial(TINY.trainer, support_rotations=5)}, "at most 4 support_rotations"),
        (TINY, {"trainer": partial(ProtoNetTrainer, partial(Embedder, NOT_EXPORTABLE()))}, "extra_state"),
        (TINY, {"trainer": partial(ProtoNetTrainer)}, "embedder"),
        (TINY, {"data": other_test_images}, "mat1 and mat2"),
        pytest.param(TINY, {"device": "cuda"}, "expected a CUDA device for device='cuda', got none", marks=NO_CUDA),
        (TINY_EXPERIMENTS["maml"], {"eval_specs": (EpisodeSpec(6, 1, 5),), "train_on_validation": True}, "outputs"),
        (BATCHES, {"train_spec": BatchSpec(9, 2)}, "at least 9 classes .* got 8"),
        (BATCHES, {"train_spec": BatchSpec(4, 3, views=2)}, "augmentation|two views"),
        (BATCHES, {"sampler": partial(FixedSetOfTriplets, num_triplets=3)}, "at least 12 items from FixedSetOf"),
        (swap(BATCHES, loss=partial(ArcFaceLoss, 7, 8)), {"train_spec": BatchSpec(8, 2)}, "7"),
        (BATCHES, {"loss_patience": 0}, "loss_patience"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_raise_before_any_training_and_leave_nothing(
    config: ExperimentConfig, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, TypeError, RuntimeError), match=message):
        run(replace(config, run_dir=tmp_path / "run", **wrong))
    assert list(tmp_path.iterdir()) == []


def test_data_too_large_for_the_gpu_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_set("a", 8, 0)  # 1,280 bytes
    monkeypatch.setattr(FewShotDataset, "to", lambda self, device: "moved")
    for free, device, expected in ((5119, "cuda", dataset), (5120, "cuda", "moved"), (9999, "cpu", dataset)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 0))
        assert _on_device_if_small(dataset, torch.device(device)) == expected
