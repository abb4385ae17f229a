"""fit: it learns, schedules, stops, notices NaN, and resumes bit for bit where it was interrupted."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR

from pml_fewshot.checks import UsageError
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult
from pml_fewshot.io.checkpoint import load_checkpoint, save_checkpoint
from pml_fewshot.sampling.episode_stream import PREFETCH_BATCHES, EpisodeStream
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.fit import LOG_EVERY, fit
from pml_fewshot.training.interruption import TrainingDiverged
from pml_fewshot.training.state import History

SIDE = 4
SPEC = EpisodeSpec(ways=4, shots=1, queries=3)


def tiny_set(classes: int = 10, seed: int = 0, noise: int = 60) -> FewShotDataset:
    """Each class is a pattern of its own with noise upon it: separable, but not before training."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(40, 216, (classes, 1, 1, SIDE, SIDE), generator=generator)
    images = pattern + torch.randint(-noise, noise + 1, (classes, 12, 1, SIDE, SIDE), generator=generator)
    labels = torch.arange(classes).repeat_interleave(12)
    return FewShotDataset(images.clamp(0, 255).byte().flatten(0, 1), labels, [f"class {c}" for c in range(classes)])


DATA = tiny_set()


def make_trainer(seed: int = 0, *layers: nn.Module) -> ProtoNetTrainer:
    torch.manual_seed(seed)
    return ProtoNetTrainer(Embedder(nn.Sequential(nn.Flatten(), *layers, nn.Linear(SIDE * SIDE, 8))))


def stream(seed: int = 0, **options: Any) -> EpisodeStream:
    return EpisodeStream(DATA, SPEC, seed, **options)


quiet_fit = partial(fit, progress=False)


def train(trainer: nn.Module, steps: int, batches: Any = None, lr: float = 0.1, **options: Any) -> History:
    batches = stream() if batches is None else batches
    return quiet_fit(trainer, batches, SGD(trainer.parameters(), lr=lr), steps, **options)


class Losses:
    """Notes every loss of a trainer."""

    def __init__(self, trainer: nn.Module) -> None:
        self.values: list[float] = []
        trainer.register_forward_hook(lambda module, args, loss: self.values.append(loss.item()))


class Script:
    """A validation that gives the accuracies it is told to, and notes mode and weights of the trainer."""

    def __init__(self, trainer: nn.Module, accuracies: list[float]) -> None:
        self.trainer, self.accuracies = trainer, list(accuracies)
        self.weights: list[dict[str, Tensor]] = []
        self.training: list[bool] = []

    def __call__(self) -> EpisodicResult:
        self.weights.append(copy.deepcopy(self.trainer.state_dict()))
        self.training.append(self.trainer.training)
        accuracy = self.accuracies.pop(0) if len(self.accuracies) > 1 else self.accuracies[0]
        return EpisodicResult(accuracy, 0.01, torch.tensor([accuracy]), SPEC, 0, "")


