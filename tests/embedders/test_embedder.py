"""Embedder: forward, encode, and what encode leaves as it was."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, UsageTypeError
from pml_fewshot.data.dataset import FewShotDataset
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import CPU_BATCH, Embedder
from pml_fewshot.embedders.image_trunk import ImageTrunk
from pml_fewshot.embedders.modes import train_mode
from tests.embedders.formulas import noise, weights_of


def random_dataset(count: int = 10, size: int = 16) -> FewShotDataset:
    images = noise(count, 1, size, size, dtype=torch.float32).mul(256).byte()
    return FewShotDataset(images, torch.arange(count) % 3, list("abc"))


def used(**options: object) -> Embedder:
    """A small embedder whose batch norms have seen other images."""
    torch.manual_seed(0)
    embedder = Embedder(partial(Conv4, channels=8), **options)  # type: ignore[arg-type]
    for seed in range(3):
        embedder(noise(8, 1, 16, 16, seed=seed, dtype=torch.float32) * 0.7)
    return embedder


class Means(nn.Module):
    """A trunk without parameters that gives the mean of an image and remembers the batches it saw."""

    def __init__(self, poison: float | None = None) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.poison = poison

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.float32
        means = images.mean(dim=(1, 2, 3)).unsqueeze(1)
        return means if self.poison is None else torch.where(images[:, 0, 0, :1] == 1, self.poison, means)


def test_forward_is_trunk_then_projection_then_normalization():
    torch.manual_seed(0)
    trunk, projection = Conv4(channels=8), nn.Linear(8, 5)
    images = noise(6, 1, 16, 16, dtype=torch.float32)
    plain = trunk(images)
    torch.testing.assert_close(Embedder(trunk)(images), plain)
    torch.testing.assert_close(Embedder(trunk, projection)(images), projection(plain))
    both = Embedder(trunk, projection, normalize=True)(images)
    torch.testing.assert_close(both, projection(plain) / projection(plain).norm(dim=1, keepdim=True))
    assert Embedder(trunk).trunk is trunk


def test_a_trunk_that_gives_maps_and_parts_that_are_no_modules_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"\(B, D\), got shape \(2, 4, 8, 8\) from Conv2d; end the trunk with"):
        Embedder(nn.Conv2d(1, 4, 1))(torch.zeros(2, 1, 8, 8))
    with pytest.raises(UsageTypeError, match=r"expected a module as trunk, got .*Conv4"):
        Embedder(Conv4)  # type: ignore[arg-type]
    with pytest.raises(UsageTypeError, match=r"expected a module as projection, got .*Linear"):
        Embedder(Conv4(), nn.Linear)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"projection": partial(nn.Linear, 8, 5), "normalize": True}])
def test_encode_equals_forward_in_eval_mode(options: dict[str, object]):
    embedder, dataset = used(**options), random_dataset()
    bank, by_three = embedder.encode(dataset), embedder.encode(dataset, 3)
    expected = embedder.eval()(dataset.images.float() / 255)  # with gradients: nothing is folded
    torch.testing.assert_close(bank.embeddings, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_three.embeddings, bank.embeddings)
    assert torch.equal(bank.labels, dataset.labels)
    assert bank.fingerprint() == bank.source == dataset.fingerprint()
    assert not bank.embeddings.requires_grad


def test_every_image_is_embedded_once_in_order():
    means, dataset = Means(), random_dataset()
    bank = Embedder(means).encode(dataset, batch_size=4)
    assert means.batches == [4, 4, 2]
    torch.testing.assert_close(bank.embeddings[:, 0], dataset.images.double().mean(dim=(1, 2, 3)).float() / 255)
    Embedder(means).encode(random_dataset(2 * CPU_BATCH + 1, size=1))
    assert means.batches[3:] == [CPU_BATCH, CPU_BATCH, 1]


@pytest.mark.parametrize("training", [True, False])
def test_modes_weights_and_random_state_are_as_before(training: bool):
    embedder, dataset = used().train(training), random_dataset()
    embedder.trunk.blocks[0].train(not training)  # as where a user froze a part
    modes, before = [module.training for module in embedder.modules()], weights_of(embedder)
    random_state, images = torch.get_rng_state(), dataset.images.clone()
    embedder.encode(dataset)
    assert [module.training for module in embedder.modules()] == modes
    with pytest.raises(UsageError, match="at least 16 x 16 pixels"):
        embedder.encode(random_dataset(size=8))
    assert [module.training for module in embedder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(dataset.images, images)
    assert all(parameter.requires_grad for parameter in embedder.parameters())


@pytest.mark.gpu
def test_encode_on_another_device_leaves_the_embedder_where_it_was():
    embedder, dataset = used(), random_dataset()
    bank = embedder.encode(dataset, device="cuda")
    assert bank.embeddings.is_cuda
    assert bank.labels.is_cuda
    assert embedder.device == torch.device("cpu")
    torch.testing.assert_close(bank.embeddings.cpu(), embedder.encode(dataset).embeddings, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_without_a_finite_embedding_are_counted_and_a_wrong_batch_size_is_refused(bad: float):
    dataset = random_dataset()
    dataset.images[:, 0, 0, 0] = 0
    dataset.images[[2, 5, 9], 0, 0, 0] = 255
    with pytest.raises(UsageError, match="got NaN or infinity in 3 of 10 rows, first in row 2"):
        Embedder(Means(bad)).encode(dataset, batch_size=3)
    with pytest.raises(UsageError, match="batch_size"):
        used().encode(random_dataset(), batch_size=0)


def test_frozen_parts_are_not_trained_and_stay_in_eval_mode_whatever_mode_the_rest_is_in():
    for frozen, parts in ((True, [0, 1, 2, 3]), (["blocks.0", "blocks.2"], [0, 2]), ("blocks.1", [1]), ((), [])):
        embedder = Embedder(Conv4(channels=4), nn.Linear(4, 2), frozen=frozen)
        for _ in range(2):
            for number, block in enumerate(embedder.trunk.blocks):
                assert block.norm.training is (number not in parts)
                assert all(weight.requires_grad is (number not in parts) for weight in block.parameters())
            nn.Sequential(embedder).eval().train()
        assert embedder.projection.training
        assert embedder.projection.weight.requires_grad
        before = weights_of(embedder)
        with train_mode(embedder):
            embedder(noise(4, 1, 16, 16, dtype=torch.float32))
        moved = [
            not torch.equal(b.norm.running_mean, before[f"trunk.blocks.{n}.norm.running_mean"])
            for n, b in enumerate(embedder.trunk.blocks)
        ]
        assert moved == [number not in parts for number in range(4)]
    with pytest.raises(UsageError, match=r"a part of the trunk to freeze .*did you mean 'blocks.0'"):
        Embedder(Conv4(), frozen=["block.0"])


def test_stored_images_are_refused_as_they_would_be_taken_for_floats():
    trunk = ImageTrunk(nn.Flatten(), [0.5], [0.5], None, "flat", pretrained=False)
    for method in (trunk.normalized, Embedder(nn.Flatten())):
        with pytest.raises(UsageTypeError, match=r"floats from 0 to 1, got torch\.uint8; take floats from"):
            method(random_dataset().images)
