"""RunFolder: the folder of a run, written by one process at a time, with a record of what the run was made with."""

import json
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pml_fewshot.checks import ExistingFileError, LockedError, MissingFileError, UsageError
from pml_fewshot.data.dataset import Splits
from pml_fewshot.distributed import check_same as check_same_everywhere
from pml_fewshot.distributed import launch_memory, together, told_by_all, world
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment.config import ExperimentConfig
from pml_fewshot.io.atomic import translate_write_errors, write_text
from pml_fewshot.io.checkpoint import load_checkpoint
from pml_fewshot.io.tensors import json_checksum
from pml_fewshot.parts.describe import describe, module_name
from pml_fewshot.training.state import history_of

# where a run happens, what is drawn of it and what is shown next to its figures, not what it does
PLACE = ("run_dir", "data_root", "device", "report", "published")
# what may change to evaluate a trained run again, and on resuming; validation uses the first of eval_specs
EVALUATION = ("num_episodes", "eval_seed", "eval_specs", "retrieval", "extra_evaluations")
RATES = ("optimizer", "scheduler", "loss_lr", "part_lr", "clip_norm", "retries")  # to change after a NaN
MAY_CHANGE = ("steps", *RATES, "recorder", *EVALUATION)
SECONDS_TO_SEE = 10.0  # a network file system may take this long to show a new file
PACKAGES = ("pml_fewshot", "torch", "torchvision", "pytorch-metric-learning", "faiss-cpu", "numpy", "record-keeper")


@dataclass
class RunFolder:
    """A folder that only this process writes."""

    path: Path
    config: ExperimentConfig
    stored: dict[str, Any] = field(default_factory=dict)  # what `read_config` returns; empty for a new run
    steps: int = 0  # in the checkpoint, 0 if there is none

    @property
    def checkpoint(self) -> Path:
        return self.path / "last.pt"

    @property
    def finished(self) -> bool:
        """Whether the table in the folder belongs to the config's steps and evaluation."""
        return self.stored.get("finished") == self._result() and (self.path / "figures.csv").exists()

    def begin(self, splits: Splits, device: torch.device, num_classes: int) -> None:
        """Writes config.json and config.txt; for a resumed run (on the same data), with what has changed since then.

        `num_classes` is the number of training classes.
        """
        self.check_everywhere(splits, device)
        config, sessions, changes = describe(self.config), [environment(device)], []
        if stored := self.stored:
            check_data(splits, stored, self.path)
            then, notes = stored["config"], environment_changes(stored, device)
            changed = changed_fields(self.config, stored)
            changes = [f"after step {self.steps}: {name} is {config[name]}, was {then.get(name)}" for name in changed]
            print(*(f"note: {note}\n" for note in (*notes, *changes)), sep="", end="")
            sessions, changes = stored["sessions"] + (sessions if notes else []), stored["changes"] + changes
        about = {"config": config, "data": _described(splits), "sessions": sessions, "changes": changes}
        about["num_classes"] = num_classes
        about["commands"] = list(dict.fromkeys([*stored.get("commands", ()), command()]))
        self._write({"module": module_name("__main__"), **stored, **about})

    def check_everywhere(self, splits: Splits, device: torch.device) -> None:
        """Raises a UsageError if another process has a different config, data or versions."""
        config = {n: json.dumps(value) for n, value in describe(self.config).items() if n not in ("object", *PLACE)}
        data = {role: each["checksum"] for role, each in _described(splits).items()} if world().size > 1 else {}
        versions = {package: _version(package) for package in PACKAGES} | {"device": device.type}
        check_same_everywhere({**config, **data, **versions}, "start all with the same command, files and packages")

    def finish(self, table: ResultTable) -> None:
        """Writes the table, then records that it belongs to the config's steps and evaluation."""
        told_by_all(None)  # all processes have come this far
        if world().is_first:
            table.write(self.path)
        self._write({**self.stored, "finished": self._result()})

    def _result(self) -> dict[str, Any]:
        return {name: describe(getattr(self.config, name)) for name in ("steps", *EVALUATION)}

    def _write(self, stored: dict[str, Any]) -> None:
        self.stored = stored
        if not world().is_first:
            return
        lines = [f"{each.name} = {getattr(self.config, each.name)!r}" for each in fields(self.config)]
        lines = [re.sub(r" at 0x[0-9a-f]+", "", line) for line in lines]  # an address says nothing
        sets = [f"{role} = {each['shown']}, checksum {each['checksum']}" for role, each in self.stored["data"].items()]
        sessions = [[f"{name} {value}" for name, value in each.items()] for each in self.stored["sessions"]]
        parts = ["\n".join(part) for part in (lines, sets, *sessions, self.stored["changes"])]
        write_text(self.path / "config.txt", "\n\n".join(parts).strip() + "\n")
        write_config(self.path, stored)  # last: it marks that a run has begun here


