"""Checkpoints: the state a training goes on from (last.pt) and the embedder alone (embedder.safetensors).

Reading never executes code: torch.load with weights_only=True, and safetensors.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parameter import UninitializedParameter

from pml_fewshot.atomic import whole_file


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts, lists and dicts; the file there before stays until this one is whole."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what save_checkpoint wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds objects other than data (which are not loaded).
    """
    try:
        with torch.serialization.safe_globals([UninitializedParameter]):  # a learned distance that has seen nothing yet
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise ValueError(
            f"expected a checkpoint at {path}, got a file that is broken or holds more than data "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); use another checkpoint"
        ) from error


def export_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Writes an embedder's weights and buffers as safetensors, which any tool can read."""
    # (safetensors refuses tied weights, which share memory)
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in embedder.state_dict().items()}
    with whole_file(path) as unfinished:
        save_file(copies, unfinished)


def load_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Reads weights that export_embedder wrote into an embedder of the same architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or a weight is missing, unknown or of another shape (which is named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected an exported embedder at {path}, got no such file; look into the run folder")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file at {path}, got a broken one ({error}); export it again"
        ) from error
    own = embedder.state_dict()
    for name in sorted(own.keys() | stored.keys()):
        expected = tuple(own[name].shape) if name in own else "nothing"
        got = tuple(stored[name].shape) if name in stored else "nothing"
        if expected != got:
            raise ValueError(
                f"expected {expected} for {name}, got {got} in {path}; build the embedder with the trunk and widths it "
                "was trained with (config.txt in its run folder names them)"
            )
    embedder.load_state_dict(stored)
