"""Runs as torchrun starts them: what is wrong in one process is one clear error, what is killed goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.killing import outcome

pytestmark = pytest.mark.slow  # ten seconds each, most of them imports

ROOT = Path(__file__).parent.parent
SECONDS = 100


def torchrun(folder: Path, fault: str, *more: str, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", "2"]
    return [*launch, "-m", "tests.launched", fault, "metric", "--run-dir", str(folder), *more]


def started(command: list[str], where: Path, **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=where, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("config", "error: expected the same in all processes, got in process 1 another clip_norm (3.0, not null)"),
        ("data", "error: expected the same in all processes, got in process 1 another test ("),
        ("loader", "error: process 1: Traceback (most recent call last)"),
        ("folder", "error: process 1: expected the run folder run to be shared by all machines, got another folder"),
        ("hang", "error: expected an answer of all processes, got none of one of them"),
    ],
)
def test_a_fault_of_one_process_is_one_error_of_the_first(fault: str, error: str, tmp_path: Path) -> None:
    minutes = "0.1" if fault == "hang" else "2"
    process = started(torchrun(Path("run"), fault), tmp_path, PML_FEWSHOT_TIMEOUT_MINUTES=minutes)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    lines = [line for line in output.splitlines() if "error: " in line and "distributed/elastic" not in line]
    assert [line[: len(error)] for line in lines] == [error], output
    assert not (tmp_path / "run" / "results.csv").exists()


def test_a_port_in_use_is_one_error(tmp_path: Path) -> None:
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "tests.launched", "none", "metric", "--run-dir", "run"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = started(command, tmp_path, **own, MASTER_PORT=str(taken.getsockname()[1]))
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: expected all processes to meet at 127.0.0.1:")
    assert "address already in use" in last


def test_torchrun_starts_a_killed_process_again_and_the_run_ends_as_if_not(tmp_path: Path) -> None:
    whole = started(torchrun(tmp_path / "whole", "none"), tmp_path)
    output, _ = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, output
    assert "trained by 2 processes, batch norm over the share of each" in output
    again = started(torchrun(tmp_path / "killed", "none", options=("--standalone", "--max-restarts", "1")), tmp_path)
    end = time.monotonic() + SECONDS
    while not (tmp_path / "killed" / "last.pt").exists():  # (no --resume: torchrun's own restart implies it)
        assert time.monotonic() < end
        assert again.poll() is None
        time.sleep(0.001)
    found = subprocess.run(["pgrep", "-P", str(again.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    output, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, output
    assert "failed (exitcode: -9)" in output
    got, expected = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert [key for key in expected if got.get(key) != expected[key]] == []


def test_ctrl_c_ends_all_and_one_process_resumes(tmp_path: Path) -> None:
    long = ("--steps", "100000", "--checkpoint-every", "100000", "--validate-every", "100000")
    process = started(torchrun(tmp_path / "run", "none", *long), tmp_path)
    end = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "last.pt").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert output.count(f"resume with --run-dir {tmp_path / 'run'} --resume") == 1, output
    module = [sys.executable, "-m", "tests.launched", "none", "metric", "--run-dir", str(tmp_path / "run")]
    resumed = started([*module, "--resume", *long], tmp_path)
    assert resumed.stdout is not None
    noted = any(line == "note: processes: 2 then, 1 now\n" for line in resumed.stdout)
    assert noted
    resumed.send_signal(signal.SIGINT)
    output, _ = resumed.communicate(timeout=SECONDS)
    assert resumed.returncode == 75, output
