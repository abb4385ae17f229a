"""save_bank and load_bank: banks come back as they were, files of other tools are read, and broken ones are refused."""

import gc
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file
from torch import Tensor

from pml_fewshot import tensor_file
from pml_fewshot.embedders import bank_file
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.bank_file import load_bank, save_bank

LABELS = np.array([3, 1, 3, 1, 2**53 + 1, 7], dtype=np.int64)  # one that no float64 holds
EMBEDDINGS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def bank(dtype: torch.dtype = torch.float32, source: str = "") -> EmbeddingBank:
    return EmbeddingBank(torch.from_numpy(EMBEDDINGS).to(dtype), torch.from_numpy(LABELS), source)


def is_the_bank(loaded: EmbeddingBank) -> bool:
    return (
        torch.equal(loaded.embeddings, torch.from_numpy(EMBEDDINGS))
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


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["", "0123456789abcdef"])
def test_a_bank_comes_back_to_the_last_bit(dtype: torch.dtype, source: str, tmp_path: Path):
    original = bank(dtype, source)
    save_bank(tmp_path / "bank.safetensors", original)
    loaded = load_bank(tmp_path / "bank.safetensors")
    assert loaded.embeddings.dtype == dtype
    assert torch.equal(loaded.embeddings, original.embeddings)
    assert loaded.labels.tolist() == LABELS.tolist()
    assert loaded.source == source
    assert loaded.fingerprint() == original.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_views_are_saved_as_what_they_show(tmp_path: Path):
    wide = torch.arange(24.0).reshape(4, 6)
    view = EmbeddingBank(wide.T[1:4], torch.arange(12)[::4], "s")
    save_bank(tmp_path / "bank.safetensors", view)
    assert load_bank(tmp_path / "bank.safetensors").embeddings.tolist() == wide.T[1:4].tolist()
    assert (tmp_path / "bank.safetensors").stat().st_size < 500


def test_other_tools_can_read_it(tmp_path: Path):
    save_bank(str(tmp_path / "bank.safetensors"), bank())
    tensors = load_file(tmp_path / "bank.safetensors")
    assert set(tensors) == {"embeddings", "labels"}
    assert torch.equal(tensors["labels"], torch.from_numpy(LABELS))


def test_saving_again_replaces_the_old_file(tmp_path: Path):
    path = tmp_path / "bank.safetensors"
    save_bank(path, EmbeddingBank(torch.ones(2, 3), torch.arange(2)))
    save_bank(path, bank())
    assert is_the_bank(load_bank(path))


