"""The folder of a run: made new, never written over, with a record of what the run stands on."""

import platform
import re
import subprocess
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits

PACKAGES = ("pml_fewshot", "torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy", "record-keeper")


def new_run_folder(run_dir: Path | None, name: str, seed: int) -> Path:
    """Returns `run_dir`, or a folder below runs/<name>/ named by time and seed when None, which is yet to be made.

    Raises:
        FileExistsError: it holds another run, or anything else.
    """
    folder = run_dir or Path("runs") / name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_seed{seed}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"expected a new or empty run folder, got {folder}, which holds another run or other files; name another "
            "with --run-dir, or remove it"
        )
    return folder


def describe(config: Any, train: FewShotDataset, splits: Splits, device: torch.device) -> str:
    """The text of config.txt: a line for each field of the config dataclass, then data, versions and git commit."""
    # a function's repr ends in its address, which says nothing
    lines = [re.sub(r" at 0x[0-9a-f]+", "", f"{f.name} = {getattr(config, f.name)!r}") for f in fields(config)]
    lines += ["", f"train = {train}", f"val = {splits.val}", f"test = {splits.test}", ""]
    lines += [f"{package} {version(package)}" for package in PACKAGES]
    lines += [
        f"python {platform.python_version()} on {platform.platform()}, {torch.get_num_threads()} threads, {device}"
    ]
    lines += [f"git commit {_git_commit() or 'unknown (not a checkout)'}"]
    return "\n".join(lines) + "\n"


def _git_commit() -> str:
    """The commit this package lies in, with -dirty when files differ from it; empty where it is in no checkout."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():  # installed somewhere, perhaps below another project's checkout
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip()
