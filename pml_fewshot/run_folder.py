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

from pml_fewshot.checks import require
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits

WHERE = ("run_dir = ", "data_root = ", "device = ")  # where a run happens, not what it does
PACKAGES = ("pml_fewshot", "torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy", "record-keeper")


def folder_to_resume(run_dir: Path | None, config: Any) -> Path:
    """Returns `run_dir`, new or with a run of the same config in it.

    Raises:
        ValueError: no run_dir, something else in it, or the run there has another config; names the fields.
    """
    require(run_dir is not None, "the folder of the run to go on with", "none", "name it with --run-dir")
    assert run_dir is not None
    about = run_dir / "config.txt"
    require(
        about.exists() or not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())),
        f"a run, an empty folder or none at {run_dir}",
        "other files",
        "name another folder",
    )
    if about.exists():
        then = "\n" + about.read_text(encoding="utf-8")
        now = [field for field in _fields(config) if not field.startswith(WHERE)]
        changed = [field.split(" = ")[0] for field in now if f"\n{field}\n" not in then]
        require(
            not changed,
            f"the config of the run in {run_dir} to go on with",
            f"another {', '.join(changed)}",
            "give it as config.txt has it, or name another folder",
        )
    return run_dir


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
    lines = [*_fields(config), "", f"train = {train}", f"val = {splits.val}", f"test = {splits.test}", ""]
    lines += [f"{package} {version(package)}" for package in PACKAGES]
    lines += [
        f"python {platform.python_version()} on {platform.platform()}, {torch.get_num_threads()} threads, {device}"
    ]
    lines += [f"git commit {_git_commit() or 'unknown (not a checkout)'}"]
    return "\n".join(lines) + "\n"


def _fields(config: Any) -> list[str]:
    # a function's repr ends in its address, which says nothing
    return [re.sub(r" at 0x[0-9a-f]+", "", f"{f.name} = {getattr(config, f.name)!r}") for f in fields(config)]


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
