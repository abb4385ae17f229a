"""Reads pickles that hold nothing but data, such as miniImageNet's caches, without running anything.

Why not a `pickle.Unpickler` with our own `find_class`? It can be made to run nothing, but eight bytes make it allocate
64 GB (a memo with that index), a nested tuple as a key crashes the interpreter, and it decodes the strings in which
Python 2 kept the bytes of arrays, which makes two more copies of them. Here the standard library's opcode table reads
the file, and the few opcodes that build plain data are executed on a list. A file can reach nothing else.
"""

import codecs
import math
import os
import pickletools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pml_fewshot.checks import MissingFileError, UsageError

# Opcodes with a counted argument -> the format of its length. (pickletools would copy or decode it once more.)
COUNTED = {
    **{"SHORT_BINSTRING": "<B", "BINSTRING": "<i", "SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q"},
    **{"BYTEARRAY8": "<Q", "SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "BINUNICODE8": "<Q"},
    **{"LONG1": "<B", "LONG4": "<i"},
}
LITERALS = {*COUNTED, "INT", "LONG", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "UNICODE"}
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
SCALARS = (str, bytes, int, float, complex, bool, type(None))
PLAIN = (*SCALARS, list, dict, tuple, set, frozenset, np.ndarray)


class _RefusedError(Exception):
    """The file contains something that is not allowed."""


class _Name(str):
    """A function or class that a pickle names: a string, and never more than that."""


class _Arguments(tuple):
    """A tuple that contains names or numpy types: arguments of a call, not data."""


@dataclass(eq=False, slots=True)
class _Raw:
    """The bytes of a Python 2 string (which may be those of an array) or of a bytearray."""

    content: bytes
    is_text: bool


@dataclass(eq=False, slots=True)
class _Array:
    """An array; its value is None until its state has been read."""

    value: np.ndarray | None = None


@dataclass(eq=False, slots=True)
class _Dtype:
    """A numpy type; its state sets the byte order."""

    value: np.dtype


def read_plain_pickle(path: str | Path) -> Any:
    """Reads a pickle of numpy arrays and scalars, dicts, lists, tuples, sets, strings, bytes, numbers, bools and None.

    It may come from Python 2 or 3, numpy 1 or 2, in any protocol. Nothing in the file is run or imported. Arrays are
    read-only views of the bytes that were read, so no second copy is made. Python 2's `str` is returned as text.

    Args:
        path: the pickle.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is not a pickle, is damaged, or holds anything else, which the message names: "os.system".
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"expected a pickle at {path}, got no such file; check the path")
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        try:
            value = _carry_out(_opcodes(file))
            if file.read(1):
                raise ValueError("more after its end")
            return value
        except _RefusedError as error:
            got, do = (
                str(error)[:200],
                "nothing of it was run: save its arrays, dicts and lists alone where you trust it",
            )
            if start[:4] == b"PK\3\4":  # (whose first letter happens to be an opcode)
                got, do = "a zip", "unpack it"
        except (ArithmeticError, LookupError, TypeError, ValueError, struct.error, DeprecationWarning) as error:
            got, do = f"no pickle or a damaged one ({type(error).__name__}: {str(error)[:80]})", "fetch it again"
        data = "a pickle of numpy arrays, dicts, lists, texts and numbers alone"
        where = f"before byte {file.tell()}, the first are {start!r}"
    raise UsageError(f"expected {data} at {path}, got {got} ({where}); {do}")


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yields the names of the file's opcodes, with their arguments."""
    size = os.fstat(file.fileno()).st_size
    while code := file.read(1):
        opcode = OPCODES[code.decode("latin-1")]
        name = opcode.name
        argument: Any = None
        if name in COUNTED:
            (length,) = struct.unpack(COUNTED[name], file.read(struct.calcsize(COUNTED[name])))
            if not 0 <= length <= size - file.tell():  # before memory is allocated for it
                raise ValueError(f"{length} bytes announced where {size - file.tell()} are left")
            argument = file.read(length)
            if "UNICODE" in name:
                argument = str(argument, "utf-8", "surrogatepass")
            elif "LONG" in name:
                argument = int.from_bytes(argument, "little", signed=True)
            elif name not in ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"):
                argument = _Raw(argument, is_text=name != "BYTEARRAY8")
        elif name == "STRING":  # (pickletools assumes ASCII)
            quoted = re.fullmatch(rb"(['\"])(.*)\1\n", file.readline(), re.DOTALL)
            if quoted is None:
                raise ValueError("a text without quotes")
            argument = _Raw(codecs.escape_decode(quoted[2])[0], is_text=True)
        elif opcode.arg is not None and name != "PERSID":
            argument = opcode.arg.reader(file)
        yield name, argument
    raise ValueError("cut off")


def _carry_out(opcodes: Iterator[tuple[str, Any]]) -> Any:
    """Returns what the opcodes build, on a stack, with a memo of reused values."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def top(kind: type) -> Any:
        if type(stack[-1]) is not kind:
            raise _RefusedError(f"{_called(stack[-1])} used as a {kind.__name__.lstrip('_').lower()}")
        return stack[-1]

    for name, argument in opcodes:
        match name:
            case "PROTO":
                if argument > 5:
                    raise ValueError(f"protocol {argument}")
            case "FRAME":
                pass
            case "STOP":
                return _data(stack.pop())
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(_tuple(items[::-1]))
            case "TUPLE":
                stack.append(_tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(list(map(_data, since_mark())))
            case "APPEND":
                item = _data(stack.pop())
                top(list).append(item)
            case "APPENDS":
                items = since_mark()
                top(list).extend(map(_data, items))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_pairs(since_mark()))
            case "SETITEM":
                items = [stack.pop(), stack.pop()]
                top(dict).update(_pairs(items[::-1]))
            case "SETITEMS":
                items = since_mark()
                top(dict).update(_pairs(items))
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = since_mark()
                top(set).update(map(_key, items))
            case "FROZENSET":
                stack.append(frozenset(map(_key, since_mark())))
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if type(attribute) is not str or type(module) is not str:
                    raise _RefusedError(f"a name of {_called(module)} and {_called(attribute)}")
                stack.append(_named(f"{module}.{attribute}"))
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = _call(top(_Name), arguments)
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "INST":
                raise _RefusedError(argument.replace(" ", "."))
            case "PERSID" | "BINPERSID":
                raise _RefusedError("a persistent id")
            case _ if name in LITERALS:
                stack.append(argument)
            case _:  # OBJ, NEWOBJ, NEWOBJ_EX, EXT1, NEXT_BUFFER, ..
                raise _RefusedError(f"the opcode {name}")
    raise ValueError("cut off")


def _called(value: Any) -> str:
    """Describes a value, for messages."""
    if isinstance(value, _Raw):
        return "a Python 2 text" if value.is_text else "a bytearray"
    if type(value) is str:
        return repr(value[:40])
    if isinstance(value, _Array):
        return "an array whose bytes have not come"
    return str(value) if isinstance(value, _Name) else f"a {type(value).__name__.lstrip('_').lower()}"


def _data(value: Any) -> Any:
    """Returns a value as it may appear in the result; its contents were checked when they were added."""
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, _Raw) and value.is_text:
        return value.content.decode("latin-1")
    if type(value) not in PLAIN and not isinstance(value, np.generic):
        raise _RefusedError(f"{_called(value)} among the data")
    return value


def _key(value: Any) -> Any:
    """Returns a value as a key: no tuple of tuples, as a few bytes can hold so many that hashing never ends."""
    value = _data(value)
    for part in value if type(value) is tuple else [value]:
        if type(part) not in SCALARS and not isinstance(part, np.generic):
            raise _RefusedError(f"{_called(part)} in a key")
    return value


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
    return {_key(key): _data(value) for key, value in zip(items[::2], items[1::2], strict=True)}


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    if any(isinstance(item, _Name | _Dtype) for item in items):
        return _Arguments(items)
    return tuple(map(_data, items))


def _named(name: str) -> _Name:
    """Returns a name, if it is one that _call knows, without its differences between versions."""
    plain = re.sub(r"^__builtin__\.", "builtins.", re.sub(r"^numpy\._core\.", "numpy.core.", name))
    if plain not in NAMES:
        raise _RefusedError(name)
    return _Name(plain)


NAMES = {
    *("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"),
    *("numpy.core.numeric._frombuffer", "_codecs.encode", "builtins.bytes", "builtins.complex"),
    *("builtins.set", "builtins.frozenset"),
}


def _call(name: _Name, arguments: Any) -> Any:
    """Returns what a call of one of NAMES would return, with arguments as Python and numpy write them."""
    match name, arguments:
        case "numpy.core.multiarray._reconstruct", [_Name("numpy.ndarray"), (0,), _]:
            return _Array()
        case "numpy.dtype", [str(text), False | 0, True | 1] if re.fullmatch(r"[biufcSU][0-9]{1,9}", text):
            return _Dtype(np.dtype(text))
        case "numpy.core.multiarray.scalar", [_Dtype(dtype), raw]:
            return _array(raw, dtype, (), "C")[()]
        case "numpy.core.numeric._frombuffer", [raw, _Dtype(dtype), shape, "C" | "F" as order]:
            return _array(raw, dtype, shape, order)
        case "numpy.core.numeric._frombuffer", [raw, _Dtype(dtype), shape, "K", tuple(axes)]:
            return _array(raw, dtype, shape, "C").transpose(axes)
        case "_codecs.encode", [str(text), "latin1"]:  # Python 3's bytes in protocols 0 to 2
            return text.encode("latin-1")
        case "builtins.bytes", []:
            return b""
        case "builtins.complex", [float(real), float(imaginary)]:
            return complex(real, imaginary)
        case "builtins.set", [list(items)]:
            return set(map(_key, items))
        case "builtins.frozenset", [list(items)]:
            return frozenset(map(_key, items))
    raise _RefusedError(f"a call of {_called(name)} on {_listed(arguments)}")


def _build(built: Any, state: Any) -> None:
    """Sets the state of an array or a numpy type."""
    match built, state:
        case _Array(), [1, shape, _Dtype(dtype), bool() | 0 | 1 as fortran, raw]:
            built.value = _array(raw, dtype, shape, "F" if fortran else "C")
        case _Dtype(dtype), [3 | 4, "<" | ">" | "|" as order, None, None, None, int(size), *_] if size in (
            -1,
            dtype.itemsize,
        ):
            built.value = dtype.newbyteorder(order)
        case _:
            raise _RefusedError(f"{_called(built)} with a state of {_listed(state)}")


def _listed(items: Any) -> str:
    return ", ".join(map(_called, items[:8])) if isinstance(items, tuple) else _called(items)


def _array(raw: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    """Returns the bytes as an array, if their number is exactly right."""
    content = raw.content if isinstance(raw, _Raw) else raw
    if type(content) is not bytes or type(shape) is not tuple or any(type(n) is not int for n in shape):
        raise _RefusedError(f"an array of shape {_listed(shape)} from {_called(content)}")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for an array of shape {str(shape)[:50]} and type {dtype}")
    # numpy itself trusts these: a mask in which a True counts as 2 writes past its end
    if dtype.kind == "b" and content.translate(None, b"\0\1"):
        raise ValueError("a bool that is neither False nor True")
    if dtype.kind == "U" and len(content) and np.frombuffer(content, dtype.byteorder + "u4").max() > 0x10FFFF:
        raise ValueError("a character past the last of Unicode")
    return np.ndarray(shape, dtype, content, order=order)
