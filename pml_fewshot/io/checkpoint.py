"""Checkpoints: the state from which training resumes (last.pt), and the embedder alone (embedder.safetensors).

Reading never runs code: torch.load with weights_only=True, and safetensors.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from pml_fewshot.checks import MissingFileError, UsageError
from pml_fewshot.io.atomic import atomic_write
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
SEAL = b"\npml_fewshot "  # between torch's zip, whose readers ignore what follows it, and the checksum of the zip


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts atomically, with a checksum; torch.load can read the file."""
    buffer = io.BytesIO()  # torch.save into a file hides a full disk behind a RuntimeError
    torch.save(_plain(state), buffer)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(buffer.getbuffer())
        file.write(SEAL + checksum([buffer.getbuffer()]).encode())


def _plain(value: Any) -> Any:
    """Converts numpy's numbers, such as a learning rate from np.logspace, to Python's: only those can be read."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads what save_checkpoint wrote onto the CPU, after verifying its checksum.

    Raises:
        MissingFileError: there is no such file.
        UsageError: the file is broken, was not written by save_checkpoint, or holds objects other than data (which are
            not loaded).
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"expected a checkpoint at {path}, got no such file; look into the run folder")
    content, seal, written = path.read_bytes().rpartition(SEAL)
    if not seal or written != checksum([content]).encode():
        raise UsageError(f"expected a checkpoint at {path}, got a broken file, or one of another version; use another")
    try:  # (a learned distance that has not seen embeddings yet has an UninitializedParameter)
        with torch.serialization.safe_globals([UninitializedParameter]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises all kinds of errors
        data = "tensors, numbers, texts, lists and dicts"
        got = f"more ({str(error).partition(chr(10))[0][:200]})"
        raise UsageError(
            f"expected a checkpoint of {data} at {path}, got {got}; keep other objects out of it"
        ) from error


def export_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Writes an embedder's weights and buffers as safetensors, which any tool can read, with a checksum.

    Their names are those of the embedder itself, whatever it is wrapped in.

    Raises:
        UsageError: its state holds more than tensors.
    """
    check_exportable(embedder)
    own = embedder.state_dict()
    # (safetensors refuses tied weights, which share memory)
    write_tensors(path, {plain: own[name].detach().cpu().clone() for plain, name in plain_names(embedder).items()})


def plain_names(module: nn.Module) -> dict[str, str]:
    """Maps the names in a module's state, as they are without wrappers around it or its parts, to the actual ones.

    Wrappers are `torch.compile`, DataParallel, DistributedDataParallel and AveragedModel, whose counter is left out.
    """
    names = {}
    for name in module.state_dict():
        here, plain, counts = module, [], False
        for part in name.split("."):
            wrapped = isinstance(here, WRAPPERS) or "_orig_mod" in here._modules  # of torch.compile
            counts = counts or (isinstance(here, AveragedModel) and part == "n_averaged")
            plain += [] if wrapped and part in ("module", "_orig_mod") else [part]
            child = here._modules.get(part)
            here = nn.Module() if child is None else child  # (a compiled module has no truth value)
        if not counts:
            names[".".join(plain)] = name
    return names


def check_exportable(embedder: nn.Module) -> None:
    """Raises a UsageError naming the first entry of the state that is not a tensor: safetensors holds nothing else."""
    for name, value in embedder.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"expected only tensors in the state of {type(embedder).__name__}, got {name}, a "
                f"{type(value).__name__}; make it a buffer, or leave it out of get_extra_state"
            )


def load_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Loads weights written by export_embedder into an embedder of the same architecture, wrapped or not.

    Raises:
        MissingFileError: there is no such file.
        UsageError: the file is broken, or a weight (which the message names) is missing, unknown, of another shape or
            type, or not finite.
    """
    stored, _ = read_tensors(path)
    own, names = embedder.state_dict(), plain_names(embedder)
    check_weights({plain: own[name] for plain, name in names.items()}, stored, str(path))
    for name, value in stored.items():
        if not torch.isfinite(value).all():
            raise UsageError(f"expected finite weights in {path}, got NaN or infinity in {name}; use an earlier file")
    embedder.load_state_dict(own | {names[plain]: value for plain, value in stored.items()})


def check_weights(own: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """Raises a UsageError naming the first weight or buffer that is missing, unknown, or of another shape or type.

    Args:
        own: state_dict of the module that is to receive the weights.
        stored: the weights, by the same names.
        where: where they are stored, for the message.
    """
    for name in sorted(own.keys() | stored.keys()):
        if any(isinstance(weights.get(name), UninitializedParameter) for weights in (own, stored)):
            continue  # a learned distance gets its shape from the first embeddings that it sees
        expected, got = (_describe(weights, name) for weights in (own, stored))
        if expected != got:
            raise UsageError(
                f"expected {expected} for {name}, got {got} in {where}; build it with the trunk and widths it was "
                "trained with (config.txt in its run folder names them)"
            )


def _describe(weights: Mapping[str, Any], name: str) -> str:
    value = weights.get(name, "nothing")
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    return type(value).__name__ if name in weights else value
