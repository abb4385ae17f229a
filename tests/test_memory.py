"""Embedding and evaluating a set larger than the memory for it: the files are mapped and read a part at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}  # as experiments set it for speed
BUDGET = 256  # MiB of memory of its own, for sets of 1,024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
@pytest.mark.parametrize("allocator", [{}, KEPT], ids=["usual", "freed memory kept"])
@pytest.mark.parametrize("kind", ["images", "bank"])
def test_a_gibibyte_is_evaluated_in_a_quarter_of_it(kind: str, allocator: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.memory_use", kind, str(tmp_path)]
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, cwd=ROOT, env=others | allocator, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < BUDGET
