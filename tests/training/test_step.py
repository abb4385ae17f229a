"""What a step needs: a loss that some weight has led to, an optimizer that takes its gradient; and what it records."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.training.step import check_optimizer
from tests.training.test_fit import DATA, SIDE, Rows, make_trainer, quiet_fit, stream, train


class Detached(nn.Module):
    """Somewhere on the way the graph is lost."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(SIDE * SIDE, 8), how

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layer(images.flatten(1))
        return torch.from_numpy(self.layer(images.flatten(1)).detach().numpy())


@pytest.mark.parametrize("how", ["no_grad", "numpy"])
def test_a_loss_without_a_graph_is_no_empty_batch(how: str) -> None:
    trainer = ProtoNetTrainer(Embedder(Detached(how)))
    with pytest.raises(
        UsageError, match=r"a loss that depends on weights to train, got \d.* without a gradient; look for"
    ):
        train(trainer, 5)


def test_an_embedder_that_no_gradient_reaches_beside_a_loss_that_learns_is_told() -> None:
    trainer = ProtoNetTrainer(Embedder(Detached("no_grad")), PrototypicalLoss(scale=10, learn_scale=True))
    with pytest.warns(UserWarning, match="no gradient reached embedder in the first step: it is not trained"):
        train(trainer, 3)


def test_frozen_weights_alone_and_a_nan_without_a_graph_are_no_empty_batches_either() -> None:
    trainer = make_trainer(0, nn.Linear(SIDE * SIDE, SIDE * SIDE))
    trainer.register_parameter("unused", nn.Parameter(torch.ones(1)))
    for weight in trainer.embedder.parameters():
        weight.requires_grad_(False)
    with pytest.raises(UsageError, match="without a gradient"):
        train(trainer, 5)
    trainer.register_forward_hook(lambda module, given, loss: loss * torch.nan)
    with pytest.raises(UsageError, match="got nan without a gradient"):
        train(trainer, 5)


@pytest.mark.parametrize("optimizer", [LBFGS, partial(LBFGS, lr=1.0).func, LBFGS([nn.Parameter(torch.ones(1))])])
def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(optimizer: object) -> None:
    with pytest.raises(UsageError, match="an optimizer whose step needs no closure, got LBFGS; take one that"):
        check_optimizer(optimizer)
    with pytest.raises(UsageError, match="got LBFGS"):
        quiet_fit(trainer := make_trainer(), [], LBFGS(trainer.parameters()), 3)


def test_an_optimizer_of_other_weights_is_refused_and_one_of_some_is_taken() -> None:
    trainer = make_trainer()
    with pytest.raises(UsageError, match="an optimizer of the trainer's parameters, got one that has none of them"):
        quiet_fit(trainer, stream(), SGD(make_trainer().parameters(), 0.1), 3)
    quiet_fit(trainer, stream(), SGD([next(trainer.parameters()), nn.Parameter(torch.ones(1))], 0.1), 3)


def test_adam_and_optimizers_with_a_closure_for_those_who_want_one_are_taken() -> None:
    check_optimizer(Adam)
    check_optimizer(SGD([nn.Parameter(torch.ones(1))], 0.1))


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        trainer = make_trainer()
        with pytest.raises(UsageError, match="weights that can be trained, got some made in inference mode"):
            quiet_fit(trainer, stream(), SGD(trainer.parameters(), 0.1), 3)


def test_a_rate_is_recorded_for_each_group() -> None:
    trainer, rows = make_trainer(), Rows()
    first, *rest = trainer.parameters()
    groups = [{"params": [first], "lr": 0.2}, {"params": rest, "lr": 0.3, "name": "embedder.trunk"}]
    quiet_fit(trainer, stream(), SGD(groups, 0.1), 2, recorder=rows)
    _, _, values = rows.rows[-1]
    assert (values["learning_rate"], values["learning_rate_embedder_trunk"]) == (0.2, 0.3)
    rows.rows.clear()
    quiet_fit(trainer, stream(), SGD([{"params": [first]}, {"params": rest, "lr": 0.3}], 0.1), 2, recorder=rows)
    assert rows.rows[-1][2]["learning_rate_1"] == 0.3


def test_a_data_loader_gives_batches() -> None:
    losses = []
    for batches in (DataLoader(DATA, 40), [(DATA.images.float() / 255, DATA.labels)[:2] for _ in range(3)]):
        trainer = MetricTrainer(Embedder(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8))))
        losses.append(quiet_fit(trainer, batches, SGD(trainer.parameters(), 0.1), 3).losses)
    assert all(loss > 0 for run in losses for _, loss in run)