class Rows:
    """A recorder that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def record(self, group: str, step: int, **values: float) -> None:
        self.rows.append((group, step, values))

    def save(self) -> None:
        pass


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_loss_falls_on_a_separable_set() -> None:
    trainer = make_trainer()
    before = EpisodicEvaluator(SPEC, 200).evaluate(trainer, DATA).mean
    history = quiet_fit(trainer, stream(), Adam(trainer.parameters(), lr=0.02), 200)
    assert history.losses[-1][1] < history.losses[0][1] / 2
    assert EpisodicEvaluator(SPEC, 200).evaluate(trainer, DATA).mean > max(before, 0.9)
    assert (history.steps, history.stopped, history.best_step) == (200, "all steps", 200)
    assert history.seconds > 0
    assert not trainer.training


def test_history_holds_the_mean_loss_of_every_window() -> None:
    trainer = make_trainer()
    losses = Losses(trainer)
    history = train(trainer, 50, lr=0.01)
    assert [step for step, _ in history.losses] == [1, 20, 40, 50]
    means = [sum(losses.values[a:b]) / (b - a) for a, b in ((0, 1), (1, 20), (20, 40), (40, 50))]
    assert [loss for _, loss in history.losses] == pytest.approx(means, rel=1e-6)
    assert history.validations == []


def test_any_module_and_any_iterable_of_batches_will_do() -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([3.0]))

        def forward(self, batch: Tensor) -> Tensor:
            return ((self.x - batch) ** 2).sum()

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.tensor(1.0)

    for source in ([torch.tensor(1.0)] * 50, batches()):
        trainer = Quadratic()
        train(trainer, 50, batches=source)
        assert trainer.x.item() == pytest.approx(1, abs=1e-3)


def test_scheduler_is_stepped_after_every_step() -> None:
    trainer, rows = make_trainer(), Rows()
    optimizer = SGD(trainer.parameters(), lr=0.1)
    quiet_fit(trainer, stream(), optimizer, 60, scheduler=StepLR(optimizer, step_size=25, gamma=0.1), recorder=rows)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert [values["learning_rate"] for _, _, values in rows.rows] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def plateau_run(steps: int = 200, accuracies: tuple[float, ...] = (0.5,), **options: Any) -> tuple[History, float]:
    """A training that is validated after every step; its history and the last rate, from 0.01 on."""
    trainer = make_trainer()
    optimizer = SGD(trainer.parameters(), lr=0.01)
    scheduler = ReduceLROnPlateau(optimizer, **options)
    script = Script(trainer, list(accuracies))
    history = quiet_fit(trainer, stream(), optimizer, steps, scheduler=scheduler, validate=script, validate_every=1)
    return history, optimizer.param_groups[0]["lr"]


RISING = tuple(i / 100 for i in range(1, 31))
LOWEST = "learning rate at its lowest"


@pytest.mark.parametrize(
    ("options", "steps", "best_step", "rate", "stopped"),
    [
        # The first is a best; 2 bad ones lower the rate to its lowest (step 3), 2 more ask for less (step 5).
        ({}, 5, 1, 1e-3, LOWEST),
        ({"mode": "max"}, 5, 1, 1e-3, LOWEST),
        ({"steps": 30, "accuracies": RISING}, 30, 30, 1e-2, "all steps"),
        # lowest at step 3, a new best at 5, asks for less at 7
        ({"accuracies": (0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6)}, 7, 5, 1e-3, LOWEST),
        ({"min_lr": 0}, 15, 1, 1e-8, LOWEST),  # torch lowers the rate no more once the change would be below eps
        ({"cooldown": 3}, 8, 1, 1e-3, LOWEST),  # validations 4 to 6 are cooldown, 7 and 8 are bad, 8 asks for less
    ],
)
def test_plateau_lowers_the_rate_and_then_ends_the_training(
    options: dict[str, Any], steps: int, best_step: int, rate: float, stopped: str
) -> None:
    history, last_rate = plateau_run(**{"factor": 0.1, "patience": 1, "min_lr": 1e-3, **options})
    assert last_rate == pytest.approx(rate)
    assert (history.steps, history.best_step, history.stopped) == (steps, best_step, stopped)


def test_best_weights_are_restored() -> None:
    trainer = make_trainer()
    script = Script(trainer, [0.5, 0.8, 0.8])
    history = train(trainer, 10, validate=script, validate_every=4)
    assert history.validations == [(4, 0.5, 0.01), (8, 0.8, 0.01), (10, 0.8, 0.01)]  # the last step too
    assert history.best_step == 8  # of equal ones the first
    assert same_weights(trainer.state_dict(), script.weights[1])
    assert not same_weights(trainer.state_dict(), script.weights[2])


def test_without_validation_the_last_weights_stay() -> None:
    trainer = make_trainer()
    last: list[dict[str, Tensor]] = []
    optimizer = SGD(trainer.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *args: last.append(copy.deepcopy(trainer.state_dict())))
    quiet_fit(trainer, stream(), optimizer, 3)
    assert same_weights(trainer.state_dict(), last[-1])


def test_patience_ends_the_training() -> None:
    trainer = make_trainer()
    script = Script(trainer, [0.5, 0.6, 0.55, 0.6, 0.9])
    history = train(trainer, 100, validate=script, validate_every=3, patience=2)
    assert (history.steps, history.stopped, history.best_step) == (12, "no improvement", 6)
    assert same_weights(trainer.state_dict(), script.weights[1])


def test_validation_happens_in_eval_mode_and_training_continues_in_training_mode() -> None:
    trainer = make_trainer()
    script, modes = Script(trainer, [0.5]), []
    trainer.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    trainer.eval()
    train(trainer, 4, validate=script, validate_every=2)
    assert script.training == [False, False]
    assert modes == [True] * 4


def change_of_one_step(trainer: ProtoNetTrainer, **options: Any) -> dict[str, Tensor]:
    """What one step of plain gradient descent at rate 1 subtracts: the gradient itself."""
    before = {name: p.detach().clone() for name, p in trainer.named_parameters()}
    quiet_fit(trainer, stream(), SGD([p for p in trainer.parameters() if p.requires_grad], lr=1.0), 1, **options)
    return {name: before[name] - p.detach() for name, p in trainer.named_parameters()}


def norm(change: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(c.square().sum()) for c in change.values()))


@pytest.mark.parametrize(("limit", "factor"), [(0.25, 0.25), (2, 1)])
def test_gradient_is_clipped_to_its_norm(limit: float, factor: float) -> None:
    plain = change_of_one_step(make_trainer())
    clipped = change_of_one_step(make_trainer(), clip_norm=limit * norm(plain))
    assert norm(clipped) == pytest.approx(factor * norm(plain), rel=1e-4)
    for name, change in plain.items():
        torch.testing.assert_close(clipped[name], factor * change, rtol=1e-3, atol=1e-6)


def with_nan(step: int, steps: int) -> list[Episode]:
    source = stream()
    batches = [next(source) for _ in range(steps)]
    batches[step - 1].query[0, 0, 0, 0, 0, 0] = float("nan")
    return batches


def assert_finite(checkpoint: Path) -> dict[str, Any]:
    state = load_checkpoint(checkpoint)
    assert all(value.isfinite().all() for value in state["trainer"].values())
    slots = [x for slot in state["optimizer"]["state"].values() for x in slot.values() if isinstance(x, Tensor)]
    assert slots
    assert all(x.isfinite().all() for x in slots)
    return state


def test_nan_loss_raises_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    trainer, path = make_trainer(), tmp_path / "last.pt"
    with pytest.raises(TrainingDiverged, match=r"loss of nan at step 13 \(learning rate 0\.05\) .*; .*last\.pt"):
        quiet_fit(
            trainer, with_nan(13, 30), Adam(trainer.parameters(), lr=0.05), 30, checkpoint=path, checkpoint_every=4
        )
    assert assert_finite(path)["history"]["steps"] == 12  # not 16, when it was noticed
    again = make_trainer(seed=1)
    history = quiet_fit(
        again, iter(with_nan(13, 30)[13:]), Adam(again.parameters(), lr=0.05), 24, checkpoint=path, resume=True
    )
    assert history.steps == 24
    assert all(math.isfinite(loss) for _, loss in history.losses)


def test_nan_is_noticed_within_a_window_and_the_rows_before_it_are_not_lost() -> None:
    trainer, rows = make_trainer(), Rows()
    with pytest.raises(TrainingDiverged, match=r"at step 25 .*none was kept"):
        train(trainer, 40, batches=with_nan(25, 40), lr=0.05, recorder=rows)
    assert [step for _, step, _ in rows.rows] == [1, 20]


def test_nan_weight_after_a_finite_loss_reaches_no_checkpoint(tmp_path: Path) -> None:
    trainer, path, steps = make_trainer(), tmp_path / "last.pt", iter(range(1, 100))
    weight = next(trainer.embedder.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan") if next(steps) == 8 else gradient)
    with pytest.raises(TrainingDiverged, match="NaN or infinite weight after step 8"):
        quiet_fit(trainer, stream(), Adam(trainer.parameters(), lr=0.05), 30, checkpoint=path, checkpoint_every=4)
    assert assert_finite(path)["history"]["steps"] == 4


def test_recorder_gets_the_rows() -> None:
    trainer, rows = make_trainer(), Rows()
    script = Script(trainer, [0.5, 0.7])
    optimizer = SGD(trainer.parameters(), lr=0.05)
    history = quiet_fit(trainer, stream(), optimizer, 45, validate=script, validate_every=30, recorder=rows)
    train = [(step, values) for group, step, values in rows.rows if group == "train"]
    assert [step for step, _ in train] == [1, 20, 30, 40, 45]
    assert [values["loss"] for _, values in train] == [loss for _, loss in history.losses]
    assert all(values.keys() == {"loss", "learning_rate", "skipped", "accuracy"} for _, values in train)
    assert all(values["learning_rate"] == 0.05 and 0 <= values["accuracy"] <= 1 for _, values in train)
    validation = [row for row in rows.rows if row[0] == "validation"]
    assert validation == [
        ("validation", 30, {"accuracy": 0.5, "ci95": 0.01}),
        ("validation", 45, {"accuracy": 0.7, "ci95": 0.01}),
    ]


def test_bar_shows_loss_and_accuracy_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        trainer = make_trainer()
        fit(trainer, stream(), SGD(trainer.parameters(), lr=0.05), 20, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("loss=" in err and "accuracy=" in err) == progress
    assert err == ""


class PowerCut(Exception):
    pass


class CutStream(EpisodeStream):
    """Yields `left` episodes, then there is a power cut."""

    left = 10**9

    def __next__(self) -> Episode:
        if self.left == 0:
            raise PowerCut
        self.left -= 1
        return super().__next__()


def session(
    schedule: Callable[[torch.optim.Optimizer], LRScheduler | ReduceLROnPlateau],
    checkpoint: Path,
    seed: int = 0,
    cut: int = 10**9,
    resume: bool = False,
) -> tuple[ProtoNetTrainer, torch.optim.Optimizer, History]:
    """100 steps with all that has a state: Adam, a scheduler, augmentation, dropout, batch norm, validation."""
    trainer = make_trainer(seed, nn.BatchNorm1d(SIDE * SIDE), nn.Dropout(0.2))
    optimizer = Adam(trainer.parameters(), lr=0.01)
    batches = CutStream(DATA, SPEC, seed, augment=RandomAffine(degrees=5), episodes_per_batch=2)
    batches.left = cut
    validate = partial(EpisodicEvaluator(SPEC, 20).evaluate, trainer, tiny_set(seed=1))
    options = {"validate": validate, "validate_every": 16, "checkpoint": checkpoint, "checkpoint_every": 8}
    history = quiet_fit(trainer, batches, optimizer, 100, scheduler=schedule(optimizer), resume=resume, **options)
    return trainer, optimizer, history


SCHEDULES = {
    "step": partial(StepLR, step_size=30, gamma=0.5),
    "cosine": partial(CosineAnnealingLR, T_max=100),
    "plateau": partial(ReduceLROnPlateau, factor=0.5, patience=0),
}


# in the middle of the first block of episodes, at its very end, and in the middle of the second
CUTS = (30, PREFETCH_BATCHES, PREFETCH_BATCHES + 1, 91)
RESUMED = [*(("cosine", cut) for cut in CUTS), ("step", 30), ("plateau", 91)]


@pytest.mark.parametrize(("schedule", "cut"), RESUMED)
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(schedule: str, cut: int, tmp_path: Path) -> None:
    whole_trainer, whole_optimizer, whole = session(SCHEDULES[schedule], tmp_path / "whole.pt")
    with pytest.raises(PowerCut):
        session(SCHEDULES[schedule], tmp_path / "cut.pt", cut=cut)
    # other seeds: everything must come from the file
    trainer, optimizer, history = session(SCHEDULES[schedule], tmp_path / "cut.pt", seed=99, resume=True)
    assert replace(history, seconds=0) == replace(whole, seconds=0)
    assert same_weights(trainer.state_dict(), whole_trainer.state_dict())
    assert optimizer.param_groups[0]["lr"] == whole_optimizer.param_groups[0]["lr"]
    for slot, expected in zip(optimizer.state.values(), whole_optimizer.state.values(), strict=True):
        assert same_weights(slot, expected)
    last, whole_last = load_checkpoint(tmp_path / "cut.pt"), load_checkpoint(tmp_path / "whole.pt")
    assert same_weights(last["trainer"], whole_last["trainer"])
    assert same_weights(last["best"], whole_last["best"])


def test_finished_training_is_neither_taken_up_again_nor_overwritten(tmp_path: Path) -> None:
    schedule, path = SCHEDULES["step"], tmp_path / "last.pt"
    first, _, history = session(schedule, path, resume=True)  # no file is there yet: it starts from the beginning
    second, _, again = session(schedule, path, seed=99, cut=0, resume=True)
    assert same_weights(first.state_dict(), second.state_dict())
    assert again.losses == history.losses
    assert again.seconds > 0
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"expected no file at .*; pass resume=True"):
        session(schedule, path)
    assert path.read_bytes() == before


def test_modes_set_by_hand_stay(tmp_path: Path) -> None:
    """Batch norm that was put into eval mode is not thawed by the training nor by its validation."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    trainer = ProtoNetTrainer(Embedder(trunk))
    trunk[2].eval()
    script = Script(trainer, [0.5, 0.6])
    train(trainer, 4, validate=script, validate_every=2)
    assert torch.equal(trunk[2].running_mean, torch.zeros(4))


