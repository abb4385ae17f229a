"""What is frozen stays so: parts by hand through several trainings, parts by option for their first steps; averages."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pml_fewshot.checks import UsageError
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer
from pml_fewshot.training.state import restore_trained
from tests.training.test_fit import DATA, SIDE, SPEC, Script, quiet_fit, same_weights, stream, train


def normalized(seed: int = 0) -> ProtoNetTrainer:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
    return ProtoNetTrainer(Embedder(trunk, nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))))


def norms(trainer: ProtoNetTrainer) -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    return trainer.embedder.trunk[2], trainer.embedder.projection[1]  # type: ignore[return-value]


def moved(norm: nn.BatchNorm1d) -> bool:
    return bool(norm.running_mean.abs().sum() > 0)  # type: ignore[union-attr]


def test_a_batch_norm_frozen_by_hand_stays_so_in_later_trainings_until_it_is_thawed() -> None:
    trainer = normalized()
    frozen, other = norms(trainer)
    frozen.eval()
    evaluator = EpisodicEvaluator(SPEC, 5)
    for use in (lambda: None, trainer.eval, lambda: evaluator.evaluate(trainer, DATA)):
        use()
        train(trainer, 2)
        assert not moved(frozen)
        assert moved(other)
        assert not trainer.training
    frozen.train()
    train(trainer, 2)
    assert moved(frozen)


def test_evaluation_before_and_copies_keep_what_is_frozen() -> None:
    trainer = normalized()
    norms(trainer)[0].eval()
    EpisodicEvaluator(SPEC, 5).evaluate(trainer, DATA)
    copied = copy.deepcopy(trainer.eval())
    for each in (copied, trainer):
        train(each, 2)
        assert [moved(norm) for norm in norms(each)] == [False, True]


def test_a_whole_trainer_in_train_mode_thaws_what_was_frozen() -> None:
    trainer = normalized()
    frozen, _ = norms(trainer)
    frozen.eval()
    train(trainer, 2)
    trainer.train()
    train(trainer, 2)
    assert moved(frozen)


def test_a_trainer_in_eval_mode_is_trained_whole_where_nothing_was_frozen_before() -> None:
    trainer = normalized().eval()
    train(trainer, 2)
    assert all(map(moved, norms(trainer)))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_part_is_frozen_for_its_first_steps_with_its_batch_norm_and_no_gradient() -> None:
    trainer = normalized()
    trunk, before = trainer.embedder.trunk, weights(trainer.embedder)
    seen: list[tuple[bool, bool, bool]] = []
    trainer.register_forward_hook(
        lambda *_: seen.append((trunk[1].weight.requires_grad, trunk[2].training, trunk[3].training))
    )
    optimizer = Adam(trainer.parameters(), 0.1)
    quiet_fit(trainer, stream(), optimizer, 3, frozen={"embedder.trunk": 3})
    now = trainer.embedder.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items() if name.startswith("trunk"))
    assert not torch.equal(now["projection.0.weight"], before["projection.0.weight"])
    assert trunk[1].weight.grad is None
    assert trunk[1].weight.requires_grad
    quiet_fit(trainer, stream(), optimizer, 5, frozen={"embedder.trunk": 3})
    assert seen == [(False, False, False)] * 6 + [(True, True, True)] * 2
    assert moved(trunk[2])
    assert not torch.equal(trainer.embedder.state_dict()["trunk.1.weight"], before["trunk.1.weight"])


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_part_within_a_part_the_longer_time_counts(order: int) -> None:
    trainer = normalized()
    trunk, seen = trainer.embedder.trunk, []
    trainer.register_forward_hook(lambda *_: seen.append((trunk[1].weight.requires_grad, trunk[2].training)))
    frozen = dict([("embedder.trunk", 2), ("embedder.trunk.2", 4)][::order])
    train(trainer, 6, frozen=frozen)
    assert seen == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 2


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a weight to train in the first steps, got embedder, which is all"):
        train(normalized(), 2, frozen={"embedder": 1})


def test_a_resumed_training_thaws_at_the_same_step(tmp_path: Path) -> None:
    def ended(path: Path, *ends: int) -> dict[str, Tensor]:
        for steps in ends:
            trainer = normalized()
            options: dict[str, Any] = {"frozen": {"embedder.trunk": 4}, "checkpoint": path, "resume": True}
            quiet_fit(trainer, stream(), Adam(trainer.parameters(), 0.1), steps, **options)
        return trainer.state_dict()

    whole = ended(tmp_path / "whole.pt", 8)
    for interrupted_at in (2, 4, 6):
        assert same_weights(ended(tmp_path / f"{interrupted_at}.pt", interrupted_at, 8), whole)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"embedder.trunc": 3}, "expected a part to freeze as one of .*; did you mean 'embedder.trunk'"),
        ({"embedder.trunk": 0}, "the steps that embedder.trunk is frozen for to be an integer of at least 1"),
        ({"embedder.trunk.0": 2}, "a part with weights to freeze, got embedder.trunk.0, which has none"),
    ],
)
def test_what_cannot_be_frozen_is_refused(frozen: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(normalized(), 2, frozen=frozen)


def test_own_frozen_weights_stay_frozen_and_an_error_leaves_none() -> None:
    trainer = normalized()
    trainer.embedder.trunk[1].bias.requires_grad_(False)
    train(trainer, 3, frozen={"embedder.trunk": 2})
    flags = {name: weight.requires_grad for name, weight in trainer.named_parameters()}
    assert [name for name, trained in flags.items() if not trained] == ["embedder.trunk.1.bias", "loss.log_scale"]
    with pytest.raises(UsageError, match="expected 3 batches"):
        train(trainer, 3, batches=[next(stream())], frozen={"embedder.trunk": 2})
    assert {name: weight.requires_grad for name, weight in trainer.named_parameters()} == flags


def by_hand(decay: float, steps: int) -> tuple[AveragedModel, list[dict[str, Tensor]]]:
    """torch's own average over a training written out, and the averages after each step."""
    trainer = normalized()
    average = AveragedModel(trainer, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer, batches, seen = SGD(trainer.parameters(), 0.1), stream(), []
    for _ in range(steps):
        optimizer.zero_grad()
        trainer(next(batches)).backward()
        optimizer.step()
        average.update_parameters(trainer)
        seen.append(copy.deepcopy(average.module.state_dict()))
    return average, seen


def test_a_training_validates_keeps_and_ends_with_the_average(tmp_path: Path) -> None:
    average, seen = by_hand(0.8, 6)
    torch.manual_seed(1)
    trainer = normalized()
    script, path = Script(trainer, [0.5, 0.9, 0.7]), tmp_path / "last.pt"
    history = train(trainer, 6, ema=0.8, validate=script, validate_every=2, checkpoint=path)
    assert history.best_step == 4
    for found, step in zip(script.weights, (2, 4, 6), strict=True):
        assert same_weights(found, seen[step - 1])
    assert same_weights(trainer.state_dict(), seen[3])
    assert same_weights(load_checkpoint(path)["average"], average.state_dict())
    other = normalized(3)
    restore_trained(other, load_checkpoint(path))
    assert same_weights(other.state_dict(), seen[3])
    alone = normalized()
    train(alone, 6, ema=0.8)  # without a validation it ends with the last average
    assert same_weights(alone.state_dict(), average.module.state_dict())


def test_an_average_resumes_exactly_and_a_run_without_one_does_not_take_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ema": 0.9, "resume": True}
    for path, ends in ((tmp_path / "whole.pt", (9,)), (tmp_path / "parts.pt", (4, 9))):
        for steps in ends:
            trainer = normalized()
            train(trainer, steps, checkpoint=path, **options)
        other = normalized(5)
        restore_trained(other, load_checkpoint(path))
        assert same_weights(other.state_dict(), trainer.state_dict())
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert same_weights(whole["average"], parts["average"])
    assert same_weights(whole["trainer"], parts["trainer"])
    with pytest.raises(UsageError, match=r"expected the checkpoint's .*average.*; pass what the run had"):
        train(normalized(), 12, checkpoint=tmp_path / "parts.pt", resume=True)


def test_no_average_of_a_share_out_of_range_or_of_weights_without_a_shape() -> None:
    for share in (0.0, 1.0, -1):
        with pytest.raises(UsageError, match="expected ema between 0 and 1"):
            train(normalized(), 2, ema=share)
    lazy = SiameseTrainer(normalized().embedder, PairVerificationLoss(distance=WeightedL1Similarity()))
    with pytest.raises(UsageError, match="weights of known shape for an average, got a lazy one"):
        train(lazy, 2, ema=0.9)
