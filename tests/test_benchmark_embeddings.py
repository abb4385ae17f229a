"""experiments.benchmark_embeddings: a file of embeddings to a table of every head, and one line where it cannot be."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmark_embeddings import main
from pml_fewshot import EmbeddingBank, EpisodeSpec, EpisodicEvaluator, ResultTable, RetrievalTester, UsageError
from pml_fewshot.evaluation.linear_heads import cosine_classifier, ridge_regression

ROOT = Path(__file__).parent.parent
BY_DISTANCE = ["nearest prototype", "soft nearest neighbor", "nearest neighbor", "3 nearest neighbors"]
NAMES = [*BY_DISTANCE, "cosine classifier", "ridge regression", "logistic regression"]


def clouds(seed: int = 0, dims: int = 6) -> dict[str, np.ndarray]:
    """Seven overlapping clouds away from the origin; their centers are the same for every seed."""
    centers = np.random.default_rng(99).normal(size=(7, dims)) + 3
    labels = np.repeat(np.arange(7), 12)
    noise = np.random.default_rng(seed).normal(size=(len(labels), dims))
    return {"embeddings": (centers[labels] + noise).astype(np.float32), "labels": labels}


def written(folder: Path, name: str = "test.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **(arrays or clouds()))
    return folder / name


def table_of(bank: Path, **options: Any) -> ResultTable:
    return main(bank, **({"num_episodes": 40, "queries": 4} | options))


def accuracies(table: ResultTable) -> dict[tuple[str, int | None], float]:
    return {(row.method, row.shots): row.value for row in table.rows if row.ways}


def retrieved(table: ResultTable) -> dict[str, float]:
    return {row.figure: row.value for row in table.rows if not row.ways}


def accuracy(embeddings: np.ndarray, labels: np.ndarray, head: Any = None) -> float:
    bank = EmbeddingBank(torch.from_numpy(embeddings), torch.from_numpy(labels))
    return EpisodicEvaluator(EpisodeSpec(5, 5, 4), 40, head=head).evaluate(bank).mean


def test_every_head_is_a_line_with_the_figures_of_evaluator_and_tester(tmp_path: Path) -> None:
    np.save(tmp_path / "bank.npy", clouds()["embeddings"])
    np.save(tmp_path / "names.npy", np.array(["abcdefg"[label] for label in clouds()["labels"]]))
    table = table_of(tmp_path / "bank.npy", labels=tmp_path / "names.npy", write=tmp_path)
    assert [(name, shots) for name in NAMES for shots in (1, 5)] == list(accuracies(table))
    own = {"nearest prototype": None, "cosine classifier": cosine_classifier, "ridge regression": ridge_regression}
    for name, head in own.items():
        assert accuracies(table)[name, 5] == pytest.approx(accuracy(**clouds(), head=head), abs=1e-12)
    bank = EmbeddingBank(*map(torch.from_numpy, clouds().values()))
    assert retrieved(table) == pytest.approx(dict(RetrievalTester().test(bank)), abs=1e-12)
    assert [row.method for row in table.rows if not row.ways] == [NAMES[0]] * 3
    assert (tmp_path / "results.md").read_text() == str(table)


def test_the_mean_of_the_training_classes_is_subtracted_from_both_sides(tmp_path: Path) -> None:
    path, train = written(tmp_path), written(tmp_path, "train.npz", **clouds(5))
    table = table_of(path, train_bank=train, normalize=True, reference=path, metrics=("precision_at_1",))
    embeddings = clouds()["embeddings"] - clouds(5)["embeddings"].mean(axis=0)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = accuracy(embeddings, clouds()["labels"])
    assert accuracies(table)["nearest prototype", 5] == pytest.approx(expected, abs=2e-3)  # rounding may tip a query
    assert retrieved(table) == {"precision_at_1": 1.0}  # each finds itself in the reference
    assert accuracies(table) != accuracies(table_of(path, normalize=True))
    assert accuracies(table) != accuracies(table_of(path, train_bank=train))


def test_cosine_ranks_and_classifies(tmp_path: Path) -> None:
    table, euclidean = table_of(written(tmp_path), cosine=True), accuracies(table_of(written(tmp_path)))
    embeddings, labels = clouds().values()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T - 9 * np.eye(len(unit))
    assert retrieved(table)["precision_at_1"] == pytest.approx((labels[similarity.argmax(1)] == labels).mean())
    assert accuracies(table)["nearest prototype", 5] != euclidean["nearest prototype", 5]
    assert accuracies(table)["ridge regression", 5] == euclidean["ridge regression", 5]


def test_sizes_metrics_index_and_seed_are_those_asked_for(tmp_path: Path) -> None:
    options = {"ways": (2, 7), "shots": (1, 3), "seed": 5, "metrics": ("recall_at_2",), "index": "hnsw"}
    table = table_of(written(tmp_path), **options)
    sizes = [(row.ways, row.shots, row.queries, row.seed, row.count) for row in table.rows if row.ways]
    assert sizes[:4] == [(2, 1, 4, 5, 40), (2, 3, 4, 5, 40), (7, 1, 4, 5, 40), (7, 3, 4, 5, 40)]
    assert list(retrieved(table)) == ["recall_at_2"]
    assert all(row.ranking.startswith("HNSW32") for row in table.rows if not row.ways)
    assert "2 nearest neighbors" in {row.method for row in table.rows}  # an episode may have no more support items


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ways": (8,)}, "at least 8 classes"), ({"write": Path("nowhere")}, "an existing folder to write to")],
)
def test_bad_input_is_a_users_mistake(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^expected {message}"):
        table_of(written(tmp_path), **options)


@pytest.mark.slow
def test_the_command_prints_the_table_or_one_line(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "experiments.benchmark_embeddings", "--bank", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)

    done = command(str(written(tmp_path)), "--num-episodes", "200", "--queries", "4", "--shots", "1", "3", "--cosine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| method | 5-way 1-shot | 5-way 3-shot | P@1 |")
    done = command(str(tmp_path / "nowhere.npz"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected a file of embeddings or labels at ")
