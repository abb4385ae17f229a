"""EmbeddingBank against numpy; save_bank and load_bank: banks come back as they were, files of other tools are read."""

import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from torch import Tensor

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError
from pml_fewshot.embedders.bank import FORMATS, EmbeddingBank, load_bank, save_bank

LABELS = np.array([3, -1, 3, -1, 2**53 + 1, 7], dtype=np.int64)  # one that no float64 holds
EMBEDDINGS = np.random.default_rng(0).normal(3, size=(6, 4)).astype(np.float32)
ROWS, NUMBERS = torch.from_numpy(EMBEDDINGS), torch.from_numpy(LABELS)
SOURCE = "0123456789abcdef"


def bank(dtype: torch.dtype = torch.float32, source: str = "") -> EmbeddingBank:
    return EmbeddingBank(ROWS.to(dtype), NUMBERS, source)


def check(loaded: EmbeddingBank, embeddings: Tensor = ROWS, labels: Any = LABELS) -> None:
    """That the loaded bank is as it was, to the last bit."""
    assert (loaded.embeddings.dtype, loaded.labels.dtype) == (embeddings.dtype, torch.int64)
    assert torch.equal(loaded.embeddings, embeddings)
    assert loaded.labels.tolist() == list(labels)


def write(folder: Path, suffix: str, embeddings: np.ndarray = EMBEDDINGS, labels: np.ndarray = LABELS) -> Path:
    path = folder / f"bank{suffix}"
    if suffix == ".npy":
        np.save(path, embeddings)
        np.save(folder / "bank_labels.npy", labels)
    elif suffix == ".npz":
        np.savez(path, e=embeddings, l=labels)
    elif suffix == ".safetensors":
        save_numpy({"e": embeddings, "l": labels}, path)
    else:
        torch.save((torch.from_numpy(embeddings), torch.from_numpy(labels)), path)
    return path


def pt(folder: Path, what: Any, name: str = "bank.pt") -> Path:
    torch.save(what, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("embeddings", "labels", "error", "message"),
    [
        (ROWS[0], NUMBERS, UsageError, r"embeddings of shape \(M, D\), got shape \(4,\); flatten each item to one row"),
        (ROWS[..., None], NUMBERS, UsageError, r"got shape \(6, 4, 1\)"),
        (ROWS.long(), NUMBERS, UsageTypeError, r"float embeddings, got torch.int64; convert them with .float\(\)"),
        (ROWS, NUMBERS.int(), UsageTypeError, "the bank's labels as an int64 tensor"),
        (ROWS, LABELS, UsageTypeError, "the bank's labels as an int64 tensor"),
        (ROWS, NUMBERS[:, None], UsageError, r"the bank's labels of shape \(6,\)"),
        (ROWS / 0, NUMBERS, UsageError, "finite embeddings, got NaN or infinity in 6 of 6 rows"),
    ],
)
def test_what_is_no_bank_is_refused(embeddings: Tensor, labels: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^expected .*{message}"):
        EmbeddingBank(embeddings, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mean_centering_and_normalization_are_numpys_in_float32_at_least(dtype: torch.dtype):
    original, mean = bank(dtype, SOURCE), torch.linspace(-1, 5, 4, dtype=torch.float64)
    rows, tolerance = original.embeddings.double().numpy(), 1e-6
    np.testing.assert_allclose(original.mean().double().numpy(), rows.mean(axis=0), rtol=1e-6)
    moved = rows - mean.numpy()[None]
    lengths = np.sqrt((moved**2).sum(axis=1, keepdims=True))
    centered = original.centered(mean)
    for result, expected in ((centered, moved), (centered.normalized(), moved / lengths)):
        assert result.embeddings.dtype == torch.promote_types(dtype, torch.float32)
        assert result.labels is original.labels
        np.testing.assert_allclose(result.embeddings.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    check(original, ROWS.to(dtype))


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4), ()])  # the last three would broadcast
def test_a_mean_of_another_width_is_refused(shape: tuple[int, ...]):
    with pytest.raises(UsageError, match=r"expected a mean of shape \(4,\), got \(.*\); use bank.mean\(\)"):
        bank().centered(torch.zeros(shape))


