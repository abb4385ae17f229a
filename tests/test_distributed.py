"""Several processes train and evaluate as one does: `tests.shared_work`, done by 1, 2 and 3 of them (gloo)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.shared_work import TRAINERS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
SIZES = (2, 3)

Results = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process returned, by work and number of processes; made once for all workers of pytest."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if folder.name.startswith("popen") else folder) / "several" / "results.pt"
    file.parent.mkdir(exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            command = [sys.executable, "-m", "tests.several", str(file)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-6000:]
    found: Results = torch.load(file, weights_only=False)
    return found


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["state"].keys() == other["state"].keys()
    states = [(one["state"][name].double(), other["state"][name].double()) for name in one["state"]]
    return max(float((mine - theirs).abs().max()) for mine, theirs in states if mine.numel())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_that_of_one_process(name: str, size: int, results: Results) -> None:
    """In float64, where 20 steps round by 1e-12: a share weighed wrongly, or a gradient lost, is 1e-3 and more."""
    [one], ranks = results[f"fixed {name}", 1], results[f"fixed {name}", size]
    assert largest_difference(one, ranks[0]) < 1e-9
    assert one["losses"][-1] == pytest.approx(ranks[0]["losses"][-1], rel=1e-6)
    assert one["accuracy"] == ranks[0]["accuracy"]
    assert one["skipped"] == ranks[0]["skipped"]


@pytest.mark.parametrize("work", [*(f"fixed {name}" for name in TRAINERS), "synced", "local"])
@pytest.mark.parametrize("size", SIZES)
def test_all_processes_end_with_the_same_state(work: str, size: int, results: Results) -> None:
    """Bit for bit: weights, CrossBatchMemory and its place, batch norm's statistics, learned rates, generators."""
    first, *others = results[work, size]
    for other in others:
        assert first["state"].keys() == other["state"].keys()
        assert all(torch.equal(first["state"][name], other["state"][name]) for name in first["state"])
        assert first["losses"] == other["losses"]


def test_the_memory_was_filled(results: Results) -> None:
    state = results["fixed metric", 3][0]["state"]
    assert state["loss.embedding_memory"].abs().sum(dim=1).gt(0).all()
    assert len(state["loss.label_memory"].unique()) > 5


@pytest.mark.parametrize("size", SIZES)
def test_synchronized_batch_norm_trains_as_one_process(size: int, results: Results) -> None:
    """Its gradient goes through the statistics of all, its running statistics are those of all."""
    [one], ranks = results["synced", 1], results["synced", size]
    assert largest_difference(one, ranks[0]) < 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_batch_norm_of_a_share_is_another_training(size: int, results: Results) -> None:
    [one], ranks = results["local", 1], results["local", size]
    assert largest_difference(one, ranks[0]) > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_is_that_of_one_process_to_the_bit(size: int, results: Results) -> None:
    [one] = results["evaluated", 1]
    for rank in results["evaluated", size]:
        assert torch.equal(rank["bank"], one["bank"])
        assert torch.equal(rank["mapped"], one["bank"])
        assert rank["same map"]
        assert torch.equal(rank["confusion"], one["confusion"])
        assert rank["means"] == one["means"]
        assert rank["retrieval"] == one["retrieval"]
        for kind in ("episodes", "queries"):
            assert rank[kind].keys() == one[kind].keys()
            assert all(torch.equal(rank[kind][name], one[kind][name]) for name in one[kind])


@pytest.mark.parametrize("size", SIZES)
def test_shares_are_a_batch_and_draws_are_a_process_s_own(size: int, results: Results) -> None:
    [one], ranks = results["drawn", 1], results["drawn", size]
    for rank in ranks:
        assert torch.equal(rank["items"], one["items"][rank["rank"] :: size])
    draws = [tuple(step.tolist()) for rank in ranks for step in rank["drawn"]]
    assert len(set(draws)) == 2 * size  # two steps
    assert all(torch.equal(rank["after"], ranks[0]["after"]) for rank in ranks)


@pytest.mark.parametrize("size", SIZES)
def test_an_error_of_one_process_is_raised_by_all(size: int, results: Results) -> None:
    first, *_, last = results["errors", size]
    assert first["together"].startswith(f"process {size - 1}: Traceback")
    assert first["together"].rstrip().endswith("ValueError: the disk of this one is broken")
    assert last["together"] == "the disk of this one is broken"
    for texts in results["errors", size]:
        assert texts["same"] == "expected the same in all processes, got in process 1 another seed (1, not 0); do it"
        assert "embedder.trunk.1.weight" in texts["weights"]
        assert "got in process 1 another batch (support)" in texts["batch"]
        assert texts["alone"] == "1"
        assert "got a lazy embedder.trunk.1.weight" in texts["lazy"]
        assert texts["few"].startswith(f"expected 1 items for each of {size} processes, got a batch of 1")
