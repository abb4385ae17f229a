"""Ensemble against the cosines of its trunks one by one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pml_fewshot import Conv4, Embedder, Ensemble
from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.embedders.preprocessing import Preprocessing


def test_its_cosine_is_the_mean_of_its_trunks_cosines() -> None:
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    trunks = [Conv4(channels=4), Embedder(nn.Sequential(nn.Flatten(), nn.Linear(256, 7))), partial(Conv4, channels=3)]
    made = Embedder(Ensemble(trunks)).double().eval()
    found = made(images)
    each = [F.normalize(trunk(images), dim=1) for trunk in made.trunk.trunks]
    assert found.shape == (5, 4 + 7 + 3)
    torch.testing.assert_close(found @ found.T, sum(one @ one.T for one in each) / 3)


def test_all_trunks_are_trained() -> None:
    made = Ensemble([partial(Conv4, channels=4), partial(Conv4, channels=4)])
    (made(torch.rand(3, 1, 16, 16)) @ torch.arange(8.0)).sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())
    assert len(list(made.parameters())) == 2 * len(list(Conv4(channels=4).parameters()))


@pytest.mark.parametrize("sizes", [(), (84, 96)])
def test_trunks_of_other_images_and_none_are_refused(sizes: tuple[int, ...]) -> None:
    trunks = [nn.Flatten() for _ in sizes]
    for trunk, size in zip(trunks, sizes, strict=True):
        trunk.preprocessing = Preprocessing(size=(size, size), scale_to=size)
    with pytest.raises(UsageError, match="expected trunks that take images of the same preprocessing"):
        Ensemble(trunks)


def test_a_trunk_alone_is_refused() -> None:
    with pytest.raises(UsageTypeError, match="expected a sequence of trunks, got a Sequential"):
        Ensemble(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_long_embeddings_of_16_bits_keep_their_direction() -> None:
    found = Ensemble([nn.Flatten()]).half()(torch.full((1, 1, 16, 16), 2e4, dtype=torch.float16))
    torch.testing.assert_close(found, torch.full((1, 256), 1 / 16))


def test_it_has_the_preprocessing_of_its_trunks() -> None:
    trunks = [nn.Flatten(), nn.Flatten()]
    for trunk in trunks:
        trunk.preprocessing = Preprocessing(size=(84, 84), scale_to=84)
    assert Embedder(Ensemble(trunks)).preprocessing == trunks[0].preprocessing
    assert Ensemble([nn.Flatten()]).preprocessing is None
