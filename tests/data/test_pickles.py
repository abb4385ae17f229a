"""read_plain_pickle: data as pickle itself reads it, and hostile files, which pickle itself would run."""

import builtins
import collections
import copyreg
import datetime
import functools
import operator
import os
import pickle
import re
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.data.pickles import read_plain_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    def read_content(content: bytes) -> Any:
        (tmp_path / "a.pkl").write_bytes(content)
        return read_plain_pickle(tmp_path / "a.pkl")

    return read_content


def told(value: Any) -> Any:
    """All of a structure as texts, which compare as equal where types, shapes and values are (a NaN too)."""
    if isinstance(value, dict):
        return ["dict", *([told(key), told(each)] for key, each in value.items())]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(told, value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, value))]
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, value.shape, value.tobytes()]
    return [type(value).__name__, repr(value)]


# What pickle runs

EXTENSION = 0xF0  # a code for EXT1


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class MakesByNew:
    def __new__(cls, path: str) -> "MakesByNew":
        Path(path).mkdir()
        return super().__new__(cls)


class MakesByState:
    def __init__(self, path: str) -> None:
        self.path = path

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        Path(path).mkdir()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def names(path: str) -> dict[str, tuple[bytes, str]]:
    """For each trick: the pickle that makes the folder, and what the refusal has to name."""
    code, quoted, here = f"__import__('os').mkdir({path!r})", f"S'{path}'\n".encode(), __name__.encode()
    mkdir = f"{os.mkdir.__module__}.mkdir"  # posix.mkdir, nt.mkdir
    hidden = np.empty(1, dtype=object)
    hidden[0] = Calls(os.mkdir, path)
    with Path(path + ".npy").open("wb") as file:
        np.save(file, hidden, allow_pickle=True)
    pathlib_mkdir = Calls(operator.methodcaller("mkdir"), Path(path))
    tricks = {
        "INST": (b"(" + quoted + b"ios\nmkdir\n.", "os.mkdir"),
        "OBJ": (b"(cos\nmkdir\n" + quoted + b"o.", "os.mkdir"),
        "GLOBAL": (b"cos\nmkdir\n(" + quoted + b"tR.", "os.mkdir"),
        "STACK_GLOBAL": (b"\x80\x04" + text("os") + text("mkdir") + b"\x93(" + text(path) + b"tR.", "os.mkdir"),
        "dotted": (
            b"\x80\x04" + text("shutil") + text("os.mkdir") + b"\x93(" + text(path) + b"tR.",
            "shutil.os.mkdir",
        ),
        "NEWOBJ": (b"\x80\x02c%b\nMakesByNew\n" % here + text(path) + b"\x85\x81.", "MakesByNew"),
        "NEWOBJ_EX": (b"\x80\x04c%b\nMakesByNew\n)}" % here + text("path") + text(path) + b"s\x92.", "MakesByNew"),
        "EXT1": (b"\x80\x02\x82" + bytes([EXTENSION]) + text(path) + b"\x85R.", "EXT1"),
        "EXT2": (b"\x80\x02\x83" + bytes([EXTENSION, 0]) + text(path) + b"\x85R.", "EXT2"),
        "EXT4": (b"\x80\x02\x84" + bytes([EXTENSION, 0, 0, 0]) + text(path) + b"\x85R.", "EXT4"),
        "getattr": (
            b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'mkdir'\ntR(" + quoted + b"tR.",
            "__builtin__.getattr",
        ),
        "thrown away": (b"(cos\nmkdir\n(" + quoted + b"tR0lp0\n.", "os.mkdir"),
        "os.system": (pickle.dumps(Calls(os.system, f"mkdir {path}")), "system"),
        "subprocess": (pickle.dumps(Calls(subprocess.call, ["mkdir", path])), "subprocess.call"),
        "eval": (pickle.dumps(Calls(builtins.eval, code)), "builtins.eval"),
        "exec": (pickle.dumps(Calls(builtins.exec, code), 2), "__builtin__.exec"),
        "partial": (pickle.dumps(Calls(functools.partial(os.mkdir, path))), "functools.partial"),
        "methodcaller": (pickle.dumps(pathlib_mkdir), "operator.methodcaller"),
        "numpy.load": (pickle.dumps(Calls(np.load, path + ".npy", None, True)), "numpy.load"),
    }
    for protocol in PROTOCOLS:
        tricks |= {
            f"REDUCE {protocol}": (pickle.dumps(Calls(os.mkdir, path), protocol), mkdir),
            f"BUILD {protocol}": (pickle.dumps(MakesByState(path), protocol), "" if protocol < 2 else "MakesByState"),
            f"deep {protocol}": (pickle.dumps({"a": [1, (Calls(os.mkdir, path),)]}, protocol), mkdir),
            f"object array {protocol}": (pickle.dumps({"image_data": hidden}, protocol), "'O8'"),
        }
    return tricks


@pytest.fixture
def _extension() -> Iterator[None]:
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield
    copyreg.remove_extension("os", "mkdir", EXTENSION)


@pytest.mark.usefixtures("_extension")
def test_what_pickle_would_run_is_refused_by_name_and_not_run(read: Callable[[bytes], Any], tmp_path: Path):
    made = tmp_path / "made"
    tricks = names(str(made))
    assert len(tricks) > 40
    for trick, (content, named) in tricks.items():
        with pytest.raises(UsageError, match=rf"got [^()]*{re.escape(named)}.*nothing of it was run"):
            read(content)
        assert not made.exists(), trick
        pickle.loads(content)  # noqa: S301 (the trick works)
        assert made.is_dir(), trick
        made.rmdir()


def array_of(shape: bytes = b"K\x06\x85", dtype: bytes = b"u1", order: bytes = b"|", raw: bytes = b"abcdef") -> bytes:
    """What Python 3 and numpy 2 write in protocol 3, by hand."""
    kind = b"cnumpy\ndtype\nX%b%b\x89\x88\x87R" % (struct.pack("<I", len(dtype)), dtype)
    kind += b"(K\x03X\x01\0\0\0%bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb" % order
    state = b"(K\x01%b%b\x89C%c%btb" % (shape, kind, len(raw), raw)
    return b"\x80\x03cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R" + state + b"."


NOT_DATA = {
    "datetime": (pickle.dumps(datetime.date(2000, 1, 1)), "datetime.date"),
    "a class's object": (pickle.dumps(Path()), "pathlib"),
    "an ordered dict": (pickle.dumps(collections.OrderedDict(a=1)), "collections.OrderedDict"),
    "a torch tensor": (pickle.dumps(torch.ones(2)), "torch._utils._rebuild_tensor_v2"),
    "a class": (pickle.dumps(UsageError), "pml_fewshot.checks.UsageError"),
    "a numpy function": (pickle.dumps(np.fromfile), "numpy"),
    "a known class": (pickle.dumps(np.ndarray), "numpy.ndarray"),
    "a known class in a list": (pickle.dumps([np.ndarray]), "numpy.ndarray"),
    "a known class as a key": (pickle.dumps({np.ndarray: 1}), "numpy.ndarray"),
    "a dtype": (pickle.dumps(np.dtype("u1")), "a dtype"),
    "a dtype in a tuple": (pickle.dumps([(np.dtype("u1"),)]), "a arguments"),
    "fields": (pickle.dumps(np.zeros(2, dtype=[("a", "i4")])), "'V4'"),
    "times": (pickle.dumps(np.zeros(2, dtype="M8[s]")), "'M8'"),
    "a bytearray": (pickle.dumps(bytearray(b"x")), "bytearray"),
    "a bytearray, protocol 5": (pickle.dumps(bytearray(b"x"), 5), "a bytearray"),
    "a matrix": (pickle.dumps(np.ones(2).view(np.recarray)), "numpy"),
    "an array's subclass": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.", "numpy.dtype"),
    "another codec": (b"c_codecs\nencode\n(Vuryyb\nVrot13\ntR.", "'rot13'"),
    "bytes of a number": (b"c__builtin__\nbytes\n(I99\ntR.", "builtins.bytes"),
    "a set of anything": (b"c__builtin__\nset\n(cnumpy\ndtype\ntR.", "builtins.set"),
    "a text that is called": (b"V_codecs.encode\n(Vx\nVlatin1\ntR.", "_codecs.encode"),
    "attributes": (b"cnumpy\nndarray\n}Vshape\nI1\nsb.", "numpy.ndarray with a state"),
    "attributes in slots": (b"]N}Vappend\nI1\ns\x86b.", "a list with a state"),
    "a known class made": (b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.", "NEWOBJ"),
    "an array without bytes": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
        "have not come",
    ),
    "a persistent id": (b"\x80\x02X\x01\0\0\0aQ.", "a persistent id"),
    "a persistent id as text": (b"\x80\x02Pa\n.", "a persistent id"),
    "a buffer elsewhere": (pickle.dumps(np.ones(2), 5, buffer_callback=lambda buffer: None), "_BUFFER"),
    "a name of bytes": (b"\x80\x04C\x02osC\x06system\x93.", "a name of a bytes"),
    "a name of a deep list": (b"\x80\x04" + b"]" * 2000 + b"a" * 1999 + b"X\x01\0\0\0a\x93.", "a name of a list"),
    "items of a text": (b"\x80\x04X\x01\0\0\0aN\x61.", "'a' used as a list"),
    "a nested key": (b"}(((tttI1\ns.", "a tuple in a key"),
    "a deep key": (b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.", "a tuple in a key"),
    "a key of 2**90 parts": (b"\x80\x02})" + b"2\x86" * 90 + b"Ns.", "a tuple in a key"),
    "a list in a key": (b"\x80\x02}](NNtNs.", "used as"),
    "a zip": (b"PK\3\4\n\n", "a zip"),
}

DAMAGED = {
    "empty": b"",
    "text": b"hello, world\n",
    "a page": b"<html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "two pickles": b"N.N.",
    "no stop": b"N",
    "nothing to stop at": b".",
    "another protocol": b"\x80\x06N.",
    "a missing memo": b"h\x05.",
    "a missing mark": b"t.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "a number that is none": b"Ione\n.",
    "a huge number": b"I" + b"9" * 5000 + b"\n.",
    "a text without quotes": b"Sone\n.",
    "no UTF-8": b"X\x01\0\0\0\xff.",
    "longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "longer than memory": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
    "longer text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"a.",
    "of negative length": b"\x80\x02T\xff\xff\xff\xffa.",
    "a shape too large": array_of(shape=b"K\x07\x85"),
    "a shape too small": array_of(shape=b"K\x05\x85"),
    "a shape that overflows": array_of(shape=b"\x8a\x05\0\0\0\0\x01" * 2 + b"K\0\x87", raw=b"a"),
    "a shape of nothing, too large": array_of(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\0\x86", dtype=b"f8", raw=b""),
    "too many dimensions": array_of(shape=b"(" + b"K\x01" * 65 + b"t", raw=b"a"),
    "another type": array_of(dtype=b"u2", raw=b"abcde"),
    "no such type": array_of(dtype=b"i3"),
    "a type of nothing": array_of(dtype=b"S0", raw=b""),
    "a negative shape": array_of(shape=b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86"),
    "no bools": array_of(dtype=b"b1"),
    "no characters": array_of(dtype=b"U1", order=b"<", shape=b"K\x01\x85", raw=b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("found", NOT_DATA)
def test_what_is_not_data_is_refused_by_name(found: str, read: Callable[[bytes], Any]):
    content, named = NOT_DATA[found]
    with pytest.raises(UsageError, match=rf"got .*{re.escape(named)}.* \(before byte"):
        read(content)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_without_memory_for_what_they_announce(damage: str, read: Callable[[bytes], Any]):
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"a\.pkl, got no pickle or a damaged one .*; fetch it again"):
            read(DAMAGED[damage])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"expected a pickle at .*none\.pkl, got no such file"):
        read_plain_pickle(tmp_path / "none.pkl")


def test_a_memo_of_a_huge_index_takes_no_memory(read: Callable[[bytes], Any]):
    tracemalloc.start()
    try:  # pickle takes 64 GB
        assert read(b"\x80\x02K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == 5
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# What is read

ARRAYS = {
    "images": np.arange(2 * 84 * 84 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 84, 84, 3),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(6, dtype=">i2").reshape(2, 3),
    "permuted": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(24, dtype="<f4").reshape(4, 6)[::-1, ::2],
    "texts": np.array(["ab", "日本"]),
    "big-endian texts": np.array(["ab", "c"], dtype=">U2"),
    "bytes": np.array([b"ab", b"c"]),
    "bools": np.array([True, False]),
    "complex": np.array([1j, 2]),
    "half": np.array([0.5, np.nan], dtype=np.float16),
    "a number": np.array(3.5),
    "nothing": np.zeros((0, 84, 84, 3), dtype=np.uint8),
}
NUMBERS = [
    np.int64(-4),
    np.uint8(200),
    np.float32(1.5),
    np.bool_(True),
    np.complex128(2j),
    np.str_("é"),
    np.bytes_(b"z"),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_what_pickle_reads(protocol: int, read: Callable[[bytes], Any]):
    written = {"class_dict": {"n01": [0, 1], "n02": [*NUMBERS]}, "arrays": ARRAYS, "again": ARRAYS["images"]}
    written |= {
        "nested": {3: {(4, "a"): [{None: ()}, {1, 2}, frozenset("b")]}},
        "raw": [b"", b"\0\xff", 2**80, -(2**80), -1, 1e300, "\udc80"],
    }
    written |= {"Zeilen\n\\u0041 'ü'": (1, (2, (3, (4, 5, 6, 7)))), "empty": [[], {}, (), set(), "", True, 2 - 1j]}
    content = pickle.dumps(written, protocol)
    got = read(content)
    assert told(got) == told(written)
    assert got["again"] is got["arrays"]["images"]
    assert got["arrays"]["Fortran"].flags.f_contiguous
    for cut in (*range(0, 200), len(content) // 2, len(content) - 1):
        with pytest.raises(UsageError):
            read(content[:cut])


# As Python 2.7 and numpy 1.16 write {'image_data': array, 'class_dict': {'n01': [0, 1], 'n02': [numpy's 2, long 3]}}
PYTHON_2 = (
    b"\x80\x02}q\x01(U\nimage_dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
    b"\x87Rq\x05(K\x01(K\x02K\x01K\x02K\x02tcnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff"
    b"\xffJ\xff\xff\xff\xffK\x00tb\x89T\x08\x00\x00\x00\x00\x01\x7f\x80\xfe\xff\n'tbU\nclass_dictq\x08}q\t(U\x03n01q\n]"
    b"q\x0b(K\x00K\x01eU\x03n02q\x0c]q\r(cnumpy.core.multiarray\nscalar\nq\x0eh\x06U\x02i8K\x00K\x01\x87Rq\x0f(K\x03U\x01"
    b"<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08\x02\x00\x00\x00\x00\x00\x00\x00\x86Rq\x10\x8a\x01\x03euu."
)
PYTHON_2_TEXT = rb"""(dp1
S'image_data'
p2
cnumpy.core.multiarray
_reconstruct
p3
(cnumpy
ndarray
p4
(I0
tS'b'
tRp5
(I1
(I2
I1
I2
I2
tcnumpy
dtype
p6
(S'u1'
I0
I1
tRp7
(I3
S'|'
NNNI-1
I-1
I0
tbI00
S"\x00\x01\x7f\x80\xfe\xff\n'"
tbsS'class_dict'
p8
(dp9
S'n01'
p10
(lp11
I0
aI1
asS'n02'
p12
(lp13
I2
aL3L
ass."""


@pytest.mark.parametrize("content", [PYTHON_2, PYTHON_2_TEXT], ids=["protocol 2", "protocol 0"])
def test_reads_what_python_2_wrote(content: bytes, read: Callable[[bytes], Any]):
    got = read(content)
    assert told(got) == told(pickle.loads(content, encoding="latin1"))  # noqa: S301
    assert got["image_data"].tolist() == [[[[0, 1], [127, 128]]], [[[254, 255], [10, 39]]]]
    assert got["class_dict"] == {"n01": [0, 1], "n02": [2, 3]}


def test_a_list_in_itself_comes_as_it_is(read: Callable[[bytes], Any]):
    got = read(b"\x80\x02]q\x00h\x00a.")
    assert got[0] is got


@pytest.mark.parametrize("protocol", ["Python 2", 3, 4, 5])
def test_large_arrays_are_in_memory_once(protocol: int | str, read: Callable[[bytes], Any]):
    images = np.zeros((100, 84, 84, 3), dtype=np.uint8)
    if protocol == "Python 2":
        content = PYTHON_2.replace(b"(K\x02K\x01K\x02K\x02t", b"(KdKTKTK\x03t")
        content = content.replace(
            PYTHON_2[(at := PYTHON_2.index(b"T\x08")) : at + 13],
            struct.pack("<ci", b"T", images.size) + images.tobytes(),
        )
    else:
        content = pickle.dumps({"image_data": images}, int(protocol))
    tracemalloc.start()
    try:
        got = read(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(got["image_data"], images)
    assert peak < 1.1 * images.size


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
numpy_types = npst.scalar_dtypes().filter(lambda dtype: dtype.kind not in "mM")
arrays = npst.arrays(numpy_types, npst.array_shapes(min_dims=0, min_side=0, max_side=4))
keys = scalars | st.tuples(scalars, scalars)
structures = st.recursive(
    scalars | arrays | st.frozensets(keys) | st.sets(keys),
    lambda inner: (
        st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(structures, st.sampled_from(PROTOCOLS))
def test_reads_any_structure(tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int):
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert told(read_plain_pickle(path)) == told(value)


def test_changed_bytes_are_read_or_refused(read: Callable[[bytes], Any]):
    rng = np.random.default_rng(0)
    whole = [pickle.dumps({"a": ARRAYS["big-endian"], "b": {"c": [1, NUMBERS[0]]}}, p) for p in PROTOCOLS] + [PYTHON_2]
    refused = 0
    for _ in range(300):
        content = bytearray(whole[rng.integers(len(whole))])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            read(bytes(content))
        except UsageError:
            refused += 1
    assert 150 < refused < 300
