"""The run folder: one writer at a time, by a lock that no dead process holds; what a full disk does to it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from pml_fewshot.atomic import CannotWriteError
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.experiment import run
from pml_fewshot.provenance import changes, machine, read_provenance
from pml_fewshot.run_folder import choose_run_folder, sole_writer
from pml_fewshot.trainers.divergence import TrainingDiverged
from tests import tiny_experiments
from tests.killing import outcome
from tests.test_reproduce import change_about
from tests.tiny_experiments import TINY_EXPERIMENTS, tiny_set

ROOT = Path(__file__).parent.parent
TINY = TINY_EXPERIMENTS["protonet"]

# locks the folder that it is told, says so, and waits to be killed
HOLDER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from pml_fewshot.run_folder import sole_writer
from tests.tiny_experiments import TINY_EXPERIMENTS
with sole_writer(Path(sys.argv[1]), replace(TINY_EXPERIMENTS["protonet"], run_dir=Path(sys.argv[1])), False):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the folder `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_two_processes_cannot_write_one_folder_and_a_dead_one_holds_nothing(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(BlockingIOError, match=r"^expected a run folder that no other process writes, got .*run"):
            run(config, resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run(config).rows


def test_two_runs_in_one_process_cannot_write_one_folder_either(tmp_path: Path) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    with sole_writer(tmp_path / "run", config, False), pytest.raises(BlockingIOError):
        run(config)


def test_what_another_process_has_begun_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    config = replace(TINY, run_dir=tmp_path / "run")
    folder = choose_run_folder(config, False)
    run(config)  # the other process comes first, and ends
    with pytest.raises(FileExistsError, match="holds another run"), sole_writer(folder, config, False):
        pytest.fail("would have been written over")
    assert (folder / "results.csv").exists()


def test_what_a_process_killed_at_its_very_beginning_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.txt.unfinished", "config.json"):
        (tmp_path / "run" / name).write_text("")
    assert run(replace(TINY, steps=2, run_dir=tmp_path / "run")).rows


@pytest.mark.parametrize("limit", [4_000, 16_000])
def test_full_disk_is_one_error_and_the_run_goes_on_where_there_is_room_again(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert not list((tmp_path / "run").glob(".*.unfinished")) if (tmp_path / "run").exists() else True
    run(config, resume=True)
    run(replace(config, run_dir=tmp_path / "whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_folder_that_cannot_be_made_is_one_error() -> None:
    before = os.geteuid()
    with pytest.raises(CannotWriteError, match=r"^expected to write .*Permission denied"):  # noqa: PT012
        os.seteuid(before or 65534)  # nobody, where root runs this
        try:
            with sole_writer(Path("/run_of_nobody"), TINY, False):
                pytest.fail("made in the root folder")
        finally:
            os.seteuid(before)


def test_folder_that_becomes_read_only_is_one_error_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """What writing a file there says, is said by every file of the run: here by the checkpoint."""
    config = replace(TINY, run_dir=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        replaced, before = iter(range(100)), Path.replace

        def refuse(self: Path, target: Path) -> Path:
            if next(replaced) == 5:
                raise PermissionError(13, "Permission denied", str(target))
            return before(self, target)

        patch.setattr(Path, "replace", refuse)
        with pytest.raises(CannotWriteError, match=r"expected to write .*last\.pt, got .*Permission denied"):
            run(config)
    run(config, resume=True)
    run(replace(config, run_dir=tmp_path / "whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_other_data_than_the_run_began_with_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, run_dir=tmp_path / "run", steps=4)
    run(config)
    (tmp_path / "run" / "figures.csv").unlink()  # as if it had been killed while it was judged

    def one_pixel_off(prefix: str, classes: int, seed: int) -> FewShotDataset:
        dataset = tiny_set(prefix, classes, seed)
        if prefix in changed:
            dataset.images[3, 0, 1, 2] ^= 1
        return dataset

    monkeypatch.setattr(tiny_experiments, "tiny_set", one_pixel_off)
    changed: set[str] = set()
    for prefixes, named in (("c", "test"), ("ab", "train, val")):
        changed |= set(prefixes)
        with pytest.raises(ValueError, match=rf"expected the data of the run in .*, got other images, .* in {named};"):
            run(config, resume=True)
        changed.clear()
    assert run(config, resume=True).rows


def test_a_changed_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TINY, run_dir=tmp_path / "run", steps=2)
    run(config)
    change_about(tmp_path / "run", "machine", "threads", value="99")
    (tmp_path / "run" / "figures.csv").unlink()
    shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)
    run(config, resume=True)
    assert "note: threads: 99 then" in capsys.readouterr().out
    about = read_provenance(tmp_path / "run")
    assert about["machine"]["threads"] == "99"
    assert about["sittings"] == [machine(torch.device("cpu"))]  # what the figures come from
    assert "went on with:" in (tmp_path / "run" / "config.txt").read_text()
    assert changes(about, torch.device("cpu")) == []
    (tmp_path / "run" / "figures.csv").unlink()
    run(config, resume=True)
    assert "note:" not in capsys.readouterr().out
    assert read_provenance(tmp_path / "run") == about


@pytest.mark.parametrize("name", [".last.pt.unfinished", "last.pt", "logs.db", "tensorboard", "train.csv", "tables/x"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_in_the_folder_is_refused_and_what_it_leads_to_is_unharmed(
    name: str, resume: bool, tmp_path: Path
) -> None:
    config = replace(TINY, run_dir=tmp_path / "run", steps=2)
    if resume:
        run(config)
        (tmp_path / "run" / "figures.csv").unlink()
        shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)
    link, elsewhere = tmp_path / "run" / name, tmp_path / "thesis"
    elsewhere.write_text("mine")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"expected a run folder without links at .*run, got .*" + name):
        run(config, resume)
    assert elsewhere.read_text() == "mine"


def test_a_folder_that_was_there_is_left_as_it_was_when_an_error_comes_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingDiverged):
        run(replace(TINY, run_dir=tmp_path / "run", optimizer=partial(SGD, lr=1e38), checkpoint_every=1))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    assert run(replace(TINY, run_dir=tmp_path / "run", steps=2)).rows
