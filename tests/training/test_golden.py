"""A change of code that should change no number leaves these as they are: losses of each trainer's first steps."""

import pytest
import torch
from torch import nn

from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.training.fit import fit
from tests.tiny_experiments import TINY_EXPERIMENTS

# of version 0.5's code without dropout, in float32 on one thread: another processor differs in the last digits, and
# Adam's rate of 0.1 in more
LOSSES = {
    "protonet": [2.62264347, 0.736901641, 0.776204228, 1.0985955, 0.554690421, 0.630946457],
    "matching": [1.82524359, 1.06692886, 1.07011151, 1.32614005, 1.37729967, 1.43925774],
    "siamese": [1.32820177, 1.05692208, 0.617900789, 0.63658911, 0.682574272, 0.720540226],
    "metric": [0.749179184, 0.888097346, 1.28856337, 1.09915745, 1.1088829, 0.997208416],
    "maml": [1.64254057, 1.6174562, 1.58827424, 1.59510469, 1.61945415, 1.55224907],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_losses_are_those_of_0_5(name: str) -> None:
    config = TINY_EXPERIMENTS[name]
    train = config.data().train
    torch.manual_seed(config.seed)
    trainer = instantiate(config.trainer)
    for module in trainer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what it draws differs between versions of torch
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
