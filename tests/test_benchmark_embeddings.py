"""experiments.benchmark_embeddings: a file of embeddings to a table of every head, and one line where it cannot be."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmark_embeddings import main
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.linear_heads import cosine_classifier, ridge_regression
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.table import ResultTable

ROOT = Path(__file__).parent.parent
CLASSES, ITEMS, DIMS = 7, 12, 6
NAMES = [
    "nearest prototype",
    "soft nearest neighbour",
    "best pair",
    "3 nearest neighbours",
    "cosine classifier",
    "ridge regression",
    "logistic regression",
]


def clouds(seed: int = 0, dims: int = DIMS) -> dict[str, np.ndarray]:
    """Overlapping clouds away from the origin; their centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, dims)) + 3
    labels = np.repeat(np.arange(CLASSES), ITEMS)
    noise = np.random.default_rng(seed).normal(size=(len(labels), dims))
    return {"embeddings": (centres[labels] + noise).astype(np.float32), "labels": labels}


def written(folder: Path, name: str = "test.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **(arrays or clouds()))
    return folder / name


def judge(bank: Path, **options: Any) -> ResultTable:
    return main(bank, **({"num_episodes": 40, "queries": 4} | options))


def accuracies(table: ResultTable) -> dict[tuple[str, int | None], float]:
    return {(row.method, row.shots): row.value for row in table.rows if row.ways}


def retrieved(table: ResultTable) -> dict[str, float]:
    return {row.figure: row.value for row in table.rows if not row.ways}


def directly(bank: EmbeddingBank, head: Any = None) -> float:
    return EpisodicEvaluator(EpisodeSpec(5, 5, 4), 40, head=head).evaluate(bank).mean


def as_bank(embeddings: np.ndarray, labels: np.ndarray) -> EmbeddingBank:
    return EmbeddingBank(torch.from_numpy(embeddings), torch.from_numpy(labels))


# --- what is judged ---------------------------------------------------------------------------------------------------


def test_every_head_is_a_line_and_retrieval_is_in_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path)
    table = judge(path)
    assert list(dict.fromkeys(row.method for row in table.rows)) == NAMES
    assert [(name, shots) for name in NAMES for shots in (1, 5)] == list(accuracies(table))
    retrieval_rows = [row for row in table.rows if not row.ways]
    assert [row.method for row in retrieval_rows] == [NAMES[0]] * 3
    assert {row.note for row in table.rows} == {str(path)}
    for shots in (1, 5):  # one list of episodes for all
        assert len({row.episodes_hash for row in table.rows if row.shots == shots}) == 1
    assert capsys.readouterr().out == f"{table}\n"


def test_figures_are_those_of_evaluator_and_tester(tmp_path: Path):
    table = judge(written(tmp_path))
    bank = as_bank(**clouds())
    own = {"nearest prototype": None, "cosine classifier": cosine_classifier, "ridge regression": ridge_regression}
    for name, head in own.items():
        assert accuracies(table)[name, 5] == pytest.approx(directly(bank, head), abs=1e-12)
    expected = RetrievalTester().test(bank)
    assert retrieved(table) == pytest.approx(dict(expected), abs=1e-12)
    assert 0.4 < retrieved(table)["precision_at_1"] < 0.98


def test_the_mean_of_the_training_classes_is_taken_off(tmp_path: Path):
    path, train = written(tmp_path), written(tmp_path, "train.npz", **clouds(5))
    table = judge(path, train_bank=train, normalize=True)
    embeddings = clouds()["embeddings"] - clouds(5)["embeddings"].mean(axis=0)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = directly(as_bank(embeddings, clouds()["labels"]))
    assert accuracies(table)["nearest prototype", 5] == pytest.approx(expected, abs=2e-3)  # rounding may tip a query
    assert accuracies(table) != accuracies(judge(path, normalize=True))
    assert accuracies(table) != accuracies(judge(path, train_bank=train))