@contextmanager
def open_run(config: ExperimentConfig, resume: bool) -> Iterator[RunFolder]:
    """Yields the folder for a run: `config.run_dir`, else a new one in runs/<name>/ named by time and seed.

    The operating system holds its lock and releases it when the process dies. After an error before the first
    checkpoint, everything created is removed again. Raises the folder errors listed for `run`. With several processes,
    the first holds the lock and writes, and the others read; processes that torchrun restarts resume.
    """
    again = _opened_before(config.name)
    path = Path(again) if again else config.run_dir
    path = path or Path("runs") / config.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_seed{config.seed}"
    path = Path(told_by_all(str(path))[0])
    with together():
        if resume and config.run_dir is None:
            raise UsageError("expected the folder of a run to resume, got none; name it with --run-dir")
        if path.exists() and not path.is_dir():
            raise ExistingFileError(f"expected a folder at {path}, got a file; name another with --run-dir")
        made = [each for each in (path, *path.parents) if not each.exists()]
        before = set(path.iterdir()) if path.exists() else set()
        lock = FileLock(path / ".lock", timeout=0)
    try:
        with together(), translate_write_errors(path):
            if world().is_first:
                path.mkdir(parents=True, exist_ok=True)
                _acquire(lock, path)
        _check_shared(path)
        with together():
            folder = _checked(RunFolder(path, config), resume or bool(again))
        _remember(config.name, path)
        yield folder
    except BaseException:
        if lock.is_locked and not (path / "last.pt").exists():
            with suppress(OSError):  # a read-only disk refuses this too, and the first error is the one to show
                for new in set(path.iterdir()) - before:
                    shutil.rmtree(new) if new.is_dir() else new.unlink()
                for each in made:
                    each.rmdir()
        raise
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        message = f"expected a run folder that no other process writes, got {path}; wait, or name another folder"
        raise LockedError(message) from error


def _check_shared(path: Path) -> None:
    """Raises a UsageError in all processes unless they see the same folder."""
    if world().size == 1:
        return
    token = told_by_all(secrets.token_hex(8))[0]
    file = path / f".{token}"
    with together():
        if world().is_first:
            file.touch()
    told_by_all(None)  # the file exists now
    with together():
        end = time.monotonic() + SECONDS_TO_SEE
        while not file.exists():
            if time.monotonic() > end:
                got = f"another folder on {platform.node()}"
                raise UsageError(f"expected the run folder {path} to be shared by all machines, got {got}; share it")
            time.sleep(0.1)
    if world().is_first:
        file.unlink()


_opened: Counter[str] = Counter()  # number of runs that this process has opened, by name


def _opened_before(name: str) -> str:
    """The folder of this run if torchrun has restarted the processes; empty on the first start."""
    memory = launch_memory()
    key = f"pml_fewshot/{name}/{_opened[name]}"
    return memory.get(key).decode() if memory is not None and memory.check([key]) else ""


def _remember(name: str, path: Path) -> None:
    if (memory := launch_memory()) is not None and world().is_first:
        memory.set(f"pml_fewshot/{name}/{_opened[name]}", str(path))
    _opened[name] += 1


def _checked(folder: RunFolder, resume: bool) -> RunFolder:
    """The folder with its stored config, if a run may be started or resumed in it."""
    path, config = folder.path, folder.config
    # a process killed at its very start leaves hidden files and config.txt
    files = [file for file in path.iterdir() if not file.name.startswith(".") and file.name != "config.txt"]
    if not files:
        return folder
    if not resume:
        raise ExistingFileError(
            f"expected a new or empty run folder, got {path} with files in it; name another with --run-dir, or --resume"
        )
    if path / "config.json" not in files:
        raise UsageError(f"expected a run, an empty folder or none at {path}, got other files; name another folder")
    folder.stored = read_config(path)
    check_same(config, folder.stored, path, MAY_CHANGE)
    if folder.checkpoint.exists() and not folder.finished:
        folder.steps = history_of(load_checkpoint(folder.checkpoint)).steps
        if folder.steps > config.steps:
            made = f"{folder.steps} steps that the run in {path} has made"
            raise UsageError(f"expected at least the {made}, got {config.steps}; raise --steps, or start a new run")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json: "module", "config" (from `describe`), "data", "sessions", "changes" and so on."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"expected {path}, got no such file; name the folder of a run")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        damage = "" if stored.pop("checksum") == json_checksum(stored) else "another checksum"
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        damage = repr(error)
    if damage:
        raise UsageError(f"expected config.json in {folder} as it was written, got {damage}; restore it from a copy")
    if "sessions" not in stored:
        raise UsageError(f"expected a run of version 0.6 in {folder}, got an older one; use the version in config.txt")
    return stored


