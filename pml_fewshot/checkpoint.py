"""Checkpoints: the state a training goes on from (last.pt) and the embedder alone (embedder.safetensors).

Reading never executes code: torch.load with weights_only=True behind the checks of pytorch_file, and safetensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from pml_fewshot.atomic import whole_file
from pml_fewshot.checks import require
from pml_fewshot.pytorch_file import read_pytorch
from pml_fewshot.tensor_file import read_tensors, write_tensors


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts, lists and dicts; the file there before stays until this one is whole."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what save_checkpoint wrote, onto the CPU; every checksum in the file is verified.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, too large for memory, or holds objects other than data (which are not loaded).
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():  # (nor a named pipe, which would wait for ever)
        raise FileNotFoundError(f"expected a checkpoint at {path}, got no such file; look into the run folder")
    try:
        state = read_pytorch(path)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__} instead of a dict")
    except PermissionError:
        raise
    except Exception as error:  # of a broken file the readers raise whatever their code comes upon
        raise ValueError(
            f"expected a checkpoint at {path}, got a file that is broken or holds more than data "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); use another checkpoint"
        ) from error
    return state


def export_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Writes an embedder's weights and buffers as safetensors, which any tool can read, with a checksum.

    Raises:
        ValueError: its state holds more than tensors.
    """
    check_exportable(embedder)
    # (safetensors refuses tied weights, which share memory)
    write_tensors(path, {name: value.detach().cpu().clone() for name, value in embedder.state_dict().items()})


def check_exportable(embedder: nn.Module) -> None:
    """Raises a ValueError that names what is no tensor in an embedder's state, for safetensors hold nothing else."""
    for name, value in embedder.state_dict().items():
        require(
            isinstance(value, torch.Tensor),
            f"tensors alone in the state of {type(embedder).__name__}",
            f"{name}, a {type(value).__name__}",
            "make it a buffer, or leave it out of get_extra_state",
        )


def load_embedder(path: str | Path, embedder: nn.Module) -> None:
    """Reads weights that export_embedder wrote into an embedder of the same architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken or has another checksum than was written, or a weight is missing, unknown, of
            another shape or type, or not finite (which is named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected an exported embedder at {path}, got no such file; look into the run folder")
    stored, _ = read_tensors(path)
    check_weights(embedder.state_dict(), stored, str(path))
    for name, value in stored.items():
        require(
            bool(torch.isfinite(value).all()),
            f"finite weights in {path}",
            f"NaN or infinity in {name}",
            "use the weights of a training that did not diverge",
        )
    embedder.load_state_dict(stored)


def check_weights(own: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError naming the first weight or buffer that is missing, unknown, or of another shape or type.

    Args:
        own: state_dict of the module that is to have the weights.
        stored: the weights, by the same names.
        where: what holds them, for the message.
    """
    for name in sorted(own.keys() | stored.keys()):
        if any(isinstance(weights.get(name), UninitializedParameter) for weights in (own, stored)):
            continue  # a learned distance has its shape from the first embeddings that it sees
        for of in (_shape, _dtype):
            expected = of(own[name]) if name in own else "nothing"
            got = of(stored[name]) if name in stored else "nothing"
            require(
                expected == got,
                f"{expected} for {name}",
                f"{got} in {where}",
                "build it with the trunk and widths it was trained with (config.txt in its run folder names them)",
            )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", ""))
