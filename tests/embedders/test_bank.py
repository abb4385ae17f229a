"""EmbeddingBank: what it refuses, its mean taken off and its lengths made 1 against numpy, and which set it is of."""

import hashlib
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pml_fewshot.checks import BLOCK_ROWS
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.embedder import Embedder

LABELS = torch.tensor([2**60, -1, 2**60 + 1, -1, 0, 5, 5])


def rows(count: int = len(LABELS), width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 + torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(), (7,), (7, 2, 2), (7, 1, 1, 4)])
def test_embeddings_are_rows(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"embeddings of shape \(M, D\), got shape \(.*\); flatten each item to one"):
        EmbeddingBank(torch.zeros(shape), LABELS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_embeddings_are_floats(dtype: torch.dtype):
    with pytest.raises(TypeError, match=rf"expected float embeddings, got {dtype}; convert them with .float\(\)"):
        EmbeddingBank(torch.zeros(7, 2, dtype=dtype), LABELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_width_are_kept_as_they_are(dtype: torch.dtype):
    embeddings = rows(dtype=dtype)
    bank = EmbeddingBank(embeddings, LABELS, "source")
    assert bank.embeddings is embeddings
    assert bank.labels is LABELS
    assert len(bank) == 7
    assert bank.normalized().embeddings.dtype == dtype
    assert bank.centred(torch.zeros(4)).embeddings.dtype == dtype


@pytest.mark.parametrize(
    "labels", [LABELS.int(), LABELS.double(), LABELS.bool(), LABELS.tolist(), LABELS.numpy(), None]
)
def test_labels_are_an_int64_tensor(labels: object):
    with pytest.raises(TypeError, match="expected the bank's labels as an int64 tensor, got a"):
        EmbeddingBank(rows(), labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [LABELS[:6], LABELS[:, None], LABELS.repeat(2), LABELS[0]])
def test_labels_are_one_for_each_row(labels: Tensor):
    with pytest.raises(ValueError, match=r"expected the bank's labels of shape \(7,\), one for each item, got shape"):
        EmbeddingBank(rows(), labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_counted(bad: float):
    embeddings = rows()
    embeddings[2, 1] = embeddings[5, 0] = embeddings[5, 3] = bad
    with pytest.raises(
        ValueError, match=r"expected finite embeddings, got NaN or infinity in 2 of 7 rows, first in row 2;"
    ):
        EmbeddingBank(embeddings, LABELS)


def test_a_row_far_down_a_large_bank_is_found():
    count = 2 * BLOCK_ROWS + 100
    labels = torch.zeros(count, dtype=torch.int64)
    embeddings = rows(count, 2, torch.float32)
    EmbeddingBank(embeddings, labels)
    embeddings[count - 3, 1] = float("nan")
    with pytest.raises(ValueError, match=f"in 1 of {count} rows, first in row {count - 3};"):
        EmbeddingBank(embeddings, labels)
    embeddings[BLOCK_ROWS, 0] = float("inf")
    with pytest.raises(ValueError, match=f"in 2 of {count} rows, first in row {BLOCK_ROWS};"):
        EmbeddingBank(embeddings, labels)


def test_an_empty_bank_is_a_bank():
    bank = EmbeddingBank(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert len(bank) == 0
    assert len(bank.fingerprint()) == 16


def test_a_mean_is_taken_off_every_row():
    bank, mean = EmbeddingBank(rows(), LABELS, "source"), torch.linspace(-1, 5, 4, dtype=torch.float64)
    before = bank.embeddings.clone()
    centred = bank.centred(mean)
    np.testing.assert_allclose(centred.embeddings.numpy(), before.numpy() - mean.numpy()[None], rtol=1e-14)
    assert torch.equal(bank.embeddings, before)
    assert centred.labels is bank.labels
    assert centred.source == "source"
    own = bank.centred(bank.embeddings.mean(dim=0)).embeddings.numpy()
    np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-14)


def test_the_mean_takes_the_banks_precision():
    bank = EmbeddingBank(rows(dtype=torch.float32), LABELS)
    mean = torch.linspace(0, 1, 4, dtype=torch.float64)
    centred = bank.centred(mean)
    assert centred.embeddings.dtype == torch.float32
    np.testing.assert_allclose(centred.embeddings.numpy(), bank.embeddings.numpy() - mean.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (1, 4), (7, 4), ()])
def test_a_mean_of_another_width_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected a mean of shape \(4,\), got \(.*\); use bank.embeddings.mean\(0\)"):
        EmbeddingBank(rows(), LABELS).centred(torch.zeros(shape))


def test_a_mean_that_is_nan_is_noticed():
    with pytest.raises(ValueError, match="expected finite embeddings, got NaN or infinity in 7 of 7 rows"):
        EmbeddingBank(rows(), LABELS).centred(torch.full((4,), float("nan")))


def test_every_row_gets_length_1():
    embeddings = rows() * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    bank = EmbeddingBank(embeddings, LABELS, "source")
    normalized = bank.normalized()
    lengths = np.sqrt((embeddings.numpy() ** 2).sum(axis=1))
    np.testing.assert_allclose(normalized.embeddings.numpy(), embeddings.numpy() / lengths[:, None], rtol=1e-12)
    assert normalized.labels is bank.labels
    assert normalized.source == "source"
    mean = torch.linspace(0, 1, 4, dtype=torch.float64)
    moved = embeddings.numpy() - mean.numpy()
    np.testing.assert_allclose(
        bank.centred(mean).normalized().embeddings.numpy(),
        moved / np.linalg.norm(moved, axis=1, keepdims=True),
        rtol=1e-12,
    )


def test_a_row_of_zeros_stays_so():
    embeddings = rows()
    embeddings[3] = 0
    normalized = EmbeddingBank(embeddings, LABELS).normalized().embeddings
    assert normalized[3].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(normalized.norm(dim=1)[[0, 1, 2, 4, 5, 6]], torch.ones(6, dtype=torch.float64))


def test_the_fingerprint_is_of_the_labels_in_their_order():
    digest = hashlib.blake2b(digest_size=8)
    for label in LABELS.tolist():
        digest.update(label.to_bytes(8, "little", signed=True))
    assert EmbeddingBank(rows(), LABELS).fingerprint() == digest.hexdigest()
    assert EmbeddingBank(rows(width=2), LABELS).fingerprint() == digest.hexdigest()
    strided = LABELS.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert EmbeddingBank(rows(), strided).fingerprint() == digest.hexdigest()
    others = [LABELS.flip(0), LABELS + 1, LABELS[:6], LABELS.clone().index_fill_(0, torch.tensor([0]), 2**60 + 2)]
    assert len({EmbeddingBank(rows(len(other)), other).fingerprint() for other in (LABELS, *others)}) == 5


def test_the_fingerprint_is_of_the_source_where_it_is_known():
    bank = EmbeddingBank(rows(), LABELS, "0123456789abcdef")
    assert bank.fingerprint() == "0123456789abcdef"
    for derived in (bank.normalized(), bank.centred(torch.zeros(4)), bank.to("cpu")):
        assert derived.fingerprint() == "0123456789abcdef"
    images = torch.arange(7 * 4, dtype=torch.uint8).view(7, 1, 2, 2)
    dataset = FewShotDataset(images, torch.tensor([0, 0, 1, 2, 1, 2, 1]), ["a", "b", "c"])
    encoded = Embedder(nn.Flatten()).encode(dataset)
    assert encoded.fingerprint() == encoded.source == dataset.fingerprint()
    torch.testing.assert_close(encoded.embeddings, images.flatten(1).float() / 255)


def test_a_bank_is_moved_whole():
    bank = EmbeddingBank(rows(dtype=torch.float32), LABELS, "source")
    for device in ("cpu", torch.device("cpu")):
        moved = bank.to(device)
        assert torch.equal(moved.embeddings, bank.embeddings)
        assert moved.embeddings.dtype == torch.float32
        assert torch.equal(moved.labels, LABELS)
        assert moved.source == "source"


def test_a_bank_is_frozen():
    bank = EmbeddingBank(rows(), LABELS)
    with pytest.raises(FrozenInstanceError):
        bank.labels = LABELS.flip(0)  # type: ignore[misc]
