"""A run that is killed at any moment resumes, and ends with the state, records and figures of one that was not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_experiments import TINY_EXPERIMENTS

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.parametrize(
    ("names", "kills", "processes"),
    [
        (["protonet"], 3, 1),
        (["metric"], 2, 2),
        pytest.param(list(TINY_EXPERIMENTS), 10, 1, marks=pytest.mark.slow),
        pytest.param(list(TINY_EXPERIMENTS), 20, 2, marks=pytest.mark.slow),
        *(pytest.param([name], 200, 1, marks=pytest.mark.slow) for name in TINY_EXPERIMENTS),
    ],
    ids=str,
)
def test_runs_killed_at_random_moments_end_as_if_not(
    names: list[str], kills: int, processes: int, tmp_path: Path
) -> None:
    """Enough of the kills fall where something is to be lost: after the first step, before the last."""
    command = [sys.executable, "-m", "tests.killing", str(tmp_path / "runs"), str(kills), "0", str(processes), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        found = re.search(rf"^{name}: (\d+) kills, (\d+) of them between steps, (\d+) runs", done.stdout, re.MULTILINE)
        assert found, done.stdout
        killed, between, ends = map(int, found.groups())
        assert killed >= kills
        assert between >= 0.3 * kills
        assert ends >= 1
