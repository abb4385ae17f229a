"""What a run stands on: its config, data, versions, git commit and machine, in config.txt and config.json."""

import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pml_fewshot.atomic import write_text
from pml_fewshot.checks import require
from pml_fewshot.data.fewshot_dataset import Splits
from pml_fewshot.sizes import checksum
from pml_fewshot.stored_config import to_data

WHERE = ("run_dir", "data_root", "device")  # where a run happens, not what it does
PACKAGES = ("pml_fewshot", "torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy", "record-keeper")
LARGEST = 2**24  # bytes of config.json; a config of ours has some thousands


def machine(device: torch.device) -> dict[str, str]:
    """Versions, threads, device and git commit: what figures depend on beside config and data."""
    return {
        **{package: version(package) for package in PACKAGES},
        "python": f"{platform.python_version()} on {platform.platform()}",
        "threads": str(torch.get_num_threads()),
        "device": str(device),
        "git commit": _git_commit() or "unknown (not a checkout)",
    }


def write_provenance(folder: Path, config: Any, splits: Splits, device: torch.device) -> None:
    """Writes config.json, for programs, and config.txt, for people: a line a field of the config, then the rest."""
    data = _data(splits)
    about = {"config": to_data(config), "data": data, "machine": machine(device)}
    write_text(folder / "config.json", provenance_text(about))
    lines = [*_fields(config), ""]
    lines += [f"{role} = {each['shown']}, checksum {each['checksum'] or 'none'}" for role, each in data.items()]
    lines += ["", *(f"{name} {value}" for name, value in about["machine"].items())]
    write_text(folder / "config.txt", "\n".join(lines) + "\n")  # last: it says that a run has begun here


def note_sitting(folder: Path, about: Mapping[str, Any], device: torch.device) -> None:
    """Adds to config.json and config.txt on what a run goes on from here."""
    sitting = machine(device)
    write_text(folder / "config.json", provenance_text({**about, "sittings": [*about["sittings"], sitting]}))
    lines = ["", "went on with:", *(f"{name} {value}" for name, value in sitting.items())]
    before = (folder / "config.txt").read_text(encoding="utf-8")
    write_text(folder / "config.txt", before + "\n".join(lines) + "\n")


def provenance_text(about: Mapping[str, Any]) -> str:
    """The text of config.json: what is given, and its checksum."""
    return json.dumps({**about, "checksum": _checksum(about)}, indent=1)


def _checksum(about: Mapping[str, Any]) -> str:
    return checksum([json.dumps(about, sort_keys=True).encode()])


def read_provenance(folder: Path) -> dict[str, Any]:
    """Reads config.json: "config" (for `from_data`), "data", "machine", and "sittings", as `machine`, that differed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, got no such file; name the folder of a run of version 0.5 or later")
    require(
        path.stat().st_size <= LARGEST, f"{path} of at most {LARGEST} bytes", path.stat().st_size, "it is no config"
    )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a whole config.json in {folder}, got {error}; restore it from a copy") from error
    written = about.pop("checksum", None) if isinstance(about, dict) else None
    require(
        isinstance(about, dict) and written == _checksum(about),
        f"a whole config.json in {folder}",
        "one with another checksum than was written",
        "restore it from a copy",
    )
    whole = all(isinstance(about.get(key), dict) for key in ("config", "data", "machine"))
    about = {"sittings": [], **about}
    machines = [about["machine"], *about["sittings"]] if whole and isinstance(about["sittings"], list) else [None]
    texts = all(isinstance(each, dict) and all(isinstance(v, str) for v in each.values()) for each in machines)
    sets = about["data"].values() if whole else ()
    sums = all(isinstance(each, dict) and isinstance(each.get("checksum"), str) for each in sets)
    require(texts and sums, f"config, data and machine in {path}", "others", "restore it from a copy")
    return about


def check_config(config: Any, about: Mapping[str, Any], folder: Path) -> None:
    """Raises a ValueError that names the fields in which a config is not that of the run in `folder`.

    Args:
        config: to be compared.
        about: what `read_provenance` gave.
        folder: of the run, for the message.
    """
    then, now = about["config"].get("fields"), to_data(config)["fields"]
    require(isinstance(then, dict), f"the fields of a config in {folder}", type(then).__name__, "restore config.json")
    changed = [name for name in now if name not in WHERE and (name not in then or now[name] != then[name])]
    require(
        not changed,
        f"the config of the run in {folder} to go on with",
        f"another {', '.join(changed)}",
        "give it as config.txt has it, or name another folder",
    )


def check_data(splits: Splits, about: Mapping[str, Any], folder: Path) -> None:
    """Raises a ValueError that names the sets which are not, to the pixel, those of the run in `folder`."""
    then = {role: each["checksum"] for role, each in about["data"].items()}
    now = {role: each["checksum"] for role, each in _data(splits).items()}
    changed = [role for role in now if now[role] != then.get(role)]
    require(
        not changed,
        f"the data of the run in {folder}",
        f"other images, labels or classes in {', '.join(changed)}",
        "give the data that config.txt names, or begin a new run",
    )


def changes(about: Mapping[str, Any], device: torch.device) -> list[str]:
    """What is another version, commit, device or number of threads than when the run in question last went on."""
    then = [about["machine"], *about["sittings"]][-1]
    return [
        f"{name}: {then.get(name)} then, {now} now" for name, now in machine(device).items() if then.get(name) != now
    ]


def _data(splits: Splits) -> dict[str, dict[str, str]]:
    return {
        role: {"shown": repr(each), "checksum": each.checksum() if each is not None else ""}
        for role, each in (("train", splits.train), ("val", splits.val), ("test", splits.test))
    }


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