def test_the_fingerprint_is_of_the_labels_in_their_order_or_of_the_source_where_it_is_known():
    digest = hashlib.blake2b(digest_size=8)
    for label in LABELS.tolist():
        digest.update(label.to_bytes(8, "little", signed=True))
    for labels in (NUMBERS, NUMBERS.repeat_interleave(2)[::2]):  # strided
        assert EmbeddingBank(ROWS[:, :2], labels).fingerprint() == digest.hexdigest()
    known = bank(source=SOURCE)
    for derived in (known, known.normalized(), known.centered(torch.zeros(4)), known.to("cpu")):
        assert derived.fingerprint() == derived.source == SOURCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bank_comes_back_to_the_last_bit(dtype: torch.dtype, tmp_path: Path):
    original = bank(dtype, SOURCE if dtype == torch.float32 else "")
    save_bank(tmp_path / "bank.safetensors", EmbeddingBank(torch.ones(2, 3), torch.arange(2)))  # replaced
    save_bank(tmp_path / "bank.safetensors", original)
    loaded = load_bank(tmp_path / "bank.safetensors")
    check(loaded, original.embeddings)
    assert loaded.source == original.source
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_other_endings_are_neither_saved_to_nor_read(tmp_path: Path):
    with pytest.raises(UsageError, match=r"expected a path that ends with \.safetensors, got .*; rename it"):
        save_bank(tmp_path / "bank.npz", bank())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bank.csv").write_bytes(b"x")
    for arguments in ((tmp_path / "bank.csv",), (write(tmp_path, ".npy"), tmp_path / "bank.csv")):
        with pytest.raises(UsageError, match=r"expected the file's ending as one of '\.npy', '\.npz'"):
            load_bank(*arguments)


def test_npy_is_memory_mapped_and_takes_labels_from_another_file(tmp_path: Path):
    path = write(tmp_path, ".npy")
    with mock.patch.object(np, "load", wraps=np.load) as load:
        loaded = load_bank(str(path))
    check(loaded)
    assert load.call_args_list[0].kwargs["mmap_mode"] == "r"  # Linux refuses a writable map that is larger than memory
    np.load(path, mmap_mode="r+")[0, 0] = 7
    assert loaded.embeddings[0, 0] == 7
    np.save(tmp_path / "others.npy", LABELS[::-1])
    assert load_bank(path, str(tmp_path / "others.npy")).labels.tolist() == LABELS[::-1].tolist()
    (tmp_path / "bank_labels.npy").unlink()
    with pytest.raises(MissingFileError, match=r"expected a file of .*labels at .*bank_labels\.npy"):
        load_bank(path)
    lone = pt(tmp_path, ROWS)
    check(load_bank(lone, pt(tmp_path, NUMBERS, "labels.pt")))
    with pytest.raises(UsageError, match=r"expected one array of labels.*; .*give a file of labels"):
        load_bank(lone)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(">f4")], ids=["fortran", "swapped"])