def test_a_diverged_trainer_gets_its_best_weights_back(tmp_path: Path) -> None:
    trainer, path = make_trainer(), tmp_path / "last.pt"
    options = {"validate": Script(trainer, [0.5, 0.6]), "validate_every": 10, "checkpoint": path}
    with pytest.raises(TrainingDiverged, match=r"step 25 .*the last good state is in"):
        train(trainer, 40, batches=with_nan(25, 40), lr=0.05, **options)
    assert all(weight.isfinite().all() for weight in trainer.parameters())
    assert load_checkpoint(path)["history"]["steps"] == 20


def test_resumed_list_of_batches_continues_with_the_next(tmp_path: Path) -> None:
    source = stream()
    batches = [next(source) for _ in range(10)]

    def part(name: str, steps: int, resume: bool) -> dict[str, Tensor]:
        trainer = make_trainer()
        optimizer = SGD(trainer.parameters(), lr=0.1)
        quiet_fit(trainer, batches[:], optimizer, steps, checkpoint=tmp_path / name, resume=resume)
        return trainer.state_dict()

    part("cut.pt", 5, resume=False)
    assert same_weights(part("cut.pt", 10, resume=True), part("whole.pt", 10, resume=False))


def test_patience_counts_over_sessions(tmp_path: Path) -> None:
    def part(accuracies: list[float], steps: int) -> History:
        trainer = make_trainer()
        options = {"validate": Script(trainer, accuracies), "validate_every": 1, "patience": 3, "resume": True}
        return train(trainer, steps, lr=0.01, checkpoint=tmp_path / "last.pt", **options)

    assert part([0.5, 0.4, 0.4], 3).stopped == "all steps"
    history = part([0.4], 10)
    assert (history.steps, history.best_step, history.stopped) == (4, 1, "no improvement")


