"""A run that is killed at any moment goes on, and ends with the state, records and figures of one that was not."""

import re
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


def check_share(said: str, name: str, kills: int) -> None:
    """So many kills, and enough of them where something is to be lost: after the first step, before the last."""
    found = re.search(rf"^{name}: (\d+) kills, (\d+) of them between steps, (\d+) runs", said, re.MULTILINE)
    assert found, said
    killed, between, ends = map(int, found.groups())
    assert killed >= kills
    assert between >= 0.3 * kills
    assert ends >= 1


def test_runs_killed_at_ten_moments_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    said = kill(10, tmp_path / "runs", *TINY_EXPERIMENTS)
    for name in TINY_EXPERIMENTS:
        check_share(said, name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_EXPERIMENTS)
def test_runs_killed_at_two_hundred_moments_end_as_if_they_had_not_been(name: str, tmp_path: Path) -> None:
    check_share(kill(200, tmp_path / "runs", name), name, 200)