def test_cosine_ranks_and_classifies(tmp_path: Path):
    table = judge(written(tmp_path), cosine=True)
    embeddings = clouds()["embeddings"]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T - 9 * np.eye(len(unit))
    labels = clouds()["labels"]
    assert retrieved(table)["precision_at_1"] == pytest.approx((labels[similarity.argmax(1)] == labels).mean())
    assert "CosineSimilarity" in next(row.ranking for row in table.rows if row.ranking)
    euclid = accuracies(judge(written(tmp_path)))
    for name in ("nearest prototype", "best pair"):
        assert accuracies(table)[name, 5] != euclid[name, 5]
    assert accuracies(table)["ridge regression", 5] == euclid["ridge regression", 5]


def test_a_reference_is_what_retrieval_searches(tmp_path: Path):
    table = judge(written(tmp_path), reference=written(tmp_path, "gallery.npz", **clouds(7)))
    assert {row.protocol for row in table.rows if not row.ways} == {"gallery"}
    difference = clouds()["embeddings"][:, None] - clouds(7)["embeddings"][None]
    nearest = (difference.astype(float) ** 2).sum(axis=2).argmin(axis=1)
    right = clouds(7)["labels"][nearest] == clouds()["labels"]
    assert retrieved(table)["precision_at_1"] == pytest.approx(right.mean())


def test_centring_and_scaling_reach_the_reference_too(tmp_path: Path):
    path, train = written(tmp_path), written(tmp_path, "train.npz", **clouds(5))
    table = judge(path, reference=path, train_bank=train, normalize=True, metrics=("precision_at_1",))
    assert retrieved(table) == {"precision_at_1": 1.0}  # each finds itself, as it would not if one side were moved


def test_an_approximate_index_says_so(tmp_path: Path):
    table = judge(written(tmp_path), index="hnsw")
    (ranking,) = {row.ranking for row in table.rows if row.ranking}
    assert ranking.startswith("HNSW32")
    assert "of exact search on 84 queries" in ranking
    assert retrieved(table) == pytest.approx(retrieved(judge(written(tmp_path))), abs=0.05)


def test_sizes_metrics_and_seed_are_those_asked_for(tmp_path: Path):
    path = written(tmp_path)
    table = judge(path, ways=(2, 7), shots=(2, 3), seed=5, metrics=("recall_at_2", "NMI"))
    sizes = [(row.ways, row.shots, row.queries, row.seed, row.count) for row in table.rows if row.ways]
    assert sizes[:4] == [(2, 2, 4, 5, 40), (2, 3, 4, 5, 40), (7, 2, 4, 5, 40), (7, 3, 4, 5, 40)]
    assert list(retrieved(table)) == ["recall_at_2", "NMI"]


def test_two_ways_of_one_shot_can_be_judged(tmp_path: Path):
    """There are not three neighbours then; the user has not asked for three."""
    table = judge(written(tmp_path), ways=(2,), shots=(1,))
    names = [row.method for row in table.rows if row.ways]
    assert (len(names), names[0]) == (len(NAMES), NAMES[0])


def test_labels_may_lie_in_a_file_of_their_own(tmp_path: Path):
    np.save(tmp_path / "bank.npy", clouds()["embeddings"])
    np.save(tmp_path / "names.npy", np.array(["abcdefg"[label] for label in clouds()["labels"]]))
    table = judge(tmp_path / "bank.npy", labels=tmp_path / "names.npy")
    assert retrieved(table) == retrieved(judge(written(tmp_path)))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_judged(dtype: str, tmp_path: Path):
    path = written(tmp_path, embeddings=clouds()["embeddings"].astype(dtype), labels=clouds()["labels"])
    table = judge(path, train_bank=path, normalize=True)
    single = judge(written(tmp_path, "single.npz"), train_bank=written(tmp_path, "single.npz"), normalize=True)
    for key, value in accuracies(single).items():
        assert accuracies(table)[key] == pytest.approx(value, abs=0.02), key


