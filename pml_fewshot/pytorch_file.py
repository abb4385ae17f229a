"""Reading what torch.save wrote, from files that may be broken or hostile.

torch.load with weights_only=True runs no code, but it verifies no checksum, calls things like bytearray(2**31) or
torch.FloatTensor(2**31) when a file says so, and hands out tensors that claim 10**18 values over a storage of one.
So the zip is verified first, then the pickle in it is looked through without running it, and the tensors at the end.
"""

import pickletools
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from pml_fewshot.sizes import check_fits_memory
from pml_fewshot.zip_archive import open_zip, read_member

PICKLE = 2**23  # bytes of the structure around the tensors; a ResNet-12's takes 20 KB
OPERATIONS = 5 * 10**5  # of the pickle, two seconds: a ResNet-12's takes 3,000, a list of 200,000 texts 400,000
PARTS = 2 * 10**7  # of the structure, counted each time it is referred to: 40 nested pairs could make 2**40
CALLS = {
    *("collections OrderedDict", "collections Counter", "builtins set", "builtins complex", "torch Size"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_parameter_with_state", "torch.nn.parameter UninitializedParameter", "torch device"),
    "torch.nn.parameter Parameter",
}
CALLED = -1  # marks, on the stack, what may be called
NAMES = ("float", "bfloat", "int", "uint", "bool", "complex")  # torch.float32, torch.int64, ..., which are only named


def read_pytorch(path: Path) -> Any:
    """What torch.save wrote, on the CPU: dicts, lists, numbers, texts and dense tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no whole zip of torch.save, or holds more than data.
    """
    with open_zip(path) as archive:
        if archive.comment or not _ends_as_torch_reads_it(path, archive.start_dir):
            raise ValueError("bytes before or after the zip, of which torch may read another one")
        names = archive.namelist()
        # torch reads a member that is marked as a folder (DOS's bit 4) as nothing, and hands out memory as it was
        if any(member.external_attr & 0x10 or member.is_dir() for member in archive.infolist()):
            raise ValueError("a folder, which torch.save does not write")
        check_fits_memory(sum(member.file_size for member in archive.infolist()), path)
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(not name.startswith(pickles[0][: -len("data.pkl")]) for name in names):
            raise ValueError("a zip, but not of torch.save")
        _look_through(bytes(read_member(archive, pickles[0], PICKLE)))
        if (broken := archive.testzip()) is not None:  # verifies every checksum; torch.load does not
            raise ValueError(f"a wrong checksum of {broken}")
    with torch.serialization.safe_globals([UninitializedParameter]):  # a learned distance that has seen nothing yet
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(loaded)
    return loaded


def _ends_as_torch_reads_it(path: Path, directory: int) -> bool:
    """Whether the zip's end says where its list of members is, in all forms at once, so that all readers find one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 98))
        end = file.read().rjust(98, b"\0")
    offset = struct.unpack_from("<I", end, 76 + 16)[0]
    if end[56:60] != b"PK\x06\x07":
        return bool(end[76:80] == b"PK\x05\x06" and offset == directory)
    wide_end, wide_offset = struct.unpack_from("<Q", end, 56 + 8)[0], struct.unpack_from("<Q", end, 48)[0]
    narrow = offset in (directory, 0xFFFFFFFF)
    return bool(end[76:80] == b"PK\x05\x06" and narrow and wide_end == size - 98 and wide_offset == directory)


def _look_through(pickled: bytes) -> None:
    """Raises a ValueError when a pickle names anything but tensors and plain containers, or grows beyond all bounds.

    The pickle's stack is followed without running it. Each value is the count of its parts, those of values referred to
    again counted again: what it would cost to hash, print or copy it.
    """
    total = 0
    mark: list[int] = []
    stack: list[list[int]] = []
    memo: dict[object, list[int]] = {}
    for number, (code, argument, _) in enumerate(pickletools.genops(pickled)):
        name = code.name
        if number > OPERATIONS:
            raise ValueError(f"more than {OPERATIONS:,} steps of pickle; keep numbers and labels in tensors")
        if name == "GLOBAL":
            module, _, called = str(argument).partition(" ")
            plain = module in ("torch", "torch.storage") and (called.startswith(NAMES) or called.endswith("Storage"))
            if argument not in CALLS and not plain:
                raise ValueError(f"{argument}, which is more than data")
            if argument in CALLS:
                stack.append([1, CALLED])
                continue
        if name in ("REDUCE", "NEWOBJ") and stack[-2][1:] != [CALLED]:
            raise ValueError("a call of what is only to be named")  # as UntypedStorage, which would take any memory
        if name in ("DUP", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"):
            raise ValueError(f"the pickle code {name}, which torch.save does not write")
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MARK":
            stack.append(mark)
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS", "TUPLE", "LIST", "DICT", "FROZENSET", "POP_MARK"):
            start = len(stack) - 1
            while stack[start] is not mark:
                start -= 1
            taken, stack[start:] = sum(part[0] for part in stack[start + 1 :]), []
            total += _add(stack, taken, new=name in ("TUPLE", "LIST", "DICT", "FROZENSET"))
        else:
            # (an operation that only changes what lies below, as APPEND or BUILD, gives back what it took last)
            count = len(code.stack_before)
            below = name in ("APPEND", "SETITEM", "BUILD")
            if count > len(stack):
                raise ValueError("a pickle that takes what is not there")
            taken = sum(part[0] for part in stack[len(stack) - count + below :])
            stack[len(stack) - count + below :] = []
            if below or code.stack_after:
                total += _add(stack, taken, new=not below)
        if total > PARTS:
            raise ValueError(f"a structure of more than {PARTS:,} parts")


def _add(stack: list[list[int]], parts: int, new: bool) -> int:
    if new:
        stack.append([1])
    stack[-1][0] += parts
    return parts


def _check_tensors(loaded: object) -> None:
    """Raises a ValueError for a tensor that is not dense, or claims more values than the file holds."""
    waiting, seen = [loaded], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and not isinstance(value, UninitializedParameter):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(f"a tensor of {value.layout} on {value.device}, not a dense one on the CPU")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)}, more than the values in the file")
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