def test_checkpoint_is_written_at_the_end_and_when_stopped_early(tmp_path: Path) -> None:
    trainer = make_trainer()
    train = partial(quiet_fit, trainer, stream(), SGD(trainer.parameters(), lr=0.01), checkpoint_every=100)
    train(3, checkpoint=tmp_path / "end.pt")
    assert load_checkpoint(tmp_path / "end.pt")["history"]["steps"] == 3
    validation = {"validate": Script(trainer, [0.5, 0.4]), "validate_every": 1, "patience": 1}
    train(100, checkpoint=tmp_path / "stopped.pt", **validation)
    assert load_checkpoint(tmp_path / "stopped.pt")["history"]["stopped"] == "no improvement"


COUNTS = ("steps", "validate_every", "checkpoint_every", "patience", "loss_patience")


def test_too_few_batches_raise() -> None:
    trainer, source = make_trainer(), stream()
    with pytest.raises(ValueError, match="expected 5 batches, got 3; lower steps"):
        train(trainer, 5, batches=[next(source) for _ in range(3)], lr=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"expected {name} to be an integer of at least 1, got 0") for name in COUNTS),
        ({"resume": True}, "expected a checkpoint to resume from, got none"),
        ({"clip_norm": 0.0}, "expected clip_norm above 0, got 0.0"),
        ({"patience": 2, "validate": None}, "expected validate=.* for ReduceLROnPlateau and patience, got none"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    trainer = make_trainer()
    options = {"steps": 5, "validate": Script(trainer, [0.5]), **options}
    with pytest.raises(UsageError, match=message):
        quiet_fit(trainer, stream(), SGD(trainer.parameters(), lr=0.01), **options)


def test_a_checkpoint_is_resumed_only_with_what_it_was_made_with(tmp_path: Path) -> None:
    trainer, path = make_trainer(), tmp_path / "last.pt"
    adam = Adam(trainer.parameters(), lr=0.01)
    quiet_fit(trainer, stream(), adam, 2, checkpoint=path, scheduler=StepLR(adam, 10))
    sgd, again = SGD(trainer.parameters(), lr=0.01), Adam(trainer.parameters(), lr=0.01)
    for optimizer, scheduler in ((sgd, StepLR(sgd, 10)), (again, CosineAnnealingLR(again, 10)), (again, None)):
        with pytest.raises(UsageError, match=r"expected the checkpoint's .*'Adam'.*'StepLR'.*, got"):
            quiet_fit(trainer, stream(), optimizer, 4, scheduler=scheduler, checkpoint=path, resume=True)
    state = load_checkpoint(path)
    for entry, message in (
        ("history", "got one without history"),
        ("format_version", r"got format none \(pml_fewshot 0.5"),
    ):
        save_checkpoint(path, {name: value for name, value in state.items() if name != entry})
        with pytest.raises(UsageError, match=message):
            quiet_fit(trainer, stream(), again, 4, checkpoint=path, resume=True)


def test_a_trainer_without_anything_to_train_is_refused() -> None:
    trainer = make_trainer().requires_grad_(False)
    with pytest.raises(UsageError, match="expected a parameter to train, got none that requires a gradient"):
        quiet_fit(trainer, stream(), SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 1)


def test_broken_checkpoint_raises_before_a_step_is_taken(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    trainer = make_trainer()
    losses = Losses(trainer)
    with pytest.raises(ValueError, match="expected a checkpoint"):
        train(trainer, 5, lr=0.01, checkpoint=tmp_path / "last.pt", resume=True)
    assert losses.values == []


class Valley(nn.Module):
    """Learns from a batch of 1, and finds nothing in one of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 1.0]]))

    def forward(self, batch: Tensor) -> Tensor:
        loss = self.x.square().sum() * batch
        return loss if batch else loss.detach()


def on_and_off(pattern: str) -> list[Tensor]:
    return [torch.tensor(float(digit)) for digit in pattern]


def walk(pattern: str, **options: Any) -> tuple[Valley, Adam, History]:
    trainer = Valley()
    optimizer = Adam(trainer.parameters(), lr=0.1)
    scheduler = options.pop("schedule", lambda optimizer: None)(optimizer)
    steps = options.pop("steps", len(pattern))
    history = quiet_fit(trainer, on_and_off(pattern), optimizer, steps, scheduler=scheduler, **options)
    return trainer, optimizer, history


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=str)
def test_skipped_steps_change_neither_weights_nor_the_state_of_adam(options: dict[str, float]) -> None:
    trainer, optimizer, history = walk("0100110", **options)
    expected, plain, all_learned = walk("111", **options)
    assert torch.equal(trainer.x, expected.x)
    (slot,), (other,) = optimizer.state.values(), plain.state.values()
    assert slot["step"] == 3
    assert same_weights(slot, other)
    assert (history.steps, history.skipped) == (7, 4)
    assert (all_learned.steps, all_learned.skipped) == (3, 0)


def test_skipped_steps_are_steps_for_the_scheduler() -> None:
    _, optimizer, _ = walk("100100", schedule=partial(StepLR, step_size=2, gamma=0.1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)


def test_losses_of_a_window_are_those_that_were_learned_from() -> None:
    trainer, rows = Valley(), Rows()
    losses = Losses(trainer)
    pattern = "1" + "01" * 9 + "0" + "0" * 20 + "1" * 7  # steps 21 to 40 hold nothing
    history = quiet_fit(trainer, on_and_off(pattern), Adam(trainer.parameters(), lr=0.1), 47, recorder=rows)
    learned = [(step, loss) for step, loss in enumerate(losses.values, start=1) if pattern[step - 1] == "1"]
    means = [
        sum(loss for step, loss in learned if a < step <= b) / sum(a < step <= b for step, _ in learned)
        for a, b in ((0, 1), (1, 20), (40, 47))
    ]
    assert [step for step, _ in history.losses] == [1, 20, 47]
    assert [loss for _, loss in history.losses] == pytest.approx(means, rel=1e-6)
    assert [(step, values["skipped"]) for _, step, values in rows.rows] == [(1, 0), (20, 10), (47, 30)]


def test_training_without_anything_to_learn_from_ends_and_can_be_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "last.pt", "resume": True, "checkpoint_every": 2}
    trainer, optimizer, history = walk("0" * 45, **options)
    assert (history.steps, history.skipped, history.losses, history.stopped) == (45, 45, [], "all steps")
    assert torch.equal(trainer.x, Valley().x)
    assert not optimizer.state
    trainer, _, history = walk("0" * 45 + "101", **options)
    assert (history.steps, history.skipped, [step for step, _ in history.losses]) == (48, 46, [46, 48])
    assert torch.equal(trainer.x, walk("11")[0].x)


@pytest.mark.parametrize("cut", [1, 2, 4, 6])
def test_skipped_steps_are_counted_over_sessions(cut: int, tmp_path: Path) -> None:
    pattern = "0110010"
    walk(pattern, steps=cut, checkpoint=tmp_path / "last.pt")
    trainer, _, history = walk(pattern, checkpoint=tmp_path / "last.pt", resume=True)
    assert (history.steps, history.skipped) == (7, 4)
    assert torch.equal(trainer.x, walk("111")[0].x)


def test_a_skipped_step_is_validated_where_one_is_due() -> None:
    trainer, script = make_trainer(), Script(make_trainer(), [0.5, 0.6])
    trainer.register_forward_hook(lambda module, arguments, loss: 0 * loss.detach())
    history = train(trainer, 4, validate=script, validate_every=2)
    assert [step for step, _, _ in history.validations] == [2, 4]
    assert (history.skipped, history.best_step) == (4, 4)


def test_nan_behind_skipped_steps_is_named_by_its_step() -> None:
    trainer = Valley()
    batches = on_and_off("1" + "0" * 22 + "1")
    batches[23] = torch.tensor(float("nan"))
    with pytest.raises(TrainingDiverged, match="loss of nan at step 24"):
        train(trainer, 24, batches=batches, lr=0.01)


class Told(nn.Module):
    """Its loss is what the batch says, and its weight says how many steps it has made: minus their number."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Tensor) -> Tensor:
        return batch + (self.x - self.x.detach()).sum()


# of steps 1 to 20, 21 to 40 and so on
WINDOWS = [5.0, 3.0, 3.5, 3.0, 3.25, 4.0, 3.5, 3.1, 2.0, 2.5]


def told(steps: int = 200, windows: list[float] = WINDOWS, first: float = 6.0, **options: Any) -> tuple[Told, History]:
    trainer = Told()
    batches = [torch.tensor(loss) for loss in windows for _ in range(LOG_EVERY)]
    batches[0] = torch.tensor(first)
    return trainer, train(trainer, steps, batches=batches, lr=1.0, **options)


# the lowest is noted at step 40, and the same loss at 80 is no lower one; at 180 there is one
@pytest.mark.parametrize(
    ("patience", "last"), [(1, 60), (20, 60), (21, 80), (40, 80), (41, 100), (100, 140), (120, 160), (121, 200)]
)
def test_loss_patience_ends_the_training_and_keeps_the_weights_of_the_lowest_loss(patience: int, last: int) -> None:
    trainer, history = told(loss_patience=patience)
    if last < 180:
        assert (history.steps, history.best_step, history.stopped) == (last, 40, "loss no longer falling")
        assert trainer.x.item() == -40
    else:  # a new lowest one just in time; the last 20 steps are not enough to end it
        assert (history.steps, history.best_step, history.stopped) == (200, 180, "all steps")
        assert trainer.x.item() == -180
    assert not trainer.training


def test_without_loss_patience_the_last_weights_stay() -> None:
    trainer, history = told()
    assert (history.steps, history.best_step, trainer.x.item()) == (200, 200, -200)


def test_loss_patience_is_counted_from_the_first_loss() -> None:
    trainer, history = told(windows=[2.0, 2.0, 2.0, 2.0], first=1.0, steps=80, loss_patience=30)
    assert (history.steps, history.best_step, trainer.x.item()) == (40, 1, -1)  # step 1 is noted by itself


def test_weights_of_the_lowest_loss_are_kept_when_all_steps_are_done() -> None:
    trainer, history = told(steps=160, loss_patience=150)
    assert (history.steps, history.best_step, history.stopped) == (160, 40, "all steps")
    assert trainer.x.item() == -40


# a session that ends within the lowest window notes its part
@pytest.mark.parametrize(("cut", "best"), [(1, 40), (20, 40), (30, 30), (40, 40), (47, 40), (60, 40), (79, 40)])
def test_loss_patience_counts_over_sessions(cut: int, best: int, tmp_path: Path) -> None:
    told(cut, loss_patience=40, checkpoint=tmp_path / "last.pt")
    trainer, history = told(loss_patience=40, checkpoint=tmp_path / "last.pt", resume=True)
    assert (history.steps, history.best_step, history.stopped) == (80, best, "loss no longer falling")
    assert trainer.x.item() == -best
    assert load_checkpoint(tmp_path / "last.pt")["trainer"]["x"].item() == -80  # to resume from
    again, once_more = told(loss_patience=40, checkpoint=tmp_path / "last.pt", resume=True)
    assert (once_more.steps, once_more.stopped) == (80, "loss no longer falling")
    assert again.x.item() == -best


@pytest.mark.parametrize(
    ("accuracies", "every", "validated", "best_step"),
    [
        ([0.9, 0.8, 0.7], 30, [30, 60, 80], 30),
        ([0.8, 0.9, 0.7], 30, [30, 60, 80], 60),
        ([0.7, 0.8, 0.9], 30, [30, 60, 80], 80),  # that at the end, too
        ([0.7, 0.8], 40, [40, 80], 80),  # one that is due at the end is made once
    ],
)
@pytest.mark.parametrize("shift", [0, -10])  # a loss below zero is no better than a validation
def test_with_a_validation_its_best_weights_are_kept(
    accuracies: list[float], every: int, validated: list[int], best_step: int, shift: float
) -> None:
    windows, script = [loss + shift for loss in WINDOWS], Script(Told(), accuracies)
    trainer, history = told(windows=windows, first=6.0 + shift, loss_patience=40, validate=script, validate_every=every)
    assert [step for step, _, _ in history.validations] == validated
    assert (history.steps, history.best_step, history.stopped) == (80, best_step, "loss no longer falling")
    assert trainer.x.item() == -best_step


def test_loss_patience_ends_a_training_that_finds_nothing_to_learn_from() -> None:
    """No pair is within the margins any more: no later loss will be lower."""
    _, _, history = walk("1" * 40 + "0" * 400, loss_patience=100)
    assert history.stopped == "loss no longer falling"
    assert (history.steps, history.best_step) == (140, 40)


def test_a_diverged_trainer_gets_the_weights_of_its_lowest_loss_back() -> None:
    trainer = Told()
    batches = [torch.tensor(1.0)] * 30 + [torch.tensor(float("nan"))] * 10
    with pytest.raises(TrainingDiverged, match="step 31"):
        train(trainer, 40, batches=batches, lr=1.0, loss_patience=40)
    assert trainer.x.item() == -1
