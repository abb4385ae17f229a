"""The comparisons with other libraries run from end to end, and their checks refuse figures that disagree."""

import csv
import importlib.util
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from pml_fewshot import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicResult

pytest.importorskip("easyfsl", reason="easyfsl is not installed: pip install -c constraints.txt -e '.[bench]'")
pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed (the extra bench)")

from experiments.speed import __main__ as command
from experiments.speed import benchmark_worker, evaluation_speed, maml_step
from experiments.speed.benchmarks import BENCHMARKS, Contest, Sizes
from experiments.speed.side_by_side import Row, check_accuracy, check_equal

Printed = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[1]
TINY = Sizes(
    tasks=2,
    adapted=4,
    episodes=60,
    wide_episodes=60,
    wide_items=1000,
    peer_episodes=20,
    retrieved=300,
    drawn=2,
    ways=40,
    steps=1,
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's /proc")


@pytest.fixture
def seeded() -> Iterator[None]:
    """easyfsl draws from Python's global generator: seeded here, and both global generators restored afterwards."""
    state = random.getstate()
    random.seed(0)
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


@pytest.mark.slow
@pytest.mark.usefixtures("seeded")
def test_evaluation_prints_every_line(monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path) -> None:
    characters = evaluation_speed.random_images(8, 18, size=28, channels=1)
    monkeypatch.setattr(evaluation_speed, "characters", lambda data_root: characters)
    monkeypatch.setattr(evaluation_speed, "keep_freed_memory", lambda: False)  # it would last for the whole session
    peers = {"peer_episodes": 6, "peer_feature_episodes": 20, "peer_episodes_84": 2}
    evaluation_speed.main(tmp_path, repeats=1, episodes=60, images_84=16, **peers)
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 11
    assert all(line.count("|") == 7 for line in rows)
    assert printed.out.count("accuracies agree") == 2
    for text in ("easyfsl 1.5", "faiss-cpu", "data_source=None", "extrapolated from 20", "learn2learn 0.2", "threads"):
        assert text in printed.out
    assert "it/s" not in printed.err  # no progress bars


@pytest.mark.slow
def test_maml_step_prints_every_line(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(maml_step, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(maml_step, "SETTINGS", maml_step.SETTINGS[:2])  # five inner steps take a minute
    monkeypatch.setattr(maml_step, "MEMORY_SETTINGS", maml_step.MEMORY_SETTINGS[:1])
    maml_step.main(rounds=1, threads=torch.get_num_threads(), tasks=2, queries=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 2 * 4 + 2 + 3
    assert all(line.count("|") == 7 for line in rows[:8])
    theirs, one_task, recomputed = (float(line.split("|")[2]) for line in rows[-3:])  # what is promised of memory
    assert one_task <= 1.2 * theirs
    assert recomputed <= 0.5 * one_task


def test_a_peer_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = maml_step.learn2learn
    monkeypatch.setattr(maml_step, "learn2learn", lambda *arguments: real(*arguments[:-1], True))  # first order
    with pytest.raises(AssertionError, match="learn2learn"):
        maml_step.check_gradients(maml_step.episodes(2, 1, 1, "cpu"), 1, first_order=False)


def test_ratio_is_how_many_times_faster_ours_is() -> None:
    assert str(Row("x", 2000.0, "p", 100.0, "9")) == "| x | 2,000 episodes/s | p | 100.00 episodes/s | 20.0 | 9 |"
    assert str(Row("x", 0.5, "p", 2.0, unit="s")) == "| x | 0.50 s | p | 2.00 s | 4.0 |  |"


def test_figures_that_disagree_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    per_episode = 0.6 + 0.1 * torch.randn(1000, generator=generator).double()
    ours = EpisodicResult(per_episode.mean().item(), 0.006, per_episode, EpisodeSpec(5, 1, 15), 0, "")
    check_accuracy("a peer", 0.62, 100, ours)
    with pytest.raises(AssertionError, match=r"accuracy 0\.7000 over 100 episodes"):
        check_accuracy("a peer", 0.7, 100, ours)
    check_equal("a peer", {"precision_at_1": 0.5}, {"precision_at_1": 0.5001})
    with pytest.raises(AssertionError, match="precision_at_1"):
        check_equal("a peer", {"precision_at_1": 0.5}, {"precision_at_1": 0.51})


# --- python -m experiments.speed --------------------------------------------------------------------------------------


def rows_of(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.slow
def test_one_command_measures_everything(monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(
        command,
        "all_conditions",
        lambda: [command.Condition(1, False), command.Condition(2, platform.libc_ver()[0] == "glibc")],
    )
    command.main(quick=True, rounds=3, csv=tmp_path / "speed.csv")
    printed = capsys.readouterr()
    rows = rows_of(printed.out)
    assert [row[1] for row in rows] == ["1"] * len(BENCHMARKS) + ["2"] * len(BENCHMARKS)
    for row in rows:
        middle, lowest, highest = map(float, row[6:9])
        assert 0 < lowest <= middle <= highest
        assert not row[10] or row[10].endswith(" MiB")
    with (tmp_path / "speed.csv").open(newline="") as stream:
        assert [list(row.values())[: len(command.COLUMNS)] for row in csv.DictReader(stream)] == rows
    assert "python -m experiments.speed --quick --rounds 3" in printed.out
    assert printed.err.count("minutes left") == len(rows)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_processes(number: signal.Signals) -> None:
    given = [
        sys.executable,
        "-m",
        "experiments.speed",
        "--quick",
        "--only",
        "episodes-beside-busy",
        "--rounds",
        "1000000",
    ]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        started: set[int] = set()
        while len(started) < 2:  # the worker, and what keeps a core busy
            assert process.poll() is None
            started = descendants(process.pid)
        process.send_signal(number)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    for _ in range(200):  # what is killed takes a moment to end
        if not (left := [pid for pid in started if alive(pid)]):
            break
        time.sleep(0.05)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        children |= set(map(int, path.read_text().split()))
    return children.union(*map(descendants, children))


@pytest.mark.slow
def test_a_benchmark_that_fails_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="exit code 1"):
        list(command.compare([command.Condition(1, False)], ["no such benchmark"], 1, TINY))


MEASURED: dict[str, Any] = {
    "what": "a step",
    "peer": "a peer",
    "wanted": "2.0",
    "unit": "s",
    "ours": [1.0, 2.0, 4.0],
    "theirs": [3.0, 2.0, 20.0],
    "memory": 12.4,
}


def test_ratio_is_the_median_of_rounds_with_its_extremes() -> None:
    row = command.cells(command.Condition(2, True), MEASURED)
    assert list(row) == list(command.COLUMNS)
    about = ["a step", "2", "freed memory kept", "2 s", "a peer", "3 s"]
    assert list(row.values()) == [*about, "3.00", "1.00", "5.00", "2.0", "12 MiB"]
    alone = command.cells(command.Condition(1, False), MEASURED | {"theirs": [], "unit": "episodes/s", "memory": None})
    about = ["a step", "1", "as the system has it", "0.5 episodes/s", "a peer", ""]
    assert list(alone.values()) == [*about, "", "", "", "2.0", ""]
    assert command.figure(1 / 12_345, "episodes/s") == "12,345 episodes/s"


def test_contenders_are_checked_and_then_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    compared: list[tuple[Any, Any]] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    monkeypatch.setattr(benchmark_worker, "seconds", lambda action: action())
    contest = Contest(
        "x",
        lambda: run("ours", 6.0),
        "p",
        lambda: run("theirs", 10.0),
        "2",
        work=3,
        their_work=2,
        check=lambda ours, theirs: compared.append((ours, theirs)),
    )
    measured = benchmark_worker.measure(contest, 2)
    assert (measured["ours"], measured["theirs"]) == ([2.0, 2.0], [5.0, 5.0])
    assert compared == [(6.0, 10.0)]
    assert order[-4:] == ["ours", "theirs"] * 2
    assert measured["peer"] == "p"
    alone = benchmark_worker.measure(Contest("x", lambda: 1.0, "not installed", None, "2"), 2)
    assert (alone["ours"], alone["theirs"]) == ([1.0, 1.0], [])


@LINUX
def test_memory_is_the_peak_above_what_there_was() -> None:
    before = torch.ones(2**25)  # 128 MiB, which do not count
    total, grown = benchmark_worker.with_memory(lambda: torch.ones(2**23).sum())  # 32 MiB
    assert total == 2**23
    assert grown is None or 31 < grown < 64
    assert len(before) == 2**25


FAULTS = """
import ctypes, os, resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def turn():
    block = ctypes.c_void_p(libc.malloc(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
[turn() for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_a_condition_sets_threads_and_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000000")  # which is the user's own
    faults = {}
    for kept in (False, True):
        own = command.Condition(3, kept).environment()
        found = subprocess.run(
            [sys.executable, "-c", FAULTS], env=own, capture_output=True, text=True, check=True
        ).stdout
        faults[kept], threads = map(int, found.split())
        assert threads == 3
        assert own.get("PML_FEWSHOT_KEEP_MEMORY") == (None if kept else "0")
    assert faults[True] < 100 < faults[False]
    assert {each.kept for each in command.all_conditions()} == {False, True}
    assert {each.threads for each in command.all_conditions()} == {1, torch.get_num_threads()}
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1000000000"


def test_csv_is_what_the_pages_take(tmp_path: Path) -> None:
    row = command.cells(command.Condition(2, True), MEASURED) | command.bookkeeping(["--quick"])
    for _ in range(2):
        command.check_csv(tmp_path / "speed.csv")
        command.append(tmp_path / "speed.csv", row)
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    assert spec
    assert spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    shown = render.table("<!-- table: speed.csv | columns: measured, ratio, lowest, command -->", tmp_path, "page")
    assert shown[2:] == ["| a step | 3.00 | 1.00 | `python -m experiments.speed --quick` |"]
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 3
    assert str(ROOT) not in row["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "expected --rounds to be an integer of at least 1, got 0"),
        ({"only": ("maml-second-ordr",)}, "did you mean 'maml-second-order'"),
        ({"csv": Path("no such folder") / "speed.csv"}, "expected --csv in a folder"),
        ({"csv": ROOT / "docs" / "results" / "maml.csv"}, "expected --csv with the columns"),
        ({"data_root": Path("no such folder")}, "expected --data-root as a folder"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(**options)
    assert str(ended.value).startswith(f"error: {message}") or message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not capsys.readouterr().out


def test_a_contest_with_a_peer_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def contest(name: str) -> Contest:
        with ExitStack() as stack:
            return BENCHMARKS[name](TINY, None, stack)

    found = contest("retrieval-faiss")
    ours = found.ours()
    assert found.theirs is not None
    found.check(ours, found.theirs())  # which finds neighbors alone
    with pytest.raises(AssertionError, match="precision_at_1"):
        found.check(ours, ours | {"precision_at_1": ours["precision_at_1"] + 0.01})
    real, usual = maml_step.step_by_step, maml_step.usual
    monkeypatch.setattr(maml_step, "step_by_step", lambda *given, first_order: real(*given[:-1], 2, first_order))
    with pytest.raises(AssertionError, match="not close"):
        contest("maml-evaluated")
    monkeypatch.setattr(maml_step, "usual", lambda: torch.nn.Sequential(torch.nn.Tanh(), *usual()))
    with pytest.raises(AssertionError, match="not close"):
        contest("protonet-step")


def test_a_missing_peer_is_named_and_ours_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyfsl", None)
    for name in [name for name in sys.modules if name.startswith(("easyfsl.", "experiments.speed.peers"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("experiments.speed.peers")
    with ExitStack() as stack:
        contest = BENCHMARKS["episodes-wide"](TINY, None, stack)
    assert contest.theirs is None
    assert "easyfsl" in contest.peer
    assert "not installed" in contest.peer
    assert len(contest.ours().per_episode) == TINY.wide_episodes
