"""What would fail after the training fails before it, at little cost and without a trace in what is trained."""

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, ProxyAnchorLoss, SoftTripleLoss
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, PolynomialLR

from pml_fewshot import (
    Embedder,
    MatchingTrainer,
    MetricTrainer,
    ProtoNetTrainer,
    RetrievalTester,
    benchmark,
    run,
)
from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.experiment import prepare as preparing
from pml_fewshot.experiment import run as module
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.sampling.episodes import EpisodeSpec
from tests.tiny_experiments import EMBEDDER, TINY_EXPERIMENTS, Finished, rows_of, tiny_set, tiny_splits

TINY = replace(TINY_EXPERIMENTS["protonet"], steps=4, scheduler=None)
METRIC = replace(TINY_EXPERIMENTS["metric"], steps=4, sampler=None)


class Careless(ProtoNetTrainer):
    """Its `classify` works for the validation's episodes alone."""

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        assert support.shape[1] != 3, "no episodes of three, please"
        return super().classify(support, query)


class Remembers(nn.Linear):
    """Its state holds more than tensors."""

    def get_extra_state(self) -> Any:
        return "a text"

    def set_extra_state(self, state: Any) -> None:
        pass


def more(trainer: Any, splits: Any, config: ExperimentConfig) -> Any:
    return benchmark({"more": trainer}, splits, [EpisodeSpec(50, 1, 1)], None, config.num_episodes)


def broken(trainer: Any, splits: Any, config: ExperimentConfig) -> Any:
    raise KeyError("a user's own mistake")


def loss(kind: Any, **options: Any) -> Any:
    return partial(MetricTrainer, EMBEDDER, partial(kind, num_classes=8, **options))


