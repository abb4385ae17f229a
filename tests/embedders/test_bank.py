"""EmbeddingBank against numpy; save_bank and load_bank: banks come back as they were, files of other tools are read."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from torch import Tensor

from pml_fewshot.checks import BLOCK_ROWS, MissingFileError, UsageError, UsageTypeError
from pml_fewshot.embedders.bank import FORMATS, EmbeddingBank, load_bank, save_bank

LABELS = np.array([3, -1, 3, -1, 2**53 + 1, 7], dtype=np.int64)  # one that no float64 holds
EMBEDDINGS = np.random.default_rng(0).normal(3, size=(6, 4)).astype(np.float32)
ROWS, NUMBERS = torch.from_numpy(EMBEDDINGS), torch.from_numpy(LABELS)


def bank(dtype: torch.dtype = torch.float32, source: str = "") -> EmbeddingBank:
    return EmbeddingBank(ROWS.to(dtype), NUMBERS, source)


def is_the_bank(loaded: EmbeddingBank) -> bool:
    return (
        torch.equal(loaded.embeddings, ROWS)
        and loaded.embeddings.dtype == torch.float32
        and loaded.labels.dtype == torch.int64
        and loaded.labels.tolist() == LABELS.tolist()
    )


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "bank.npz", **arrays)
    return folder / "bank.npz"


def npy(folder: Path, embeddings: np.ndarray = EMBEDDINGS, labels: np.ndarray | None = LABELS) -> Path:
    np.save(folder / "bank.npy", embeddings)
    if labels is not None:
        np.save(folder / "bank_labels.npy", labels)
    return folder / "bank.npy"


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
        (ROWS, NUMBERS[:5], UsageError, r"the bank's labels of shape \(6,\)"),
        (ROWS, NUMBERS[:, None], UsageError, r"the bank's labels of shape \(6,\)"),
    ],
)
def test_what_is_no_bank_is_refused(embeddings: Tensor, labels: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^expected .*{message}"):
        EmbeddingBank(embeddings, labels)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_rows_that_are_not_finite_are_counted_also_far_down_a_large_bank(bad: float):
    count = 2 * BLOCK_ROWS + 100
    embeddings, labels = torch.ones(count, 2), torch.zeros(count, dtype=torch.int64)
    EmbeddingBank(embeddings, labels)
    embeddings[count - 3] = bad
    with pytest.raises(UsageError, match=f"NaN or infinity in 1 of {count} rows, first in row {count - 3};"):
        EmbeddingBank(embeddings, labels)
    embeddings[BLOCK_ROWS, 0] = bad
    with pytest.raises(UsageError, match=f"in 2 of {count} rows, first in row {BLOCK_ROWS};"):
        EmbeddingBank(embeddings, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_centering_and_normalization_are_numpys_in_the_banks_precision(dtype: torch.dtype):
    original, mean = bank(dtype, "source"), torch.linspace(-1, 5, 4, dtype=torch.float64)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
    moved = ROWS.double().numpy() - mean.numpy()[None]
    lengths = np.sqrt((moved**2).sum(axis=1, keepdims=True))
    centered = original.centered(mean)
    for result, expected in ((centered, moved), (centered.normalized(), moved / lengths)):
        assert result.embeddings.dtype == dtype
        assert result.labels is original.labels
        assert result.source == "source"
        np.testing.assert_allclose(result.embeddings.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(original.embeddings, ROWS.to(dtype))


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4), ()])  # the last three would broadcast
def test_a_mean_of_another_width_is_refused(shape: tuple[int, ...]):
    with pytest.raises(UsageError, match=r"expected a mean of shape \(4,\), got \(.*\); use bank.embeddings.mean\(0\)"):
        bank().centered(torch.zeros(shape))


def test_the_fingerprint_is_of_the_labels_in_their_order_or_of_the_source_where_it_is_known():
    digest = hashlib.blake2b(digest_size=8)
    for label in LABELS.tolist():
        digest.update(label.to_bytes(8, "little", signed=True))
    assert bank().fingerprint() == EmbeddingBank(ROWS[:, :2], NUMBERS).fingerprint() == digest.hexdigest()
    strided = NUMBERS.repeat_interleave(2)[::2]
    assert EmbeddingBank(ROWS, strided).fingerprint() == digest.hexdigest()
    for other in (NUMBERS.flip(0), NUMBERS + 1, NUMBERS[:5]):
        assert EmbeddingBank(ROWS[: len(other)], other).fingerprint() != digest.hexdigest()
    known = bank(source="0123456789abcdef")
    for derived in (known, known.normalized(), known.centered(torch.zeros(4)), known.to("cpu")):
        assert derived.fingerprint() == "0123456789abcdef"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bank_comes_back_to_the_last_bit(dtype: torch.dtype, tmp_path: Path):
    original = bank(dtype, "0123456789abcdef" if dtype == torch.float32 else "")
    save_bank(tmp_path / "bank.safetensors", EmbeddingBank(torch.ones(2, 3), torch.arange(2)))  # replaced
    save_bank(tmp_path / "bank.safetensors", original)
    loaded = load_bank(tmp_path / "bank.safetensors")
    assert loaded.embeddings.dtype == dtype
    assert torch.equal(loaded.embeddings, original.embeddings)
    assert loaded.labels.tolist() == LABELS.tolist()
    assert (loaded.source, loaded.fingerprint()) == (original.source, original.fingerprint())
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_other_endings_are_neither_saved_to_nor_read(tmp_path: Path):
    with pytest.raises(UsageError, match=r"expected a path that ends with \.safetensors, got .*; rename it"):
        save_bank(tmp_path / "bank.npz", bank())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bank.csv").write_bytes(b"x")
    for arguments in ((tmp_path / "bank.csv",), (npy(tmp_path), tmp_path / "bank.csv")):
        with pytest.raises(UsageError, match=r"expected the file's ending as one of '\.npy', '\.npz'"):
            load_bank(*arguments)


def test_npy_is_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    maps: list[np.ndarray] = []
    load = np.load

    def noted(*args: Any, **options: Any) -> np.ndarray:
        maps.append(load(*args, **options))
        return maps[-1]

    path = npy(tmp_path)
    monkeypatch.setattr(np, "load", noted)
    loaded = load_bank(path)
    assert is_the_bank(loaded)
    assert isinstance(maps[0], np.memmap)
    assert np.shares_memory(maps[0], loaded.embeddings.numpy())
    assert maps[0].mode == "r"  # Linux refuses a writable map that is larger than memory


def test_files_without_labels_take_them_from_another_file(tmp_path: Path):
    path = npy(tmp_path)
    assert is_the_bank(load_bank(str(path)))
    np.save(tmp_path / "others.npy", LABELS[::-1])
    assert load_bank(path, str(tmp_path / "others.npy")).labels.tolist() == LABELS[::-1].tolist()
    (tmp_path / "bank_labels.npy").unlink()
    with pytest.raises(MissingFileError, match=r"expected a file of .*labels at .*bank_labels\.npy"):
        load_bank(path)
    lone = pt(tmp_path, ROWS)
    assert is_the_bank(load_bank(lone, pt(tmp_path, NUMBERS, "labels.pt")))
    with pytest.raises(UsageError, match=r"expected one array of labels.*; .*give a file of labels"):
        load_bank(lone)


@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(">f4")], ids=["fortran", "swapped"])
def test_the_other_orders_of_axes_and_bytes_are_read(change: Any, tmp_path: Path):
    assert is_the_bank(load_bank(npy(tmp_path, change(EMBEDDINGS), LABELS.astype(">i8"))))
    assert is_the_bank(load_bank(npz(tmp_path, embeddings=change(EMBEDDINGS), labels=LABELS.astype(">i8"))))


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
def test_npz_by_the_standard_names_by_what_fits_or_by_names_that_are_given(
    arrays: dict[str, np.ndarray], keys: dict[str, str], tmp_path: Path
):
    assert is_the_bank(load_bank(npz(tmp_path, **arrays), **keys))
    np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    assert is_the_bank(load_bank(tmp_path / "compressed.npz", **keys))


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
        ({"embeddings": EMBEDDINGS}, {}, "one array of labels, .*give a file of labels"),
        ({}, {}, "one array of embeddings, .* got nothing"),
        ({"feats": EMBEDDINGS, "y": LABELS}, {"embeddings_key": "feat"}, "embeddings named 'feat' in .*, got feats .*"),
        ({"feats": EMBEDDINGS, "y": LABELS}, {"labels_key": "x"}, r"labels named 'x' in .*, y \S*int64 \(6,\); give"),
    ],
)
def test_where_it_is_not_clear_what_is_meant_the_names_are_listed(
    arrays: dict[str, np.ndarray], keys: dict[str, str], message: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"^expected " + message):
        load_bank(npz(tmp_path, **arrays), **keys)


@pytest.mark.parametrize(
    "what",
    [
        {"embeddings": ROWS, "labels": NUMBERS, "epoch": 3},
        {"features": torch.nn.Parameter(ROWS.clone()), "targets": LABELS.tolist()},
        (ROWS, NUMBERS),
        [ROWS, LABELS.tolist()],
    ],
    ids=["dict", "other names", "pair", "pair with a list"],
)
@pytest.mark.parametrize("name", ["bank.pt", "bank.pth"])
def test_pt_of_a_dict_or_a_pair(what: Any, name: str, tmp_path: Path):
    assert is_the_bank(load_bank(pt(tmp_path, what, name)))


@pytest.mark.parametrize("what", [3, (torch.ones(1),), None, {"embeddings": 3}, {"embeddings": np.ones((2, 2))}])
def test_pt_of_something_else_is_refused(what: Any, tmp_path: Path):
    with pytest.raises(UsageError, match=r"^expected "):
        load_bank(pt(tmp_path, what))


def test_texts_are_numbered_in_alphabetical_order(tmp_path: Path):
    names = ["cat", "ant", "cat", "dog", "bee", "ant"]
    paths = [pt(tmp_path, {"embeddings": ROWS, "labels": names})]
    for dtype in "US":
        np.savez(tmp_path / f"{dtype}.npz", embeddings=EMBEDDINGS, labels=np.array(names).astype(dtype))
        paths.append(tmp_path / f"{dtype}.npz")
    for path in paths:
        loaded = load_bank(path)
        assert loaded.labels.tolist() == [2, 0, 2, 3, 1, 0]
        assert loaded.labels.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "uint64"])
def test_labels_of_any_integers(dtype: str, tmp_path: Path):
    loaded = load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=np.array([0, 1, 0, 1, 2, 100]).astype(dtype)))
    assert loaded.labels.tolist() == [0, 1, 0, 1, 2, 100]
    assert loaded.labels.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64"])
def test_labels_that_are_no_numbers_of_classes_are_refused(dtype: str, tmp_path: Path):
    with pytest.raises(UsageTypeError, match=f"labels as integers or texts in .*bank.npz, got .*{dtype}; convert"):
        load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=LABELS.astype(dtype)))
    with pytest.raises(UsageError, match="integers or texts"):
        load_bank(npy(tmp_path, labels=LABELS.astype(dtype)))


@pytest.mark.parametrize("dtype", ["i8", "c8", "U", "O", "M8[s]"])
def test_embeddings_that_are_no_floats_are_refused(dtype: str, tmp_path: Path):
    embeddings = EMBEDDINGS.astype(dtype)
    for path in (npz(tmp_path, embeddings=embeddings, labels=LABELS), npy(tmp_path, embeddings)):
        with pytest.raises(UsageError, match=r"^expected "):
            load_bank(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_nan_other_labels_broken_files_and_missing_ones_are_refused_in_every_format(suffix: str, tmp_path: Path):
    def write(embeddings: np.ndarray, labels: np.ndarray) -> Path:
        if suffix in (".npy", ".npz"):
            return npy(tmp_path, embeddings, labels) if suffix == ".npy" else npz(tmp_path, e=embeddings, l=labels)
        if suffix == ".safetensors":
            save_numpy({"e": embeddings, "l": labels}, tmp_path / "bank.safetensors")
            return tmp_path / "bank.safetensors"
        return pt(tmp_path, (torch.from_numpy(embeddings), torch.from_numpy(labels)), f"bank{suffix}")

    broken = EMBEDDINGS.copy()
    broken[2, 1] = np.nan
    with pytest.raises(UsageError, match=r"NaN or infinity in 1 of 6 rows, first in row 2"):
        load_bank(write(broken, LABELS))
    with pytest.raises(UsageError, match=r"expected the bank's labels of shape \(6,\)"):
        load_bank(write(EMBEDDINGS, LABELS[:5]))
    path = write(EMBEDDINGS, LABELS)
    assert is_the_bank(load_bank(path))
    for content in (b"", b"\0" * 64, b"embeddings,labels\n0.5,1\n", b"{}", path.read_bytes()[:-9]):
        (tmp_path / f"other{suffix}").write_bytes(content)
        with pytest.raises(UsageError, match=r"^expected .*other"):
            load_bank(tmp_path / f"other{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("nowhere", "folder"):
        with pytest.raises(MissingFileError, match=f"expected a file of embeddings or labels at .*{name}"):
            load_bank(tmp_path / f"{name}{suffix}")
