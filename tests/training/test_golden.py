"""A change of code that should change no number leaves these as they are: losses of each trainer's first steps."""

import pytest
import torch

from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.training.fit import fit
from tests.tiny_experiments import TINY_EXPERIMENTS

# of version 0.5, in float32 on one thread: another processor differs in the last digits, and Adam's rate of 0.1 in more
LOSSES = {
    "protonet": [3.86924148, 1.85987365, 1.35846531, 3.90962172, 0.791515887, 0.946927845],
    "matching": [1.84242618, 1.10430169, 1.19573545, 1.23643315, 1.35912907, 1.51212144],
    "siamese": [1.55541098, 1.18991363, 0.696703672, 0.67225498, 0.713651955, 0.786401451],
    "metric": [0.888766289, 0.872595131, 1.34718025, 1.14118385, 1.12778652, 1.19984496],
    "maml": [1.64254057, 1.6174562, 1.58827424, 1.59510469, 1.61945415, 1.55224907],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_losses_are_those_of_0_5(name: str) -> None:
    config = TINY_EXPERIMENTS[name]
    train = config.data().train
    torch.manual_seed(config.seed)
    trainer = instantiate(config.trainer)
    batches: BatchStream | EpisodeStream
    if isinstance(config.train_spec, BatchSpec):
        batches = BatchStream(train, config.train_spec, config.seed, config.augment, config.sampler)
    else:
        batches = EpisodeStream(train, config.train_spec, config.seed, config.augment, config.episodes_per_batch)
    losses: list[float] = []
    trainer.register_forward_hook(lambda module, arguments, loss: losses.append(loss.item()))
    optimizer = config.optimizer(trainer.parameter_groups())
    fit(trainer, batches, optimizer, len(LOSSES[name]), progress=False)
    assert losses == pytest.approx(LOSSES[name], rel=1e-3)
