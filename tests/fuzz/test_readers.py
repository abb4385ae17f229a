"""Damaged files for every reader (worker.py), and files whose pickle would run code."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pml_fewshot import UsageError, load_bank
from pml_fewshot.io.checkpoint import load_checkpoint, save_checkpoint

WORKER = Path(__file__).parent / "worker.py"
CHECKED = ("checkpoint", "embedder", "bank", "gallery", "cache", "config")


@pytest.mark.long
@pytest.mark.parametrize("count", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_read_as_they_were(count: int, tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    command = [sys.executable, "-u", str(WORKER), str(count), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert lines[-1:] == ["DONE"], f"ended with {done.returncode} in {lines[-1:]}: {done.stderr[-2000:]}"
    shares = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("REFUSED")}
    assert all(shares[name] > 0.7 for name in CHECKED), shares  # a change of zeros to zeros is none


@dataclass
class MakesAFolder:
    """What a pickle can do to whoever loads it."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_would_run_code_are_refused_and_do_not(tmp_path: Path):
    marker = tmp_path / "marker"
    trap, rows = MakesAFolder(marker), np.ones((2, 3), dtype=np.float32)
    objects = np.array([trap, 2], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", embeddings=rows, labels=objects)
    torch.save({"embeddings": torch.ones(2, 3), "labels": trap}, tmp_path / "a.pt")
    torch.save((torch.ones(2, 3), trap), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for suffix in ("pt", "npy", "npz"):
        (tmp_path / f"c.{suffix}").write_bytes(pickle.dumps(trap, protocol=2))
    for name in ("a.npy", "a.npz", "a.pt", "b.pt", "c.pt", "c.npy", "c.npz"):
        with pytest.raises(UsageError, match=r"expected arrays in .*broken or holds more than data"):
            load_bank(tmp_path / name)
        assert not marker.exists(), name
    save_checkpoint(tmp_path / "last.pt", {"model": trap})
    with pytest.raises(UsageError, match="expected a checkpoint of tensors, numbers"):
        load_checkpoint(tmp_path / "last.pt")
    assert not marker.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)  # the trap works
    assert marker.is_dir()
