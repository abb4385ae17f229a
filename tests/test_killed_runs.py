"""A run that is killed at any moment goes on, and ends with the state, records and figures of one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_experiments import TINY_EXPERIMENTS

ROOT = Path(__file__).parent.parent


def kill(kills: int, folder: Path, *names: str) -> str:
    command = [sys.executable, "-m", "tests.killing", str(folder), str(kills), "0", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_runs_killed_at_ten_moments_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    said = kill(10, tmp_path / "runs", *TINY_EXPERIMENTS)
    for name in TINY_EXPERIMENTS:
        assert f"{name}: 10 kills" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_EXPERIMENTS)
def test_runs_killed_at_two_hundred_moments_end_as_if_they_had_not_been(name: str, tmp_path: Path) -> None:
    assert f"{name}: 200 kills" in kill(200, tmp_path / "runs", name)