LATE: dict[str, tuple[ExperimentConfig, type[Exception], str]] = {
    "k": (replace(TINY, retrieval=partial(RetrievalTester, k=60)), UsageError, "k of at most 59"),
    "metric's k": (replace(TINY, retrieval=RetrievalTester("recall_at_60")), UsageError, "got 60 for recall_at_60"),
    "k too small": (replace(TINY, retrieval=RetrievalTester(k=1)), UsageError, "expected k of at least 9"),
    "index": (replace(TINY, retrieval=RetrievalTester(index="IVF4096,Flat")), UsageError, "an index and parameters"),
    "parameters": (replace(TINY, retrieval=RetrievalTester(index="ivf", parameters="nprob=3")), UsageError, "nprob"),
    "an index by a distance that it does not know": (
        replace(TINY_EXPERIMENTS["siamese"], retrieval=RetrievalTester(index="hnsw")),
        UsageError,
        "expected Euclidean distance, cosine or dot product",
    ),
    "ways": (replace(TINY, eval_specs=(*TINY.eval_specs, EpisodeSpec(7, 1, 1))), UsageError, "at least 7 classes"),
    "queries": (
        replace(TINY, eval_specs=(*TINY.eval_specs, EpisodeSpec(3, 1, 10))),
        UsageError,
        r"11 items .* in class 'c0'",
    ),
    "a trainer's classify": (
        replace(TINY, trainer=partial(Careless, EMBEDDER), eval_specs=(*TINY.eval_specs, EpisodeSpec(3, 1, 2))),
        AssertionError,
        "no episodes of three",
    ),
    "more evaluations": (replace(TINY, extra_evaluations=more), UsageError, "at least 50 classes"),
    "a user's evaluation": (replace(TINY, extra_evaluations=broken), KeyError, "a user's own mistake"),
    "export": (
        replace(
            TINY, trainer=partial(ProtoNetTrainer, partial(Embedder, partial(nn.Flatten), partial(Remembers, 16, 4)))
        ),
        UsageError,
        "only tensors in the state",
    ),
    "a part to freeze": (replace(TINY, frozen={"embedder.trunc": 3}), UsageError, r"did you mean 'embedder\.trunk'"),
    "a part with a rate": (replace(TINY, part_lr={"embeder": 0.1}), UsageError, "did you mean 'embedder'"),
    "one rate for all": (
        replace(TINY, loss_lr=1.0, scheduler=partial(OneCycleLR, max_lr=0.01)),
        UsageError,
        r"keeps loss_lr=1\.0 and part_lr=None, got OneCycleLR",
    ),
    "class weights": (
        replace(METRIC, trainer=loss(ArcFaceLoss, embedding_size=9)),
        UsageError,
        "embedding_size of ArcFaceLoss, got 8",
    ),
    "proxies": (replace(METRIC, trainer=loss(ProxyAnchorLoss, embedding_size=9)), UsageError, "ProxyAnchorLoss, got 8"),
    "centers": (replace(METRIC, trainer=loss(SoftTripleLoss, embedding_size=9)), UsageError, "SoftTripleLoss, got 8"),
    "context": (
        replace(TINY, trainer=partial(MatchingTrainer, EMBEDDER, context=partial(FullContext, 9))),
        UsageError,
        r"support of shape \(E, W, K, 9\)",
    ),
    "a trunk of another object": (
        replace(TINY, trainer=partial(ProtoNetTrainer, partial(Embedder, partial(nn.Identity)))),
        UsageError,
        r"embeddings of shape \(B, D\), got shape \(2, 1, 4, 4\)",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_it_is_told_before_the_first_step_and_nothing_is_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kind, message = LATE[name]
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(kind, match=message):
        run(replace(config, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_part_that_cannot_be_copied_for_each_run_is_refused(tmp_path: Path) -> None:
    class Locked(RetrievalTester):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle '_thread.lock' object")

    with pytest.raises(UsageError, match=r"a retrieval that each run can copy, got one that cannot be \(cannot pickle"):
        run(replace(TINY, retrieval=Locked(), run_dir=tmp_path / "run"))


def careless(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())) / 2  # noqa: NPY002


class Drawing(ProtoNetTrainer):
    """Its `classify` draws from all global generators."""

    def classify(self, support: Tensor, query: Tensor) -> Tensor:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return super().classify(support, query)


@pytest.mark.parametrize("name", [*TINY_EXPERIMENTS, "drawing"])
def test_trying_leaves_no_trace_in_what_is_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = replace(TINY_EXPERIMENTS["protonet"], trainer=partial(Drawing, EMBEDDER), augment=careless)
    config = replace(drawing if name == "drawing" else TINY_EXPERIMENTS[name], steps=6)
    table = run(replace(config, run_dir=tmp_path / "tried"))
    monkeypatch.setattr(preparing, "rehearse", lambda *_: None)
    assert repr(run(replace(config, run_dir=tmp_path / "not tried")).rows) == repr(table.rows)
    tried, not_tried = ((tmp_path / name / "train.csv").read_text() for name in ("tried", "not tried"))
    assert tried == not_tried


def test_few_images_are_embedded_and_two_episodes_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sets hold: 30 classes of 10 images."""
    seen: list[int] = []

    class Counting(nn.Flatten):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    many = partial(tiny_set, classes=30)
    config = replace(TINY, trainer=partial(ProtoNetTrainer, partial(Embedder, partial(Counting))), val_episodes=1000)
    preparing.prepare(
        replace(config, data=lambda: type(tiny_splits())(many("a", seed=0), many("b", seed=1), many("c", seed=2)))
    )
    assert sum(seen) <= 20


def test_a_bare_trunk_and_wrapped_embedders_are_trained_and_exported_to_plain_names(tmp_path: Path) -> None:
    plain = partial(nn.Sequential, partial(nn.Flatten), partial(nn.Linear, 16, 8))
    kinds: dict[str, Any] = {
        "bare": plain,
        "parallel": partial(nn.DataParallel, partial(Embedder, plain)),
        "compiled": partial(torch.compile, partial(Embedder, plain), backend="eager"),
        "plain": partial(Embedder, plain),
    }
    rows, weights = {}, {}
    for name, embedder in kinds.items():
        table = run(replace(TINY, trainer=partial(ProtoNetTrainer, embedder), run_dir=tmp_path / name))
        rows[name] = [row.value for row in table.rows]
        bytes_ = (tmp_path / name / "embedder.safetensors").read_bytes()
        weights[name] = bytes_
    assert rows["bare"] == rows["parallel"] == rows["compiled"] == rows["plain"]
    assert weights["parallel"] == weights["compiled"] == weights["plain"] != weights["bare"]


def test_rates_by_part_frozen_parts_and_averages_are_fields_of_a_config(tmp_path: Path) -> None:
    config = replace(TINY, frozen={"embedder.trunk": 2}, part_lr={"embedder.trunk": 0.02}, loss_lr=0.5, ema=0.9)
    run(replace(config, run_dir=tmp_path / "run"))
    (*_, last) = rows_of(tmp_path / "run", "train")
    assert (last["learning_rate_embedder_trunk"], last["learning_rate_loss"]) == (0.02, 0.5)
    assert "average" in load_checkpoint(tmp_path / "run" / "last.pt")
    run(replace(config, frozen={"embedder.trunk": 9}, run_dir=tmp_path / "frozen"))
    state = load_checkpoint(tmp_path / "frozen" / "last.pt")["trainer"]
    assert not any(state[name].abs().sum() for name in state if name.endswith("running_mean"))


@pytest.mark.parametrize(
    ("scheduler", "last"),
    [
        (CosineAnnealingLR, 0.05 * (1 - 2**-0.5)),  # the fourth step of four: cos(3 pi / 4)
        (partial(PolynomialLR, power=1.0), 0.025),
        (partial(LinearLR, start_factor=1.0, end_factor=0.2), 0.04),
        (partial(OneCycleLR, max_lr=0.1), None),
        (partial(PolynomialLR, total_iters=8), 0.0625),
    ],
)
def test_the_steps_are_filled_in_where_a_schedule_wants_them(
    scheduler: Any, last: float | None, tmp_path: Path
) -> None:
    run(replace(TINY, scheduler=scheduler, run_dir=tmp_path / "run"))
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run", "train")]
    if last is not None:
        assert rates[-1] == pytest.approx(last, rel=2e-3)
    assert len(set(rates)) > 1


def test_a_schedule_of_ones_own_keeps_its_defaults(tmp_path: Path) -> None:
    def linear(optimizer: Any, total_iters: int = 2) -> LinearLR:
        return LinearLR(optimizer, 1.0, 0.5, total_iters)

    run(replace(TINY, scheduler=linear, run_dir=tmp_path / "run"))
    assert rows_of(tmp_path / "run", "train")[-1]["learning_rate"] == pytest.approx(0.05)


@pytest.mark.parametrize("optimizer", [LBFGS, partial(LBFGS, lr=1.0)])
def test_an_optimizer_with_a_closure_is_refused_when_the_config_is_made(optimizer: Any) -> None:
    with pytest.raises(UsageError, match="expected an optimizer whose step needs no closure, got LBFGS"):
        replace(TINY, optimizer=optimizer)


class Kept:
    """A recorder of one's own."""

    made: ClassVar[list["Kept"]] = []

    def __init__(self, folder: Path, project: str) -> None:
        self.folder, self.project, self.rows, self.calls = folder, project, [], []
        Kept.made.append(self)

    def record(self, group: str, step: int, **values: float) -> None:
        self.rows.append((group, step, values["accuracy"]))

    def save(self) -> None:
        self.calls.append("save")

    def forget_after(self, step: int, groups: Any) -> None:
        self.calls.append(f"forget after {step}")

    def close(self) -> None:
        self.calls.append("close")


def test_another_recorder_gets_what_the_folder_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "made", [])
    config = replace(TINY, run_dir=tmp_path / "run", recorder=partial(Kept, project="mine"))
    run(config)
    run(replace(config, steps=8), resume=True)
    first, second = Kept.made
    assert (first.folder, first.project) == (tmp_path / "run", "mine")
    assert (first.calls[0], first.calls[-1], second.calls[0]) == ("forget after 0", "close", "forget after 4")
    for group in ("train", "validation"):
        stored = [(group, row["step"], row["accuracy"]) for row in rows_of(tmp_path / "run", group)]
        assert [row for row in (*first.rows, *second.rows) if row[0] == group] == stored


def test_what_a_divergence_message_advises_can_be_done_on_resuming(tmp_path: Path) -> None:
    config = replace(TINY, optimizer=partial(SGD, lr=0.1, momentum=0.9), scheduler=CosineAnnealingLR)
    run(replace(config, steps=4, run_dir=tmp_path / "run"))
    lower = replace(config, optimizer=partial(SGD, lr=0.01, momentum=0.9), clip_norm=1.0, retries=2, steps=8)
    run(replace(lower, run_dir=tmp_path / "run"), resume=True)
    rates = {row["step"]: row["learning_rate"] for row in rows_of(tmp_path / "run", "train")}
    by_hand = CosineAnnealingLR(SGD([nn.Parameter(torch.ones(1))], 0.01), 8)
    expected = []
    for _ in range(8):
        expected.append(by_hand.get_last_lr()[0])
        by_hand.optimizer.step()
        by_hand.step()
    assert rates[8] == pytest.approx(expected[7])
    text = (tmp_path / "run" / "config.txt").read_text()
    for name in ("optimizer", "clip_norm", "retries", "steps"):
        assert re.search(rf"^after step 4: {name} is .*, was .*$", text, re.MULTILINE), name
    with pytest.raises(UsageError, match=r"expected the checkpoint's .*SGD.*, got .*Adam.*; pass what the run had"):
        run(replace(lower, optimizer=Adam, steps=9, run_dir=tmp_path / "run"), resume=True)


def test_a_second_phase_continues_where_a_trained_instance_is(finished: Finished, tmp_path: Path) -> None:
    """An instance in a config is copied for each run: the caller's own stays as it is."""
    assert finished.config.trainer is not None
    trainer = ProtoNetTrainer(EMBEDDER(), head=partial(nearest, factor=2.0))
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    tables = [run(replace(TINY, trainer=trainer, run_dir=tmp_path / str(n))) for n in range(2)]
    assert repr(tables[0].rows) == repr(tables[1].rows)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state_dict().items())
    assert tables[0].rows[0].classifier.startswith("nearest(factor=2.0) by LpDistance")


def nearest(support: Tensor, query: Tensor, distance: Any, factor: float) -> Tensor:
    return -factor * torch.cdist(query, support.mean(dim=2))
