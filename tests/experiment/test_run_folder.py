"""The run folder: one writer at a time, never written over, the same config and data; what a full disk does to it."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from pml_fewshot import FewShotDataset, UsageError, run
from pml_fewshot.checks import ExistingFileError, LockedError, MissingFileError
from pml_fewshot.experiment import run_folder
from pml_fewshot.experiment.run_folder import environment, open_run, read_config
from pml_fewshot.io.atomic import CannotWriteError
from pml_fewshot.io.tensors import json_checksum
from tests import tiny_experiments
from tests.killing import outcome
from tests.tiny_experiments import TINY_EXPERIMENTS, Finished, tiny_set

ROOT = Path(__file__).parents[2]
TINY = replace(TINY_EXPERIMENTS["protonet"], steps=4)


def rewrite(folder: Path, **changes: object) -> None:
    """Changes config.json, with its checksum."""
    stored = {**read_config(folder), **changes}
    stored["checksum"] = json_checksum(stored)
    (folder / "config.json").write_text(json.dumps(stored))


# locks the folder that it is given, says so, and waits to be killed
HOLDER = """
import sys
from dataclasses import replace
from pathlib import Path
from pml_fewshot.experiment.run_folder import open_run
from tests.tiny_experiments import TINY_EXPERIMENTS
with open_run(replace(TINY_EXPERIMENTS["protonet"], run_dir=Path(sys.argv[1])), False):
    print("locked", flush=True)
    sys.stdin.read()  # until the test ends
"""


def test_two_runs_in_one_process_cannot_write_one_folder(tmp_path: Path) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    with open_run(config, False), pytest.raises(LockedError, match=r"^expected a run folder that no other process"):
        run(config)
    assert run(config).rows


@pytest.mark.slow
def test_two_processes_cannot_write_one_folder_and_a_dead_one_holds_no_lock(tmp_path: Path) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=r"^expected a run folder that no other process writes"):
                run(config, resume)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        holder.send_signal(signal.SIGKILL)
    assert run(config).rows


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_refused_and_left_as_it_was(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    message = "a run, an empty folder or none" if resume else "a new or empty run folder"
    with pytest.raises(UsageError if resume else ExistingFileError, match=f"expected {message}"):
        run(replace(TINY, run_dir=tmp_path / "run"), resume=resume)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match=r"expected a folder at .*thesis\.txt, got a file"):
        run(replace(TINY, run_dir=tmp_path / "run" / "thesis.txt"), resume=resume)


def test_what_a_process_killed_at_its_very_start_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.json.tmp", "config.txt"):
        (tmp_path / "run" / name).write_text("")
    assert run(replace(TINY, run_dir=tmp_path / "run")).rows


def test_rows_of_a_process_killed_at_its_first_step_are_forgotten(finished: Finished, copied: Finished) -> None:
    for name in ("last.pt", "figures.csv"):
        (copied.folder / name).unlink()
    run(copied.config, resume=True)
    assert outcome(copied.folder) == outcome(finished.folder)


def test_another_config_is_refused_and_its_fields_are_named(finished: Finished) -> None:
    other = replace(finished.config, seed=8, validate_every=5, device="auto", data_root=Path("elsewhere"))
    with pytest.raises(UsageError, match=r"expected the config of the run in .*, got another seed, validate_every;"):
        run(other, resume=True)


def test_other_data_are_refused_and_the_sets_named(copied: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied.folder / "figures.csv").unlink()  # as if it had been killed during its evaluation

    def one_pixel_off(changed: str, prefix: str, classes: int, seed: int) -> FewShotDataset:
        dataset = tiny_set(prefix, classes, seed)
        dataset.images[3, 0, 1, 2] ^= prefix in changed
        return dataset

    for changed, named in (("c", "test"), ("ab", "train, val")):
        monkeypatch.setattr(tiny_experiments, "tiny_set", partial(one_pixel_off, changed))
        with pytest.raises(UsageError, match=rf"expected the data of the run in .*, got other images, .* in {named};"):
            run(copied.config, resume=True)
    monkeypatch.setattr(tiny_experiments, "tiny_set", tiny_set)
    assert run(copied.config, resume=True).rows == copied.table.rows


def test_another_environment_is_noted_and_recorded(copied: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    now = environment(torch.device("cpu"))
    rewrite(copied.folder, sessions=[{**now, "threads": "99"}])
    for _ in range(2):
        (copied.folder / "figures.csv").unlink()
        run(copied.config, resume=True)
    assert capsys.readouterr().out.count("note: threads: 99 then") == 1  # the second time nothing has changed
    assert read_config(copied.folder)["sessions"] == [{**now, "threads": "99"}, now]
    assert "threads 99\n" in (copied.folder / "config.txt").read_text()


def test_packages_and_git_that_are_not_installed_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(run_folder, "version", not_found)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment(torch.device("cpu"))
    assert found["pml_fewshot"] == "not installed"
    assert found["git commit"].startswith("unknown")


def test_a_commit_is_dirty_by_its_code_and_not_by_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("pml_fewshot/experiment/run_folder.py", "docs/results/some.csv", "README.md")]
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(run_folder, "__file__", str(files[0]))
    commit = environment(torch.device("cpu"))["git commit"]
    assert len(commit) == 40
    for file, dirty in zip(files[::-1], ("", "", "-dirty"), strict=True):
        file.write_text("after\n")
        assert environment(torch.device("cpu"))["git commit"] == commit + dirty


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text.replace('"num_episodes": 30', '"num_episodes": 31'), "got another checksum"),
        (lambda text: text[: len(text) // 2], "got JSONDecodeError"),
        (lambda text: "[" * 100_000, "got RecursionError"),
    ],
    ids=["changed", "cut", "deep"],
)
def test_a_damaged_config_json_is_one_error(harm, message: str, copied: Finished) -> None:  # type: ignore[no-untyped-def]
    text = (copied.folder / "config.json").read_text()
    (copied.folder / "config.json").write_text(harm(text))
    with pytest.raises(UsageError, match=f"expected config.json in .* as it was written, {message}.*; restore"):
        run(copied.config, resume=True)


def test_a_missing_or_older_config_json_is_one_error(copied: Finished) -> None:
    with pytest.raises(MissingFileError, match=r"expected .*config\.json, got no such file"):
        read_config(copied.folder / "nowhere")
    stored = {"config": {}, "data": {}, "machine": {}}
    (copied.folder / "config.json").write_text(json.dumps({**stored, "checksum": json_checksum(stored)}))
    with pytest.raises(UsageError, match=r"expected a run of version 0\.6 in"):
        read_config(copied.folder)


@pytest.mark.parametrize("limit", [pytest.param(4_000, marks=pytest.mark.slow), 16_000])
def test_after_a_full_disk_the_run_resumes(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may grow above the limit: first a file of records is too large, then a checkpoint."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread may die of it
    config = replace(TINY, run_dir=tmp_path / "run", steps=30)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CannotWriteError, match=r"^expected to write .*(File too large|disk I/O error)"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob(".*.tmp"))
    run(config, resume=True)
    run(replace(config, run_dir=tmp_path / "whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_one_error() -> None:
    before = os.geteuid()
    with pytest.raises(CannotWriteError, match=r"^expected to write .*Permission denied"):  # noqa: PT012
        os.seteuid(before or 65534)  # nobody, where root runs this
        try:
            run(replace(TINY, run_dir=Path("/run_of_nobody")))
        finally:
            os.seteuid(before)
