"""Learning rates on resuming: those of the caller's optimizer and scheduler, as if they had been so from the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from pml_fewshot.checks import UsageError
from pml_fewshot.io.checkpoint import load_checkpoint, save_checkpoint
from pml_fewshot.training.schedule import lower_learning_rate
from tests.training.test_fit import Script, make_trainer, quiet_fit, same_weights, stream

SHORT, LONG = 6, 12


def sequential(optimizer: Optimizer, steps: int) -> LRScheduler:
    return SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=3), CosineAnnealingLR(optimizer, steps - 3)], milestones=[3]
    )


def chained(optimizer: Optimizer, steps: int) -> LRScheduler:
    return ChainedScheduler([LinearLR(optimizer, total_iters=steps), ExponentialLR(optimizer, 0.9)])


def by_function(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Its function is in no state."""
    return LambdaLR(optimizer, lambda step: 1 - step / steps)


def by_factors(optimizer: Optimizer, steps: int) -> LRScheduler:
    return MultiplicativeLR(optimizer, lambda step: 1 - 1 / steps)


SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps, eta_min=1e-3),
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1),
    "polynomial": lambda optimizer, steps: PolynomialLR(optimizer, steps, power=2.0),
    "steps": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 3, steps // 2], gamma=0.3),
    "sequential": sequential,
    "chained": chained,
    "function": by_function,
    "factors": by_factors,
}


def trained(path: Path, steps: int, make: Any, lr: float = 0.1, resume: bool = False, **options: Any) -> list[float]:
    """Trains with a schedule over `steps` and returns the rates of all steps made."""
    trainer = make_trainer()
    optimizer = SGD(trainer.parameters(), lr, momentum=0.9)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    until, options = options.pop("until", steps), {"checkpoint": path, "resume": resume, **options}
    quiet_fit(trainer, stream(), optimizer, until, scheduler=make(optimizer, steps), **options)
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_steps_go_on_the_curve_of_the_new_length_and_the_same_steps_exactly(name: str, tmp_path: Path) -> None:
    make = SCHEDULES[name]
    whole = trained(tmp_path / "whole.pt", LONG, make)
    assert len(set(whole)) >= 3
    short = trained(tmp_path / "longer.pt", SHORT, make)
    longer = trained(tmp_path / "longer.pt", LONG, make, resume=True)
    assert len(short) == SHORT
    assert longer[-(LONG - SHORT) :] == pytest.approx(
        whole[SHORT:], rel=1e-9
    )  # (one more: the step that moves nothing)
    trained(tmp_path / "same.pt", LONG, make, until=SHORT)
    assert trained(tmp_path / "same.pt", LONG, make, resume=True)[-(LONG - SHORT) :] == whole[SHORT:]


def cyclic(optimizer: Optimizer, steps: int) -> LRScheduler:
    return CyclicLR(optimizer, base_lr=0.02, max_lr=0.2, step_size_up=4)


@pytest.mark.parametrize("name", [*SCHEDULES, "cyclic"])
def test_a_retry_halves_all_rates_to_come(name: str, tmp_path: Path) -> None:
    make = {**SCHEDULES, "cyclic": cyclic}[name]
    whole = trained(tmp_path / "whole.pt", LONG, make)
    trained(tmp_path / "last.pt", LONG, make, until=SHORT)
    state = load_checkpoint(tmp_path / "last.pt")
    lower_learning_rate(state)
    save_checkpoint(tmp_path / "last.pt", state)
    after = trained(tmp_path / "last.pt", LONG, make, resume=True)[-(LONG - SHORT) :]
    floor = 1e-3 if name == "cosine" else 0.0  # eta_min is no rate but a limit
    assert after == pytest.approx([rate / 2 for rate in whole[SHORT:]], rel=1e-6, abs=floor)


def test_a_lower_rate_is_the_callers_with_a_schedule_or_without(tmp_path: Path) -> None:
    for name, make in (("none", lambda *_: None), ("cosine", SCHEDULES["cosine"])):
        path = tmp_path / f"{name}.pt"
        trained(path, LONG, make, until=SHORT)
        lower = trained(path, LONG, make, lr=0.01, resume=True)
        expected = trained(tmp_path / f"{name} from the start.pt", LONG, make, lr=0.01)
        assert lower[-(LONG - SHORT) :] == pytest.approx(expected[SHORT:], rel=1e-9)


def test_a_plateau_keeps_what_it_has_seen_and_takes_what_it_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"validate_every": 1, "checkpoint": tmp_path / "last.pt", "resume": True}
    for patience, steps, rate in ((9, 4, 0.1), (4, 5, 0.1), (4, 6, 0.05)):
        trainer = make_trainer()
        optimizer = SGD(trainer.parameters(), 0.1)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
        script = Script(trainer, [0.9, 0.5] if steps == 4 else [0.5])
        quiet_fit(trainer, stream(), optimizer, steps, scheduler=scheduler, validate=script, **options)
        assert scheduler.best == pytest.approx(0.1)  # the error of the very first validation
        assert optimizer.param_groups[0]["lr"] == rate  # 5 bad ones in all, and 4 of patience


def test_objects_that_have_made_steps_go_on_by_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer()
    optimizer = Adam(trainer.parameters(), 0.1)
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    for steps in (4, 8):
        quiet_fit(
            trainer, stream(), optimizer, steps, scheduler=scheduler, checkpoint=tmp_path / "last.pt", resume=True
        )
    other = make_trainer()
    alone = Adam(other.parameters(), 0.1)
    quiet_fit(other, stream(), alone, 8, scheduler=StepLR(alone, 2, gamma=0.5))
    assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"] == 0.1 / 16
    assert same_weights(trainer.state_dict(), other.state_dict())


def test_another_number_of_groups_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "last.pt", SHORT, lambda *_: None)
    trainer = make_trainer()
    first, *rest = trainer.parameters()
    optimizer = SGD([{"params": [first]}, {"params": rest}], 0.1, momentum=0.9)
    with pytest.raises(UsageError, match=r"expected the checkpoint's .*'SGD'.*, got .*'SGD of 2 groups'"):
        quiet_fit(trainer, stream(), optimizer, LONG, checkpoint=tmp_path / "last.pt", resume=True)
