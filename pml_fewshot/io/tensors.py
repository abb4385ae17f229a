"""Tensors in safetensors files with our own checksum. Files from other tools have none and can be read too."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.io.atomic import atomic_write

# The only entry in our files' metadata, a JSON of the texts and the checksum: safetensors writes several entries in a
# different order each time, and the same weights should give the same bytes.
ENTRY = "pml_fewshot"
CHECKSUM = "checksum"  # its name among the texts

BLOCK = 2**24  # bytes checksummed at a time, so that a memory map larger than memory is read through, never held


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors and texts with their checksum, atomically; any tool can read them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    entry = json.dumps({**texts, CHECKSUM: checksum_of(plain, texts)}, sort_keys=True)
    with atomic_write(path) as temporary:
        save_file(plain, temporary, {ENTRY: entry})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors, on the CPU, and the texts stored with them. Verifies the checksum if there is one."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"expected a safetensors file at {path}, got no such file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        if ENTRY not in metadata and not any(CHECKSUM in text for text in metadata.values()):  # from another tool
            return tensors, metadata
        texts = json.loads(metadata[ENTRY])  # a KeyError: the name itself is damaged
        written, found = texts.pop(CHECKSUM), checksum_of(tensors, texts)
        if written != found:
            raise ValueError(f"checksum {found}, not {written} as written")
    except PermissionError:
        raise
    except Exception as error:  # readers raise all kinds of errors on broken files
        got = str(error) or type(error).__name__
        raise UsageError(f"expected a safetensors file at {path}, got a broken one ({got}); write it again") from error
    return tensors, texts


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """Returns the CRC-32 and number of bytes of consecutive buffers, as "crc32:0123abcd:4096".

    It detects damage, at 6 GB/s. A cryptographic digest would take five times as long and protect no better: whoever
    can change the data can change the checksum next to it.
    """
    crc = count = 0
    for part in parts:
        view = memoryview(part)
        if not view.nbytes:
            continue
        view = view.cast("B")
        for start in range(0, len(view), BLOCK):
            crc = zlib.crc32(view[start : start + BLOCK], crc)
        count += len(view)
    return f"crc32:{crc:08x}:{count}"


def json_checksum(about: Mapping[str, Any]) -> str:
    """Returns the checksum of JSON data, whatever the order of its names."""
    return checksum([json.dumps(about, sort_keys=True).encode()])


def checksum_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """Returns the checksum of names, types, shapes, texts and all values."""
    names = sorted(tensors)
    about = repr(([(n, str(tensors[n].dtype), tuple(tensors[n].shape)) for n in names], sorted((texts or {}).items())))
    values = (tensors[n].reshape(-1).view(torch.uint8).numpy().data for n in names if tensors[n].numel())
    return checksum([about.encode(errors="surrogatepass"), *values])