def save_that_fails(path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves a bank, and another into the same file, which fails when half of it is written."""
    save_bank(path, bank())
    whole = path.read_bytes()

    def half(tensors: dict[str, Tensor], filename: Path, metadata: Any = None) -> None:
        Path(filename).write_bytes(whole[: len(whole) // 2])
        raise error

    monkeypatch.setattr(tensor_file, "save_file", half)
    with pytest.raises(type(error)):
        save_bank(path, EmbeddingBank(torch.ones(2, 3), torch.arange(2)))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_that_fails(tmp_path / "bank.safetensors", error, monkeypatch)
    assert is_the_bank(load_bank(tmp_path / "bank.safetensors"))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing_else(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_that_fails(tmp_path / "bank.safetensors", error, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


@pytest.mark.parametrize("name", ["bank.npz", "bank", "bank.safetensors.pt"])
def test_another_ending_is_not_saved_to(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected a path that ends with \.safetensors, got .*; rename it"):
        save_bank(tmp_path / name, bank())
    assert list(tmp_path.iterdir()) == []


# --- .npy -------------------------------------------------------------------------------------------------------------


def test_npy_is_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = npy(tmp_path)
    before = path.read_bytes()
    maps: list[np.ndarray] = []
    load = bank_file.map_npy

    def noted(*args: Any, **options: Any) -> np.ndarray:
        maps.append(load(*args, **options))
        return maps[-1]

    monkeypatch.setattr(bank_file, "map_npy", noted)
    loaded = load_bank(path)
    assert is_the_bank(loaded)
    assert isinstance(maps[0], np.memmap)
    assert np.shares_memory(maps[0], loaded.embeddings.numpy())
    assert maps[0].mode == "r"  # Linux refuses a writable map that is larger than memory
    assert path.read_bytes() == before


def test_npy_takes_labels_from_beside_it_or_from_where_it_is_told(tmp_path: Path):
    path = npy(tmp_path)
    assert is_the_bank(load_bank(str(path)))
    np.save(tmp_path / "others.npy", LABELS[::-1])
    assert load_bank(path, tmp_path / "others.npy").labels.tolist() == LABELS[::-1].tolist()
    assert load_bank(path, labels=str(tmp_path / "others.npy")).labels.tolist() == LABELS[::-1].tolist()


def test_npy_without_labels_names_the_file_that_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of .*labels at .*bank_labels\.npy"):
        load_bank(npy(tmp_path, labels=None))


def test_npy_in_the_order_of_fortran(tmp_path: Path):
    assert is_the_bank(load_bank(npy(tmp_path, np.asfortranarray(EMBEDDINGS))))


# what numpy writes on machines, and by tools, with the other order of bytes
@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_the_other_order_of_bytes_is_read_or_refused(dtype: str, tmp_path: Path):
    for path in (npy(tmp_path, EMBEDDINGS.astype(dtype)), npz(tmp_path, embeddings=EMBEDDINGS.astype(dtype), y=LABELS)):
        try:
            loaded = load_bank(path)
        except (ValueError, TypeError) as error:
            assert str(error).startswith("expected ")  # noqa: PT017
        else:
            assert loaded.embeddings.tolist() == EMBEDDINGS.tolist()


def test_labels_with_the_other_order_of_bytes(tmp_path: Path):
    assert is_the_bank(load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=LABELS.astype(">i8"))))


# --- .npz -------------------------------------------------------------------------------------------------------------


def test_npz_by_the_standard_names_whatever_else_is_in_it(tmp_path: Path):
    others = {"logits": EMBEDDINGS + 1, "ids": np.arange(6), "name": np.array("x")}
    assert is_the_bank(load_bank(npz(tmp_path, **others, labels=LABELS, embeddings=EMBEDDINGS)))


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_by_other_names_where_only_one_fits(compressed: bool, tmp_path: Path):
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "bank.npz", y=LABELS, feats=EMBEDDINGS, scores=np.ones(6), pixels=np.ones((6, 2), dtype=np.uint8))
    assert is_the_bank(load_bank(tmp_path / "bank.npz"))


def test_npz_by_names_that_are_given(tmp_path: Path):
    path = npz(tmp_path, embeddings=EMBEDDINGS + 1, feats=EMBEDDINGS, labels=LABELS + 1, y=LABELS)
    assert is_the_bank(load_bank(path, embeddings_key="feats", labels_key="y"))
    assert load_bank(path).labels.tolist() == (LABELS + 1).tolist()


@pytest.mark.parametrize("dtype", ["U", "S"])
def test_texts_are_numbered_in_alphabetical_order(dtype: str, tmp_path: Path):
    names = np.array(["cat", "ant", "cat", "dog", "bee", "ant"]).astype(dtype)
    loaded = load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=names))
    assert loaded.labels.tolist() == [2, 0, 2, 3, 1, 0]
    assert loaded.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"a": EMBEDDINGS, "b": EMBEDDINGS, "labels": LABELS},
            r"one array of embeddings, floats of two axes, in .*bank.npz, got a float32 \(6, 4\), b float32 \(6, 4\), "
            r"labels int64 \(6,\); say which by embeddings_key",
        ),
        (
            {"embeddings": EMBEDDINGS, "y": LABELS, "ids": LABELS},
            r"one array of labels, .*got y int64 \(6,\), ids int64 \(6,\); say which by labels_key",
        ),
        ({"embeddings": EMBEDDINGS}, "one array of labels, .*got nothing else; .*give a file of labels"),
        ({"labels": LABELS}, "one array of embeddings, .* got labels int64"),
        ({}, "one array of embeddings, .* got nothing else"),
    ],
)
def test_where_it_is_not_clear_what_is_meant_the_names_are_listed(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"^expected " + message):
        load_bank(npz(tmp_path, **arrays))


def test_names_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path):
    path = npz(tmp_path, feats=EMBEDDINGS, y=LABELS)
    with pytest.raises(ValueError, match=r"expected embeddings named 'feat' in .*, got feats .*, y .*; give one"):
        load_bank(path, embeddings_key="feat")
    with pytest.raises(ValueError, match=r"expected labels named 'x' in .*, got y int64 \(6,\); give one"):
        load_bank(path, labels_key="x")


# --- .pt and .safetensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        {"embeddings": torch.from_numpy(EMBEDDINGS), "labels": torch.from_numpy(LABELS), "epoch": 3},
        {"features": torch.from_numpy(EMBEDDINGS), "targets": LABELS.tolist()},
        (torch.from_numpy(EMBEDDINGS), torch.from_numpy(LABELS)),
        [torch.from_numpy(EMBEDDINGS), LABELS.tolist()],
        {"features": torch.nn.Parameter(torch.from_numpy(EMBEDDINGS)), "targets": torch.from_numpy(LABELS)},
    ],
    ids=["dict", "other names", "pair", "pair with a list", "parameter"],
)
@pytest.mark.parametrize("name", ["bank.pt", "bank.pth"])
def test_pt_of_a_dict_or_a_pair(what: Any, name: str, tmp_path: Path):
    assert is_the_bank(load_bank(pt(tmp_path, what, name)))


def test_pt_of_a_lone_tensor_wants_labels(tmp_path: Path):
    path = pt(tmp_path, torch.from_numpy(EMBEDDINGS))
    with pytest.raises(ValueError, match=r"expected one array of labels.*got nothing else; .*give a file of labels"):
        load_bank(path)
    for labels in (pt(tmp_path, torch.from_numpy(LABELS), "labels.pt"), npz(tmp_path, names=LABELS)):
        assert is_the_bank(load_bank(path, labels))


def test_pt_of_small_integers_and_half_floats(tmp_path: Path):
    half = torch.from_numpy(EMBEDDINGS).bfloat16()
    loaded = load_bank(pt(tmp_path, {"embeddings": half, "labels": torch.arange(6, dtype=torch.uint8)}))
    assert torch.equal(loaded.embeddings, half)
    assert loaded.labels.tolist() == [*range(6)]


def test_pt_with_texts_as_labels(tmp_path: Path):
    path = pt(tmp_path, {"embeddings": torch.from_numpy(EMBEDDINGS), "labels": ["b", "a", "b", "a", "c", "a"]})
    assert load_bank(path).labels.tolist() == [1, 0, 1, 0, 2, 0]


@pytest.mark.parametrize("what", [3, "text", (torch.ones(1),), None, {"embeddings": 3}, {}])
def test_pt_of_something_else_is_refused(what: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^expected "):
        load_bank(pt(tmp_path, what))


def test_safetensors_of_another_tool(tmp_path: Path):
    save_numpy({"feats": EMBEDDINGS, "target": LABELS}, tmp_path / "theirs.safetensors")
    loaded = load_bank(tmp_path / "theirs.safetensors")
    assert is_the_bank(loaded)
    assert loaded.source == ""


# --- what labels and embeddings can be --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_labels_of_any_integers(dtype: str, tmp_path: Path):
    labels = np.array([0, 1, 0, 1, 2, 100]).astype(dtype)
    loaded = load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=labels))
    assert loaded.labels.tolist() == labels.tolist()
    assert loaded.labels.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "complex64"])
def test_labels_that_are_no_numbers_of_classes_raise(dtype: str, tmp_path: Path):
    with pytest.raises(TypeError, match=f"expected labels as integers or texts in .*bank.npz, got {dtype}; convert"):
        load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=LABELS.astype(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_labels_of_torch_raise(dtype: torch.dtype, tmp_path: Path):
    path = pt(tmp_path, {"embeddings": torch.ones(2, 3), "labels": torch.zeros(2, dtype=dtype)})
    with pytest.raises(TypeError, match=r"^expected labels as integers or texts"):
        load_bank(path)


def test_float_labels_beside_an_npy_raise(tmp_path: Path):
    with pytest.raises((TypeError, ValueError), match=r"^expected .*integers or texts.* float64"):
        load_bank(npy(tmp_path, labels=LABELS.astype(float)))


def test_labels_that_int64_does_not_hold_raise(tmp_path: Path):
    labels = np.array([0, 1, 2, 3, 4, 2**63 - 1], dtype=np.uint64)
    assert load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=labels)).labels[-1] == 2**63 - 1
    labels[-1] = 2**63
    with pytest.raises(ValueError, match=r"expected labels below 2\*\*63 in .*bank.npz, got 9223372036854775808"):
        load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=labels))


@pytest.mark.parametrize("labels", [LABELS[:5], np.append(LABELS, 1), LABELS[:, None], LABELS[0], LABELS[:0]])
def test_labels_of_another_shape_raise(labels: np.ndarray, tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected the bank's labels of shape \(6,\)"):
        load_bank(npz(tmp_path, embeddings=EMBEDDINGS, labels=labels))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_raises_in_every_format(value: float, tmp_path: Path):
    broken = EMBEDDINGS.copy()
    broken[2, 1] = value
    save_numpy({"embeddings": broken, "labels": LABELS}, tmp_path / "bank.safetensors")
    paths = [npy(tmp_path, broken), npz(tmp_path, embeddings=broken, labels=LABELS), tmp_path / "bank.safetensors"]
    paths.append(pt(tmp_path, (torch.from_numpy(broken), torch.from_numpy(LABELS))))
    for path in paths:
        with pytest.raises(ValueError, match=r"expected finite embeddings, got NaN or infinity in 1 of 6 rows.*row 2"):
            load_bank(path)


@pytest.mark.parametrize(
    "embeddings",
    [
        EMBEDDINGS.astype(int),
        EMBEDDINGS.astype(complex),
        EMBEDDINGS[0],
        EMBEDDINGS[..., None],
        EMBEDDINGS.astype(str),
        EMBEDDINGS.astype(np.longdouble),
        EMBEDDINGS.astype(bool),
        EMBEDDINGS.view([("x", "f4")]),
        EMBEDDINGS.astype("M8[s]"),
    ],
    ids=lambda array: f"{array.dtype} {array.ndim}",
)
def test_embeddings_that_are_no_rows_of_floats_raise(embeddings: np.ndarray, tmp_path: Path):
    for path in (npz(tmp_path, embeddings=embeddings, labels=LABELS), npy(tmp_path, embeddings)):
        with pytest.raises((TypeError, ValueError), match=r"^expected "):
            load_bank(path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bank.csv", "bank", "bank.NPZ", "bank.pkl", "bank.npzz"])
def test_unknown_endings_raise(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected the file's ending as one of '\.npy', '\.npz'"):
        load_bank(tmp_path / name)
    with pytest.raises(ValueError, match="expected the file's ending as one of"):
        load_bank(npy(tmp_path), labels=tmp_path / name)


@pytest.mark.parametrize("suffix", bank_file.FORMATS)
def test_missing_files_and_folders_raise(suffix: str, tmp_path: Path):
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("nowhere", "folder"):
        with pytest.raises(FileNotFoundError, match=f"expected a file of embeddings or labels at .*{name}"):
            load_bank(tmp_path / f"{name}{suffix}")


class MakesAFile:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_would_run_code_are_refused_and_do_not(tmp_path: Path):
    trap = tmp_path / "trap"
    objects = np.array([MakesAFile(trap), 2], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", embeddings=EMBEDDINGS, labels=objects)
    torch.save({"embeddings": torch.ones(2, 3), "labels": MakesAFile(trap)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(MakesAFile(trap)))
    (tmp_path / "c.pt").write_bytes(pickle.dumps(MakesAFile(trap), protocol=2))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(MakesAFile(trap)))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(MakesAFile(trap)))
    for path in sorted(tmp_path.glob("*.*")):
        with pytest.raises(ValueError, match=r"expected arrays in .*broken or holds more than data"):
            load_bank(path)
        assert not trap.exists(), path
    np.load(tmp_path / "a.npy", allow_pickle=True)  # the trap works
    assert trap.is_dir()


def test_objects_that_do_nothing_are_refused_too(tmp_path: Path):
    names = np.array(["a", None, "b", 3, "c", "d"], dtype=object)
    for path in (npz(tmp_path, embeddings=EMBEDDINGS, labels=names), npy(tmp_path, labels=names)):
        with pytest.raises(ValueError, match=r"expected arrays in .*broken or holds more than data"):
            load_bank(path)
    with pytest.raises(ValueError, match=r"expected arrays in .*broken or holds more than data"):
        load_bank(pt(tmp_path, {"embeddings": torch.ones(2, 2), "labels": np.zeros(2, int)}))


def test_an_npz_with_a_file_that_is_no_array_is_refused(tmp_path: Path):
    path = npz(tmp_path, embeddings=EMBEDDINGS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.npy", b"not an array")
    with pytest.raises(ValueError, match=r"^expected "):
        load_bank(path)


def whole_file(kind: str, folder: Path) -> bytes:
    """A bank in each format, as bytes."""
    out = io.BytesIO()
    pair = {"embeddings": torch.from_numpy(EMBEDDINGS), "labels": torch.from_numpy(LABELS)}
    if kind == "npy":
        np.save(out, EMBEDDINGS)
    elif kind == "npz":
        np.savez(out, embeddings=EMBEDDINGS, labels=LABELS)
    elif kind == "compressed npz":
        np.savez_compressed(out, embeddings=EMBEDDINGS, labels=LABELS)
    elif kind == "pt":
        torch.save(pair, out)
    elif kind == "old pt":
        torch.save(pair, out, _use_new_zipfile_serialization=False)
    else:
        save_bank(folder / "whole.safetensors", bank(source="s"))
        return (folder / "whole.safetensors").read_bytes()
    return out.getvalue()


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """The file cut short, with some bytes changed, moved or repeated, or of nothing but random bytes."""
    data = bytearray(whole)
    # headers are where formats differ: half of the changes fall into the first 128 bytes or the last
    start, end = [(0, min(128, len(data))), (max(0, len(data) - 128), len(data)), (0, len(data)), (0, len(data))][
        rng.integers(4)
    ]
    place = int(rng.integers(start, end))
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        return rng.bytes(int(rng.integers(0, 300)))
    if kind == 2:
        return bytes(data[:place] + data[place + int(rng.integers(1, 9)) :])
    if kind == 3:
        return bytes(data[:place]) + rng.bytes(int(rng.integers(1, 9))) + bytes(data[place:])
    if kind == 4:
        data[place] ^= 1 << int(rng.integers(8))
        return bytes(data)
    for _ in range(int(rng.integers(1, 5))):
        data[int(rng.integers(start, end))] = int(rng.choice([rng.integers(256), *b"0123456789><|fiucOSU(),'{}:L"]))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # of numpy and torch on what is broken
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("npy", ".npy"),
        ("npz", ".npz"),
        ("compressed npz", ".npz"),
        ("pt", ".pt"),
        ("old pt", ".pt"),
        ("safetensors", ".safetensors"),
    ],
)
def test_broken_files_end_in_an_error_that_says_what_was_expected(kind: str, suffix: str, tmp_path: Path):
    """Or are read, where the change fell on numbers; what comes then is a bank like any other."""
    whole = whole_file(kind, tmp_path)
    np.save(tmp_path / "bank_labels.npy", LABELS)  # of the .npy
    rng = np.random.default_rng(0)
    leaks: dict[str, str] = {}
    refused = 0
    for number in range(250):
        data = mutated(whole, rng)
        path = tmp_path / f"bank{suffix}"
        path.unlink(missing_ok=True)  # a new file: the last one may still be mapped
        path.write_bytes(data)
        try:
            loaded = load_bank(path)
            assert isinstance(loaded, EmbeddingBank)
            assert len(loaded.labels) == len(loaded.embeddings)
        except (ValueError, TypeError, FileNotFoundError) as error:
            refused += 1
            if not str(error).startswith("expected "):
                leaks[f"{type(error).__name__}: {str(error)[:100]}"] = f"change {number}"
        except Exception as error:
            leaks[f"{type(error).__name__}: {str(error)[:100]}"] = f"change {number}"
    gc.collect()  # files that are left open have a test of their own
    assert leaks == {}
    assert refused > 50


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", bank_file.FORMATS)
def test_empty_files_and_files_of_other_formats_raise(suffix: str, tmp_path: Path):
    np.save(tmp_path / "bank_labels.npy", LABELS)
    path = tmp_path / f"bank{suffix}"
    for content in (b"", b"\0" * 64, b"\xff" * 64, b"embeddings,labels\n0.5,1\n", b"{}", b"PK\x05\x06" + b"\0" * 18):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^expected "):
            load_bank(path)
    gc.collect()


@pytest.mark.parametrize("suffix", bank_file.FORMATS)
@pytest.mark.parametrize("start", [0, 60])
def test_a_broken_file_is_closed_again(suffix: str, start: int, tmp_path: Path):
    path = tmp_path / f"bank{suffix}"
    path.write_bytes(whole_file("npz", tmp_path)[:start] + b"PK\x03\x04" * 20)
    np.save(tmp_path / "bank_labels.npy", LABELS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load_bank(path)
        except Exception as error:
            assert not isinstance(error, FileNotFoundError)  # noqa: PT017
        gc.collect()
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []
