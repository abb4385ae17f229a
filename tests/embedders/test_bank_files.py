"""save_bank and load_bank: banks come back as they were, files of other tools are read in all their forms."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy

from pml_fewshot.checks import MissingFileError, MissingPackageError, UsageError, UsageTypeError
from pml_fewshot.embedders.bank import EmbeddingBank, load_bank, save_bank
from pml_fewshot.embedders.feature_files import FORMATS, read_file
from tests.embedders.made_banks import EMBEDDINGS, LABELS, NAMES, NUMBERED, NUMBERS, ROWS, SOURCE, TEXTS, bank, check


def save(folder: Path, suffix: str, arrays: dict[str, np.ndarray]) -> Path:
    """A file of arrays by name, a table of them in the formats of tables."""
    path = folder / f"bank{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".safetensors":
        save_numpy(arrays, path)
    elif suffix in (".h5", ".hdf5"):
        with pytest.importorskip("h5py").File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array.tolist() if array.dtype.kind == "U" else array
    elif suffix in (".pt", ".pth"):
        torch.save(arrays, path)
    else:
        columns = {f"{name}{i}": a[:, i] for name, a in arrays.items() if a.ndim == 2 for i in range(a.shape[1])}
        columns |= {name: a for name, a in arrays.items() if a.ndim == 1}
        length = min(map(len, columns.values()))
        table = pytest.importorskip("pandas").DataFrame({name: column[:length] for name, column in columns.items()})
        if suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, sep="\t" if suffix == ".tsv" else ",")  # with row numbers, as people write it
    return path


def write(folder: Path, suffix: str, embeddings: np.ndarray = EMBEDDINGS, labels: np.ndarray = LABELS) -> Path:
    if suffix != ".npy":
        return save(folder, suffix, {"e": embeddings, "label": labels})
    np.save(folder / "bank.npy", embeddings)
    np.save(folder / "bank_labels.npy", labels)
    return folder / "bank.npy"


def pt(folder: Path, what: Any, name: str = "bank.pt") -> Path:
    torch.save(what, folder / name)
    return folder / name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bank_comes_back_to_the_last_bit(dtype: torch.dtype, tmp_path: Path):
    original = bank(dtype, SOURCE if dtype == torch.float32 else "")
    save_bank(tmp_path / "bank.safetensors", EmbeddingBank(torch.ones(2, 3), torch.arange(2)))  # replaced
    save_bank(tmp_path / "bank.safetensors", original)
    loaded = load_bank(tmp_path / "bank.safetensors")
    check(loaded, original.embeddings)
    assert (loaded.source, loaded.note) == (original.source, "of a test")
    named = EmbeddingBank(ROWS, TEXTS).centered(torch.zeros(4))
    save_bank(tmp_path / "bank.safetensors", named)
    check(load_bank(tmp_path / "bank.safetensors"), labels=NUMBERED, names=NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_other_endings_are_neither_saved_to_nor_read(tmp_path: Path):
    with pytest.raises(UsageError, match=r"expected a path that ends with \.safetensors, got .*; rename it"):
        save_bank(tmp_path / "bank.npz", bank())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bank.txt").write_bytes(b"x")
    for arguments in ((tmp_path / "bank.txt",), (write(tmp_path, ".npy"), tmp_path / "bank.txt")):
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
    np.save(path, EMBEDDINGS)
    np.save(tmp_path / "others.npy", LABELS[::-1])
    assert load_bank(path, str(tmp_path / "others.npy")).labels.tolist() == LABELS[::-1].tolist()
    (tmp_path / "bank_labels.npy").unlink()
    with pytest.raises(MissingFileError, match=r"expected a file of .*labels at .*bank_labels\.npy"):
        load_bank(path)
    lone = pt(tmp_path, ROWS)
    for labels in (NUMBERS, LABELS, LABELS.tolist(), (ROWS, NUMBERS), {"y": NUMBERS}):
        check(load_bank(lone, pt(tmp_path, labels, "labels.pt")))
    check(load_bank(lone, pt(tmp_path, tuple(TEXTS), "labels.pt")), labels=NUMBERED, names=NAMES)
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


BY_CLASS = {"cat": ROWS[[0, 2]], "ant": ROWS[[1, 5]], "dog": ROWS[[3]], "bee": ROWS[[4]]}  # of other sizes
OF_CLASSES = {"embeddings": ROWS[[0, 2, 1, 5, 3, 4]], "labels": [2, 2, 0, 0, 3, 1], "names": NAMES}
IN_THREES = {"labels": [0, 0, 0, 1, 1, 1]}
PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dict": ({"embeddings": ROWS, "labels": NUMBERS, "epoch": 3}, {}),
    "other names": ({"feats": torch.nn.Parameter(ROWS.clone()), "y": LABELS.tolist(), "groups": [{}], "no": []}, {}),
    "numpy": ({"embeddings": EMBEDDINGS, "labels": LABELS, "right": LABELS > 0}, {}),
    "numpy, swapped": ({"embeddings": np.asfortranarray(EMBEDDINGS).astype(">f4"), "labels": LABELS.astype(">i8")}, {}),
    "numpy texts": ((EMBEDDINGS, np.array(TEXTS)), {"labels": NUMBERED, "names": NAMES}),
    "numpy bytes": ((EMBEDDINGS, np.array(TEXTS, "S")), {"labels": NUMBERED, "names": NAMES}),
    "pair": ((ROWS, NUMBERS), {}),
    "pair with a list": ([ROWS, LABELS.tolist()], {}),
    "pair with texts": ((ROWS, tuple(TEXTS)), {"labels": NUMBERED, "names": NAMES}),
    "lists": ({"embeddings": EMBEDDINGS.tolist(), "labels": LABELS.tolist()}, {}),
    "list of rows": ({"embeddings": list(ROWS), "labels": list(NUMBERS)}, {}),
    "pairs": (list(zip(ROWS, TEXTS, strict=True)), {"labels": NUMBERED, "names": NAMES}),
    "pairs of numpy": ([(row, int(n)) for row, n in zip(EMBEDDINGS, LABELS, strict=True)], {}),
    "names beside": ({"x": ROWS, "y": NUMBERED, "class_names": NAMES}, {"labels": NUMBERED, "names": NAMES}),
    "texts and names": ((lambda names: {"x": ROWS, "y": TEXTS, "class_names": names})(NAMES[::-1]), {}),
    "three axes": (ROWS.view(2, 3, 4), IN_THREES),
    "three axes by name": ({"features": EMBEDDINGS.reshape(2, 3, 4), "epoch": 3}, IN_THREES),
    "by class": (BY_CLASS, OF_CLASSES),
    "numpy by class": ({name: rows.numpy() for name, rows in BY_CLASS.items()}, OF_CLASSES),
    "lists by class": ({name: rows.tolist() for name, rows in BY_CLASS.items()}, OF_CLASSES),
    "by number": ({7: ROWS[:2], -3: ROWS[2:]}, {"labels": [7, 7, -3, -3, -3, -3]}),
    "by class in a dict": ({"features": BY_CLASS}, OF_CLASSES),
}
PARTS["texts and names"][1].update(labels=[3 - number for number in NUMBERED], names=NAMES[::-1])


@pytest.mark.parametrize("name", PARTS)
def test_pt_in_every_form(name: str, tmp_path: Path):
    given, expected = PARTS[name]
    check(load_bank(pt(tmp_path, given)), **expected)


def test_a_key_may_name_a_group(tmp_path: Path):
    path = pt(tmp_path, {"train": {"x": EMBEDDINGS, "y": LABELS}, "test": BY_CLASS, "epoch": 3})
    check(load_bank(path, embeddings_key="train"))
    check(load_bank(path, embeddings_key="test"), **OF_CLASSES)
    with pytest.raises(UsageError, match=r"one array of embeddings, .*, got train a dict of 'x', 'y', test a dict of"):
        load_bank(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_arrays_by_class_in_other_formats(suffix: str, tmp_path: Path):
    names = ["ant", "bee", "cat", "dog"]  # (HDF5 sorts them)
    loaded = load_bank(save(tmp_path, suffix, {name: BY_CLASS[name].numpy() for name in names}))
    check(loaded, torch.cat([BY_CLASS[name] for name in names]), [0, 0, 1, 2, 2, 3], names)
    assert loaded.note == ""


def test_hdf5_with_texts_images_and_a_group(tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    images = np.zeros((6, 3, 2, 2), dtype=np.float32)
    check(
        load_bank(save(tmp_path, ".h5", {"e": EMBEDDINGS, "l": np.array(TEXTS), "images": images})),
        ROWS,
        NUMBERED,
        NAMES,
    )
    assert "images" not in read_file(tmp_path / "bank.h5")[0]
    with h5py.File(tmp_path / "group.h5", "w") as file:
        for name, rows in BY_CLASS.items():
            file[f"features/{name}"] = rows.numpy()
    check(load_bank(tmp_path / "group.h5"), ROWS[[1, 5, 4, 0, 2, 3]], [0, 0, 1, 2, 2, 3], NAMES)


def test_npy_of_three_axes_stays_a_map(tmp_path: Path):
    path = tmp_path / "bank.npy"
    np.save(path, EMBEDDINGS.reshape(2, 3, 4))
    loaded = load_bank(path)
    check(loaded, **IN_THREES)
    np.load(path, mmap_mode="r+")[1, 0, 2] = 7
    assert loaded.embeddings[3, 2] == 7
    np.save(tmp_path / "bank_labels.npy", LABELS)
    with pytest.raises(UsageError, match=r"embeddings of shape \(M, D\), got shape \(2, 3, 4\)"):
        load_bank(path)


@pytest.mark.parametrize(
    "names",
    [
        *(("train", "test"), ("x_train", "x_test"), ("feat_1", "feat_2"), ("Query", "Gallery"), ("arr_0", "arr_1")),
        *(("clip_features", "dino_features"), ("layers.0.weight", "layers.1.weight"), ("cat", "val"), ("X2", "dog")),
    ],
)
def test_arrays_with_the_name_of_a_role_are_no_classes(names: tuple[str, str], tmp_path: Path):
    do = "say which by embeddings_key, .* or give them to EmbeddingBank.from_features where these are classes"
    with pytest.raises(UsageError, match=f"one array of embeddings, .*, got {names[0]} .*, {names[1]} .*; {do}"):
        load_bank(pt(tmp_path, dict.fromkeys(names, ROWS)))


@pytest.mark.parametrize(
    "parts",
    [
        {"cat": ROWS, "dog": ROWS, "more": ROWS[0]},
        {"cat": ROWS, "dog": ROWS, "ids": NUMBERS},
        {"cat": ROWS, "dog": ROWS, "class_names": list(TEXTS), "ids": TEXTS},
        {"cat": ROWS.long(), "dog": ROWS.long()},
        {"cat": ROWS.view(2, 3, 4), "dog": ROWS.view(2, 3, 4)},
    ],
)
def test_dicts_with_other_arrays_too_are_no_classes(parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(UsageError, match=r"one array of embeddings, .*, got cat"):
        load_bank(pt(tmp_path, parts))
    with pytest.raises(UsageError, match="one array of embeddings"):
        load_bank(pt(tmp_path, BY_CLASS), pt(tmp_path, NUMBERS, "labels.pt"))


@pytest.mark.parametrize(
    "what", [3, (torch.ones(1),), None, {"embeddings": 3}, {"embeddings": np.ones((2, 2))}, [], {}, [[ROWS], 3], "text"]
)
def test_pt_of_something_else_is_refused(what: Any, tmp_path: Path):
    with pytest.raises(UsageError, match=r"^expected "):
        load_bank(pt(tmp_path, what))


class Call:
    """What a pickle can make whoever loads it do."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


HOSTILE = {
    "system": (Call(os.system, ("touch marker",)), r"\(\w+\.system\)"),
    "objects": (np.array([1, "a"], dtype=object), r"\(an array of 'O8'\)"),
    "fields": (np.zeros(3, [("a", "f4")]), r"\(an array of 'V4'\)"),
    # bytes that would be taken for pointers to objects
    "pointers": (
        Call(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
        r"\(an array of 'V8'\)",
    ),
    "other functions of numpy": (Call(np.fromfile, ("bank.pt",)), r"\(numpy.fromfile\)"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_pt_that_holds_more_than_data_is_refused_and_runs_nothing(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    what, reason = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    torch.save({"embeddings": ROWS, "labels": what}, "bank.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UsageError, match=f"expected arrays in bank.pt, got a file that is broken .* {reason}; write plain"
    ):
        load_bank("bank.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["bank.pt"]


def test_characters_and_truth_values_that_are_none_do_no_harm(tmp_path: Path):
    path = tmp_path / "bank.pt"
    torch.save((EMBEDDINGS[:1], np.array(["a"])), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"a\0\0\0", b"\x7f" * 4))
    with pytest.raises(UsageError, match=r"expected arrays in .*bank.pt, got a file that is broken"):
        load_bank(path)
    torch.save({"right": np.ones(4, dtype=bool)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"\1\1\1\1", b"\2\2\2\2"))
    assert read_file(path)[0]["right"].view(np.uint8).tolist() == [1] * 4


def test_numpy_in_pt_of_numpy_1_and_beside_what_the_user_allows(tmp_path: Path):
    path, allowed = tmp_path / "bank.pt", torch.serialization.get_safe_globals()
    torch.save((EMBEDDINGS, LABELS), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    check(load_bank(path))
    own = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np.dtypes.Float32DType, Call]  # type: ignore[attr-defined]
    with torch.serialization.safe_globals(own):
        check(load_bank(path))
        assert set(torch.serialization.get_safe_globals()) == {*allowed, *own}
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(suffix: str, tmp_path: Path):
    check(load_bank(save(tmp_path, suffix, {"e": EMBEDDINGS, "species": np.array(TEXTS)})), ROWS, NUMBERED, NAMES)
    path = save(tmp_path, suffix, {"e": EMBEDDINGS, "id": LABELS})
    check(load_bank(path, labels_key="id"))
    with pytest.raises(UsageError, match=r"a column of labels \(.*\) in .*bank\..*, got columns .*; .*labels_key"):
        load_bank(path)
    with pytest.raises(
        UsageError, match=r"labels in a column named 'y' in .*bank\..*, got columns .*e0 float32, .*; name another"
    ):
        load_bank(path, labels_key="y")
    alone = save(tmp_path, suffix, {"y": LABELS}).rename(tmp_path / f"labels{suffix}")
    check(load_bank(save(tmp_path, suffix, {"e": EMBEDDINGS}), alone))
    check(load_bank(pt(tmp_path, ROWS), alone))


def test_parquet_as_hugging_face_writes_it(tmp_path: Path):
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {"image": TEXTS, "clip": list(EMBEDDINGS), "dino": list(EMBEDDINGS + 1), "label": LABELS, "id": range(6)}
    pandas.DataFrame(columns).to_parquet(tmp_path / "bank.parquet")
    check(load_bank(tmp_path / "bank.parquet", embeddings_key="clip"))
    for key in (None, "image", "nowhere"):
        with pytest.raises(
            UsageError, match=r"lists in .*bank.parquet, got columns .*; say which by embeddings_key|lists in a col"
        ):
            load_bank(tmp_path / "bank.parquet", embeddings_key=key)
    del columns["dino"]
    pandas.DataFrame(columns).to_parquet(tmp_path / "bank.parquet")
    check(load_bank(tmp_path / "bank.parquet"))


@pytest.mark.parametrize(
    "text", ["0.25,1.5,cat\n0.5,2.5,dog\n", "a,label\n1.5,2.5,cat\n0.5,0.5,dog\n", "-1e-05,b\n0.5,x\n"]
)
def test_csv_without_a_name_for_every_column_is_refused(text: str, tmp_path: Path):
    pytest.importorskip("pandas")
    (tmp_path / "bank.csv").write_text(text)
    with pytest.raises(UsageError, match=r"a first line with a name for every column in .*bank.csv, got '.*; add it"):
        load_bank(tmp_path / "bank.csv")


@pytest.mark.parametrize(
    ("suffix", "needed", "missing"),
    [(".csv", "pandas", "pandas"), (".parquet", "pandas and pyarrow", "pyarrow"), (".h5", "h5py", "h5py")],
)
def test_a_package_that_is_not_there_is_named_with_its_extra(
    suffix: str, needed: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / f"bank{suffix}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, missing, None)
    pip = r"pip install 'pml_fewshot\[tables\]'"
    wanted = f"expected {needed} to read .*bank{suffix}, got no {missing} installed; {pip}"
    with pytest.raises(MissingPackageError, match=wanted):
        load_bank(tmp_path / f"bank{suffix}")


@pytest.mark.parametrize("dtype", ["U", "S", "int8", "uint8", "uint16", "int32", "uint64"])
def test_labels_of_any_integers_and_texts_numbered_in_alphabetical_order(dtype: str, tmp_path: Path):
    labels = np.array(TEXTS if dtype in "US" else NUMBERED).astype(dtype)
    check(load_bank(write(tmp_path, ".npz", labels=labels)), labels=NUMBERED, names=NAMES if dtype in "US" else ())
    names = NAMES if dtype in "US" else "0123"
    check(
        load_bank(pt(tmp_path, {"embeddings": ROWS, "labels": labels.astype("U").tolist()})),
        labels=NUMBERED,
        names=names,
    )


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_labels_beyond_int64_are_refused(suffix: str, tmp_path: Path):
    with pytest.raises(UsageError, match=r"labels below 2\*\*63, got 18446744073709551615"):
        load_bank(write(tmp_path, suffix, labels=np.full(6, 2**64 - 1, dtype=np.uint64)))


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64"])
def test_labels_that_are_no_numbers_of_classes_are_refused(dtype: str, tmp_path: Path):
    path = write(tmp_path, ".npy", labels=LABELS.astype(dtype))
    with pytest.raises(UsageTypeError, match=f"the bank's labels as integers or texts, got .*{dtype}; conv"):
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
    if suffix not in (".csv", ".tsv", ".parquet"):
        with pytest.raises(UsageError, match=r"expected the bank's labels of shape \(6,\)"):
            load_bank(write(tmp_path, suffix, labels=LABELS[:5]))
    path = write(tmp_path, suffix)
    check(load_bank(path))
    contents = [b"", b"\0" * 64, b"{}", b"embeddings,labels\n0.5,1\n", path.read_bytes()[:-9]]
    for content in contents[: 3 if suffix in (".csv", ".tsv") else 5]:
        (tmp_path / f"other{suffix}").write_bytes(content)
        with pytest.raises(UsageError, match=r"^expected .*other"):
            load_bank(tmp_path / f"other{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("nowhere", "folder"):
        with pytest.raises(MissingFileError, match=f"expected a file of embeddings or labels at .*{name}"):
            load_bank(tmp_path / f"{name}{suffix}")
