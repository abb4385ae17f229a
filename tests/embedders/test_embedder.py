"""Embedder and EmbeddingBank: forward, encode, and what encode leaves as it was."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import CPU_BATCH, Embedder


def made_up(count: int = 10, size: int = 16) -> FewShotDataset:
    images = torch.randint(
        0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return FewShotDataset(images, torch.arange(count) % 3, list("abc"))


def used(**options: object) -> Embedder:
    """A small embedder whose batch norms have seen other images."""
    torch.manual_seed(0)
    embedder = Embedder(partial(Conv4, channels=8), **options)  # type: ignore[arg-type]
    for seed in range(3):
        embedder(torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 0.7)
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
        assert images.min() >= 0
        assert images.max() <= 1
        means = images.mean(dim=(1, 2, 3)).unsqueeze(1)
        if self.poison is not None:
            means = torch.where(images[:, 0, 0, :1] == 1, self.poison, means)
        return means


def test_forward_is_trunk_then_projection_then_normalisation():
    torch.manual_seed(0)
    trunk, projection = Conv4(channels=8), nn.Linear(8, 5)
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = trunk(images)
    torch.testing.assert_close(Embedder(trunk)(images), plain)
    torch.testing.assert_close(Embedder(trunk, projection)(images), projection(plain))
    both = Embedder(trunk, projection, normalize=True)(images)
    torch.testing.assert_close(both, projection(plain) / projection(plain).norm(dim=1, keepdim=True))
    torch.testing.assert_close(both.norm(dim=1), torch.ones(6))
    assert Embedder(trunk).trunk is trunk


def test_factories_are_built():
    embedder = Embedder(partial(Conv4, channels=8), partial(nn.Linear, 8, 5))
    assert isinstance(embedder.trunk, Conv4)
    assert embedder(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))).shape == (4, 5)


def test_a_trunk_that_gives_maps_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"embeddings of shape \(B, D\), got shape \(2, 4, 8, 8\) from Conv2d; end the trunk with"
    ):
        Embedder(nn.Conv2d(1, 4, 1))(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("options", [{}, {"projection": partial(nn.Linear, 8, 5), "normalize": True}])
def test_encode_equals_forward_in_eval_mode(options: dict[str, object]):
    embedder, dataset = used(**options), made_up()
    bank = embedder.encode(dataset)
    expected = embedder.eval()(dataset.images.float() / 255)  # with gradients: nothing is folded
    torch.testing.assert_close(bank.embeddings, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(bank.labels, dataset.labels)
    assert not bank.embeddings.requires_grad


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, None])
def test_the_batch_size_changes_nothing(batch_size: int | None):
    embedder, dataset = used(), made_up()
    whole = embedder.encode(dataset, batch_size=10).embeddings
    torch.testing.assert_close(embedder.encode(dataset, batch_size).embeddings, whole, rtol=0, atol=1e-5)


def test_every_image_is_embedded_once_in_order():
    means, dataset = Means(), made_up()
    bank = Embedder(means).encode(dataset, batch_size=4)
    assert means.batches == [4, 4, 2]
    torch.testing.assert_close(bank.embeddings[:, 0], dataset.images.double().mean(dim=(1, 2, 3)).float() / 255)
    large = made_up(2 * CPU_BATCH + 1, size=1)
    means.batches.clear()
    Embedder(means).encode(large)
    assert means.batches == [CPU_BATCH, CPU_BATCH, 1]


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_and_random_state_are_as_before(training: bool):
    embedder, dataset = used().train(training), made_up()
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    random_state, images = torch.get_rng_state(), dataset.images.clone()
    embedder.encode(dataset)
    assert all(module.training == training for module in embedder.modules())
    assert embedder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(dataset.images, images)
    assert embedder.device == torch.device("cpu")
    assert all(parameter.requires_grad for parameter in embedder.parameters())


def test_the_mode_is_as_before_when_a_trunk_fails():
    class Fails(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    embedder = Embedder(Fails()).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        embedder.encode(made_up())
    assert embedder.training
    assert embedder.trunk.training


def test_a_part_frozen_in_eval_mode_stays_so():
    embedder = used().train()
    embedder.trunk.blocks[0].eval()
    embedder.encode(made_up())
    assert embedder.training
    assert not embedder.trunk.blocks[0].norm.training
    assert embedder.trunk.blocks[1].norm.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_without_a_finite_embedding_are_counted(bad: float):
    dataset = made_up()
    dataset.images[:, 0, 0, 0] = 0
    dataset.images[[2, 5, 9], 0, 0, 0] = 255
    with pytest.raises(
        ValueError, match=r"expected finite embeddings, got NaN or infinity in 3 of 10 rows, first in row 2"
    ):
        Embedder(Means(bad)).encode(dataset, batch_size=3)


def test_weights_that_are_nan_are_noticed():
    embedder = used()
    with torch.no_grad():
        embedder.trunk.blocks[3].norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="in 10 of 10 rows, first in row 0"):
        embedder.encode(made_up())
    assert embedder.training


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0])
def test_a_wrong_batch_size_is_refused(wrong: object):
    with pytest.raises(ValueError, match="expected batch_size to be an integer of at least 1"):
        used().encode(made_up(), batch_size=wrong)  # type: ignore[arg-type]


def test_a_bank_holds_rows_and_labels_of_any_value():
    bank = EmbeddingBank(F.one_hot(torch.arange(3)).double(), torch.tensor([2**60, -1, 2**60 + 1]))
    assert len(bank) == 3
    assert bank.to("cpu").labels.tolist() == [2**60, -1, 2**60 + 1]
    assert bank.to("cpu").embeddings.dtype == torch.float64


def test_wrong_banks_are_refused():
    labels = torch.arange(3)
    with pytest.raises(ValueError, match=r"embeddings of shape \(M, D\), got shape \(3, 2, 2\); flatten each item"):
        EmbeddingBank(torch.zeros(3, 2, 2), labels)
    with pytest.raises(TypeError, match=r"expected float embeddings, got torch.int64; convert them"):
        EmbeddingBank(torch.zeros(3, 2, dtype=torch.int64), labels)
    with pytest.raises(TypeError, match="bank's labels as an int64 tensor"):
        EmbeddingBank(torch.zeros(3, 2), labels.int())
    with pytest.raises(ValueError, match=r"bank's labels of shape \(4,\)"):
        EmbeddingBank(torch.zeros(4, 2), labels)
    with pytest.raises(ValueError, match="in 1 of 3 rows, first in row 1"):
        EmbeddingBank(torch.tensor([[0.0], [float("nan")], [1.0]]), labels)
