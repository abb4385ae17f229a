"""What is made once for all tests that only look at it: a finished run, a PostgreSQL, what workers have shared."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pml_fewshot.experiment.run import run
from tests.tiny_experiments import TINY_EXPERIMENTS, Finished


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without run_dir are written below the working folder: not into the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PML_FEWSHOT_DATA", raising=False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The ProtoNet's run; not to be changed."""
    config = replace(TINY_EXPERIMENTS["protonet"], run_dir=tmp_path_factory.mktemp("finished") / "run", seed=7)
    return Finished(config, config.run_dir or Path(), run(config))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """The same, of one's own."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return finished._replace(folder=tmp_path / "run", config=replace(finished.config, run_dir=tmp_path / "run"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL of these tests' own, which listens to no network; why there is none otherwise."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or server is None or importlib.util.find_spec("psycopg2") is None:
        yield "initdb and postgres are not on PATH, or psycopg2 is not installed"
        return
    owner: dict[str, Any] = {"user": "nobody", "cwd": "/"} if os.geteuid() == 0 else {"cwd": "/"}  # it refuses root
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with tempfile.TemporaryDirectory(prefix="pg") as place:  # (a socket's path may have 100 characters)
        if os.geteuid() == 0:
            shutil.chown(place, "nobody")
        data = f"{place}/data"
        made = subprocess.run([initdb, "-D", data, "-A", "trust", "-U", "tester", "--no-sync"], **quiet, **owner)
        assert made.returncode == 0, made.stdout
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={place}"]
        with subprocess.Popen([server, "-D", data, *options], **quiet, **owner) as process:
            try:
                for line in process.stdout:  # type: ignore[union-attr]
                    if "ready to accept connections" in line:
                        break
                yield f"postgresql+psycopg2://tester@/postgres?host={place}"
            finally:
                process.send_signal(2)  # a fast shutdown
                process.communicate()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As workers have: sums of several threads differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_by_workers(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which workers have shared a search, with a file and with a PostgreSQL, and a sweep: one of each died.

    All by one program, which takes ten seconds to import torch.
    """
    pytest.importorskip("optuna")
    from tests.sharing import share

    place = tmp_path_factory.mktemp("workers")
    jobs = [f"search {place}/file/shared", f"sweep {place}/sweep/shared"]
    share(*jobs, *([f"search {place}/database/shared {postgres}"] if "://" in postgres else []))
    return place
