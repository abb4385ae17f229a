"""One finished run for all tests that only look at one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

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