def write_config(folder: Path, stored: Mapping[str, Any]) -> None:
    """Writes config.json, which `read_config` reads."""
    write_text(folder / "config.json", json.dumps({**stored, "checksum": json_checksum(stored)}, indent=1))


def finished_config(path: Path) -> dict[str, Any]:
    """The stored config of a run whose figures belong to it, not to fewer steps than it was resumed for."""
    stored = read_config(path)
    differ = [name for name, value in stored.get("finished", {}).items() if stored["config"].get(name) != value]
    if "finished" not in stored or differ:
        got = f"figures of another {', '.join(differ)}" if differ else "none"
        raise UsageError(f"expected the figures of a finished run in {path}, got {got}; finish it with --resume")
    return stored


def changed_fields(config: ExperimentConfig, stored: Mapping[str, Any]) -> list[str]:
    """The fields in which a config differs from a run's; a field newer than the run counts as its default."""
    defaults = {each.name: describe(each.default) for each in fields(config) if each.default is not MISSING}
    then, now = {**defaults, **stored["config"]}, describe(config)
    return [name for name, value in now.items() if name not in ("object", *PLACE) and value != then.get(name)]


def check_same(config: ExperimentConfig, stored: Mapping[str, Any], folder: Path, may_change: Sequence[str]) -> None:
    """Raises a UsageError naming the fields, except those that may change, in which a config differs from a run's."""
    changed = [name for name in changed_fields(config, stored) if name not in may_change]
    if describe(config.eval_specs[:1]) != stored["config"]["eval_specs"][:1]:
        changed.append("eval_specs[0]")
    if changed:
        got = f"got another {', '.join(changed)}; make it as config.txt has it, or start a new run"
        raise UsageError(f"expected the config of the run in {folder}, {got}")


def check_data(splits: Splits, stored: Mapping[str, Any], folder: Path) -> None:
    """Raises a UsageError naming the datasets that are not, to the pixel, those of the run in `folder`."""
    then, now = stored["data"], _described(splits)
    changed = [role for role in now if now[role]["checksum"] != then[role]["checksum"]]
    if changed:
        got = f"got other images, labels or classes in {', '.join(changed)}; use what config.txt names, or a new folder"
        raise UsageError(f"expected the data of the run in {folder}, {got}")


def _described(splits: Splits) -> dict[str, dict[str, Any]]:
    sets = {role: each for role, each in vars(splits).items() if each is not None}
    about = {role: {"shown": repr(each), "checksum": each.checksum()} for role, each in sets.items()}
    shapes = {role: {"classes": len(each.class_names), "item": list(each.item_shape)} for role, each in sets.items()}
    none = {"shown": "None", "checksum": "none", "classes": 0, "item": []}
    return {role: {**about[role], **shapes[role]} if role in sets else none for role in vars(splits)}


def environment(device: torch.device) -> dict[str, str]:
    """Versions, threads, device and git commit: what figures depend on besides config and data."""
    return {
        **{package: _version(package) for package in PACKAGES},
        "python": f"{platform.python_version()} on {platform.platform()}",
        "threads": str(torch.get_num_threads()),
        "device": device.type,
        "processes": str(world().size),
        "git commit": _git_commit() or "unknown (not a checkout)",
    }


def environment_changes(stored: Mapping[str, Any], device: torch.device) -> list[str]:
    """Changes of versions, commit, device, threads or processes since a run's last session."""
    then, now = stored["sessions"][-1], environment(device)
    return [f"{name}: {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]


def command() -> str:
    """The command that started this process."""
    name = module_name("__main__")
    started = f"-m {name.removesuffix('.__main__')}" if name != "__main__" else shlex.quote(sys.argv[0] or "-")
    return f"python {started} {shlex.join(sys.argv[1:])}".strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout used without being installed
        return "not installed"


def _git_commit() -> str:
    """The git commit of this package, with -dirty when code differs from it; empty if it is not in a checkout.

    Documentation pages do not count: their tables are written from the figures of runs.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed somewhere, perhaps below another project's checkout
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md")
        return git("rev-parse", "--verify", "-q", "HEAD").strip() + ("-dirty" if changed else "")
    except FileNotFoundError:  # no git on this machine
        return ""
