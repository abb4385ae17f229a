"""The comparisons with other libraries run from end to end, and their checks refuse figures that disagree."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pml_fewshot import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicResult

pytest.importorskip("easyfsl", reason="easyfsl is not installed: pip install -c constraints.txt -e '.[bench]'")
pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed (the extra bench)")

from experiments.speed import evaluation_speed, maml_step
from experiments.speed.side_by_side import Row, check_accuracy, check_equal

Printed = pytest.CaptureFixture[str]


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