def test_files_are_written(tmp_path: Path):
    folder = tmp_path / "results"
    folder.mkdir()
    table = judge(written(tmp_path), write=folder)
    assert {path.name for path in folder.iterdir()} == {"results.csv", "results.md", "results.tex", "figures.csv"}
    assert (folder / "results.md").read_text() == table.markdown()
    assert (folder / "results.csv").read_text() == table.csv()


# --- what cannot be judged --------------------------------------------------------------------------------------------


def with_nan() -> dict[str, np.ndarray]:
    arrays = clouds()
    arrays["embeddings"][5, 2] = np.nan
    return arrays


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank": with_nan()}, "finite embeddings, got NaN or infinity in 1 of 84 rows, first in row 5"),
        ({"ways": (8,)}, "at least 8 classes"),
        ({"queries": 15}, "at least 16 items"),
        ({"shots": (0,)}, "shots to be an integer of at least 1"),
        ({"num_episodes": 1}, "num_episodes above 1"),
        ({"reference": clouds(dims=DIMS + 1)}, f"references of {DIMS} dimensions"),
        ({"train_bank": clouds(dims=DIMS + 1)}, rf"a mean of shape ({DIMS},)"),
        ({"metrics": ("recall_at_84",)}, "k of at most 83, the gallery's size"),
        ({"metrics": ("precision_at_2",)}, "metric as one of"),
        ({"metrics": ()}, "at least one metric"),
        ({"index": "hnws"}, "index as one of"),
        ({"bank": {"a": np.ones((3, 2)), "b": np.ones((3, 2))}}, "one array of embeddings"),
        ({"bank": clouds() | {"labels": np.zeros(84)}}, "labels as integers or texts"),
        ({"bank": "nowhere.npz"}, "a file of embeddings or labels at "),
        ({"bank": "nowhere.csv"}, "the file's ending as one of"),
        ({"labels": "nowhere.npz"}, "a file of embeddings or labels at "),
        ({"reference": "nowhere.npz"}, "a file of embeddings or labels at "),
        ({"train_bank": "nowhere.npz"}, "a file of embeddings or labels at "),
        ({"write": "nowhere"}, "an existing folder to write to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line(options: dict[str, Any], message: str, tmp_path: Path, capsys: Any):
    given = {"bank": clouds()} | options
    for name, value in given.items():
        if isinstance(value, dict):
            given[name] = written(tmp_path, f"{name}.npz", **value)
        elif isinstance(value, str) and name != "index":
            given[name] = tmp_path / value
    with pytest.raises(SystemExit) as stopped:
        judge(**given)
    text = str(stopped.value.code)
    assert text.startswith(f"error: expected {message}")
    assert "\n" not in text
    assert capsys.readouterr().out == ""


def test_a_missing_folder_is_found_before_anything_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any) -> None:
        raise AssertionError("it was read first")

    monkeypatch.setattr("experiments.benchmark_embeddings.load_bank", never)
    with pytest.raises(SystemExit, match="an existing folder"):
        judge(tmp_path / "test.npz", write=tmp_path / "nowhere")


def test_errors_of_others_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr("experiments.benchmark_embeddings.load_bank", broken)
    with pytest.raises(ValueError, match="something else"):
        judge(tmp_path / "test.npz")


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "experiments.benchmark_embeddings", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_prints_the_table(tmp_path: Path):
    arguments = ["--num-episodes", "200", "--queries", "4", "--shots", "1", "3", "--cosine"]
    done = command("--bank", str(written(tmp_path)), *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| method | 5-way 1-shot | 5-way 3-shot | P@1 |")
    assert [line.split(" | ")[0] for line in lines[2:9]] == [f"| {name}" for name in NAMES]


def test_the_command_ends_in_one_line_where_the_file_is_missing(tmp_path: Path):
    done = command("--bank", str(tmp_path / "nowhere.npz"))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected a file of embeddings or labels at ")
