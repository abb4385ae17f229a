"""Tensors in safetensors files that carry a checksum of their own; files of other tools have none and are read too."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pml_fewshot.atomic import whole_file
from pml_fewshot.checks import require
from pml_fewshot.sizes import check_fits_memory, checksum

# The one entry of our files' metadata, a JSON of the texts and the checksum: safetensors writes several entries in an
# order of its own each time, and the same weights are to give the same bytes.
ENTRY = "pml_fewshot"
CHECKSUM = "checksum"  # its name among the texts
HEADER = 2**24  # bytes of names and shapes: 100,000 tensors. safetensors itself would parse 100 MB


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors and texts with their checksum, all of it or nothing; any tool can read them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    with whole_file(path) as unfinished:
        save_file(plain, unfinished, {ENTRY: sealed(plain, texts)})


def sealed(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """The entry in the metadata: texts, and the checksum of them and the tensors."""
    return json.dumps({**texts, CHECKSUM: _checksum(tensors, texts)}, sort_keys=True)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the texts beside them. A checksum is verified where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a broken file, a wrong checksum, or more than fits into memory.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a safetensors file at {path}, got no such file; check the path")
    check_fits_memory(path.stat().st_size, path)
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
        if length > HEADER:
            raise ValueError(f"a header of {length:,} bytes, more than the {HEADER:,} that are read")
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, struct.error, ValueError, RuntimeError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(
            f"expected a safetensors file at {path}, got a broken one ({str(error) or type(error).__name__}); write "
            "or export it again"
        ) from error
    if ENTRY in metadata or any(CHECKSUM in text for text in metadata.values()):  # (the entry's name may be damaged)
        texts = _texts(metadata.get(ENTRY, ""))
        written, found = texts.pop(CHECKSUM, None), _checksum(tensors, texts)
        require(
            written == found,
            f"a safetensors file at {path} with the checksum that was written",
            f"a broken one ({found} instead of {written})",
            "write or export it again",
        )
        return tensors, texts
    return tensors, metadata


def _texts(entry: str) -> dict[str, str]:
    try:
        texts = json.loads(entry)
    except (ValueError, RecursionError):
        return {}  # its checksum is missed then
    return {name: text for name, text in texts.items() if isinstance(text, str)} if isinstance(texts, dict) else {}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes, texts and all values."""
    about = repr(
        (
            [(name, str(tensors[name].dtype), tuple(tensors[name].shape)) for name in sorted(tensors)],
            sorted(metadata.items()),
        )
    )
    return checksum([about.encode(errors="surrogatepass"), *(_bytes(tensors[name]) for name in sorted(tensors))])


def _bytes(tensor: Tensor) -> memoryview:
    flat: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return flat.data