def test_the_other_orders_of_axes_and_bytes_are_read(change: Any, suffix: str, tmp_path: Path):
    check(load_bank(write(tmp_path, suffix, change(EMBEDDINGS), LABELS.astype(">i8"))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("arrays", "keys"),
    [
        ({"logits": EMBEDDINGS + 1, "ids": np.arange(6), "labels": LABELS, "embeddings": EMBEDDINGS}, {}),
        ({"y": LABELS, "feats": EMBEDDINGS, "scores": np.ones(6), "pixels": np.ones((6, 2), dtype=np.uint8)}, {}),
        (
            {"embeddings": EMBEDDINGS + 1, "feats": EMBEDDINGS, "labels": LABELS + 1, "y": LABELS},
            {"embeddings_key": "feats", "labels_key": "y"},
        ),
    ],
    ids=["standard names", "the only ones that fit", "names given"],
)
def test_npz_by_names_or_by_what_fits(arrays: dict[str, np.ndarray], keys: dict[str, str], save: Any, tmp_path: Path):
    save(tmp_path / "bank.npz", **arrays)
    check(load_bank(tmp_path / "bank.npz", **keys))


@pytest.mark.parametrize(
    ("arrays", "keys", "message"),
    [
        (
            {"a": EMBEDDINGS, "b": EMBEDDINGS, "labels": LABELS},
            {},
            r"one array of embeddings, floats of two axes, in .*bank.npz, got a \S*float32 \(6, 4\), b \S*float32 "
            r"\(6, 4\), labels \S*int64 \(6,\); say which by embeddings_key",
        ),
        ({"embeddings": EMBEDDINGS, "y": LABELS, "ids": LABELS}, {}, "one array of labels, .*say which by labels_key"),
        ({}, {}, "one array of embeddings, .* got nothing"),
        ({"feats": EMBEDDINGS, "y": LABELS}, {"embeddings_key": "feat"}, "embeddings named 'feat' in .*, got feats .*"),
        ({"feats": EMBEDDINGS, "y": LABELS}, {"labels_key": "x"}, r"labels named 'x' in .*, y \S*int64 \(6,\); give"),
    ],
)
def test_where_it_is_not_clear_what_is_meant_the_names_are_listed(
    arrays: dict[str, np.ndarray], keys: dict[str, str], message: str, tmp_path: Path
):
    np.savez(tmp_path / "bank.npz", **arrays)
    with pytest.raises(UsageError, match=r"^expected " + message):
        load_bank(tmp_path / "bank.npz", **keys)


PARTS = {
    "dict": {"embeddings": ROWS, "labels": NUMBERS, "epoch": 3},
    "other names": {"features": torch.nn.Parameter(ROWS.clone()), "targets": LABELS.tolist(), "groups": [{}], "no": []},
    "pair": (ROWS, NUMBERS),
    "pair with a list": [ROWS, LABELS.tolist()],
}


@pytest.mark.parametrize("parts", PARTS)
def test_pt_of_a_dict_or_a_pair(parts: str, tmp_path: Path):
    check(load_bank(pt(tmp_path, PARTS[parts])))


@pytest.mark.parametrize("what", [3, (torch.ones(1),), None, {"embeddings": 3}, {"embeddings": np.ones((2, 2))}])
def test_pt_of_something_else_is_refused(what: Any, tmp_path: Path):
    with pytest.raises(UsageError, match=r"^expected "):
        load_bank(pt(tmp_path, what))


@pytest.mark.parametrize("dtype", ["U", "S", "int8", "uint8", "uint16", "int32", "uint64"])
def test_labels_of_any_integers_and_texts_numbered_in_alphabetical_order(dtype: str, tmp_path: Path):
    names, numbers = ["cat", "ant", "cat", "dog", "bee", "ant"], [2, 0, 2, 3, 1, 0]
    labels = np.array(names if dtype in "US" else numbers).astype(dtype)
    check(load_bank(write(tmp_path, ".npz", labels=labels)), labels=numbers)
    check(load_bank(pt(tmp_path, {"embeddings": ROWS, "labels": labels.astype("U").tolist()})), labels=numbers)


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64"])
def test_labels_that_are_no_numbers_of_classes_are_refused(dtype: str, tmp_path: Path):
    path = write(tmp_path, ".npy", labels=LABELS.astype(dtype))
    with pytest.raises(UsageTypeError, match=f"labels as integers or texts in .*bank_labels.npy, got .*{dtype}; conv"):
        load_bank(path, labels_key="bank_labels")
    with pytest.raises(UsageError, match="integers or texts"):
        load_bank(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", ["i8", "c8", "U", "O", "M8[s]"])
def test_embeddings_that_are_no_floats_are_refused(dtype: str, suffix: str, tmp_path: Path):
    with pytest.raises(UsageError, match=r"^expected "):
        load_bank(write(tmp_path, suffix, EMBEDDINGS.astype(dtype)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_nan_other_labels_broken_files_and_missing_ones_are_refused_in_every_format(suffix: str, tmp_path: Path):
    broken = EMBEDDINGS.copy()
    broken[2, 1] = np.nan
    with pytest.raises(UsageError, match=r"NaN or infinity in 1 of 6 rows, first in row 2"):
        load_bank(write(tmp_path, suffix, broken))
    with pytest.raises(UsageError, match=r"expected the bank's labels of shape \(6,\)"):
        load_bank(write(tmp_path, suffix, labels=LABELS[:5]))
    path = write(tmp_path, suffix)
    check(load_bank(path))
    for content in (b"", b"\0" * 64, b"embeddings,labels\n0.5,1\n", b"{}", path.read_bytes()[:-9]):
        (tmp_path / f"other{suffix}").write_bytes(content)
        with pytest.raises(UsageError, match=r"^expected .*other"):
            load_bank(tmp_path / f"other{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("nowhere", "folder"):
        with pytest.raises(MissingFileError, match=f"expected a file of embeddings or labels at .*{name}"):
            load_bank(tmp_path / f"{name}{suffix}")
