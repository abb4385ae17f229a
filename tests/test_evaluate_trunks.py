"""experiments.evaluate_trunks: a line a trunk with the figures of evaluator and tester; a trunk that fails says why."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.preprocessing import normalize

from experiments.evaluate_trunks import Transform, main, sizes, transformed
from pml_fewshot import (
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    ImageEmbedder,
    ResultTable,
    RetrievalTester,
    TimmTrunk,
    TorchvisionTrunk,
    UsageError,
    compare,
)
from pml_fewshot.data.images import BrokenImageError

ROOT = Path(__file__).parent.parent
NAME = "shufflenet_v2_x0_5"  # 0.3 million weights without its classifier
FIRST, SECOND = f"torchvision/{NAME}=1.pth", f"torchvision/{NAME}=2.pth"
COUNTS = {"ant": 6, "bee": 7, "cat": 5, "dog": 1}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: classes of a few small photos, each of its own color, and files of random weights."""
    place, draw = tmp_path_factory.mktemp("trunks"), np.random.default_rng(0)
    for number, (name, photos) in enumerate(COUNTS.items()):
        (place / "photos" / name).mkdir(parents=True)
        for photo in range(photos):
            pixels = draw.integers(0, 200, (4, 4, 3)) + np.array([15 * number, 45 - 15 * number, 0])
            Image.fromarray(pixels.astype(np.uint8)).resize((24, 20)).save(place / "photos" / name / f"{photo}.png")
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(TorchvisionTrunk(NAME).model.state_dict(), place / f"{seed}.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


def ranked(*trunks: str, **options: Any) -> ResultTable:
    return main(Path("photos"), trunks, **({"num_episodes": 40} | options))


def by_hand(trunk: Any) -> EmbeddingBank:
    files = [f"photos/{name}/{photo}.png" for name, count in COUNTS.items() if count > 1 for photo in range(count)]
    return EmbeddingBank(ImageEmbedder(trunk).transform(files), [file.split("/")[1] for file in files])


def test_a_lines_figures_are_those_of_evaluator_and_tester(capsys: Any, tmp_path: Path) -> None:
    table = ranked(FIRST, SECOND, "torchvision/shuflenet_v2_x0_5", write=tmp_path / "table.csv")
    specs = EpisodeSpec(3, 4, 1), EpisodeSpec(3, 1, 1)  # of 5 ways, 5 shots, 15 queries what 3 classes, 5 photos give
    banks = {name: by_hand(TorchvisionTrunk(NAME, checkpoint=name.partition("=")[2])) for name in (FIRST, SECOND)}
    results = {name: [EpisodicEvaluator(spec, 40).evaluate(bank) for spec in specs] for name, bank in banks.items()}
    first, second = sorted(banks, key=lambda name: -results[name][0].mean)
    assert [row.method for row in table.rows] == [first] * 4 + [second] * 4
    tester = RetrievalTester(("precision_at_1", "mean_average_precision_at_r"))
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for name, line in zip((first, second), lines, strict=False):
        rows = [row for row in table.rows if row.method == name]
        assert [(row.value, row.ci95) for row in rows[:2]] == [(each.mean, each.ci95) for each in results[name]]
        assert {row.figure: row.value for row in rows[2:]} == dict(tester.test(banks[name]))
        assert all(row.note == "1 of 4 classes with fewer than 2 photos left out" for row in rows)
        for spec, own, best in zip(specs, results[name], results[first], strict=True):
            column, paired = f"3way_{spec.shots}shot_1query", compare(own, best)
            got = [float(line[f"{column}{part}"]) for part in ("", "_minus_first", "_minus_first_ci95")]
            assert got == [own.mean, paired.difference, paired.ci95]
        weights = sum(weight.numel() for weight in TorchvisionTrunk(NAME).parameters())
        assert (line["weights"], line["dims"]) == (str(weights), "1024")
        assert float(line["images_per_second"]) > 0
    reason = "expected a model of torchvision as one of "
    assert reason in table.failures["torchvision/shuflenet_v2_x0_5"]
    assert reason in lines[2]["note"]
    text = capsys.readouterr().out.splitlines()
    assert text[0].endswith(
        "| 3-way 4-shot | 3-way 1-shot | P@1 | MAP@R | 3-way 4-shot minus first | 3-way 1-shot minus first | images/s "
        "| M weights | D |"
    )
    assert len({line.count(" | ") for line in text if line.startswith("|")}) == 1
    difference = compare(*(results[name][0] for name in (second, first)))
    assert f"| {100 * difference.difference:+.2f} +- {100 * difference.ci95:.2f} |" in text[3]
    assert "failed: expected a model" in text[4]


def test_a_trunk_of_timm_and_transformed_lines() -> None:
    pytest.importorskip("timm")
    torch.save(TimmTrunk("test_resnet").model.state_dict(), "timm.pth")
    kinds: tuple[Transform, ...] = ("unit", "centered")
    table = ranked("timm/test_resnet=timm.pth", transform=kinds, shots=(2,), ways=2, queries=2, seed=3)
    bank, spec = by_hand(TimmTrunk("test_resnet", checkpoint="timm.pth")), EpisodeSpec(2, 2, 2)
    banks = {"": bank, ", unit": transformed(bank, "unit"), ", centered": transformed(bank, "centered")}
    expected = {
        f"timm/test_resnet=timm.pth{name}": EpisodicEvaluator(spec, 40, seed=3).evaluate(each).mean
        for name, each in banks.items()
    }
    assert {row.method: row.value for row in table.rows if row.ways} == expected
    protocols = {row.method.rpartition(", ")[2]: (row.protocol, row.note) for row in table.rows if row.ways}
    assert protocols["unit"][0] == "inductive"
    assert protocols["centered"][0] == "transductive"  # its mean is of the queries too
    assert protocols["centered"][1].startswith("minus the mean of all 18 photos without their labels, length 1")


def test_transformed_rows_are_those_of_their_definitions() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 8)) * np.arange(1, 9) + 4
    bank = EmbeddingBank(rows, np.repeat(np.arange(3), 10))
    got = {kind: transformed(bank, kind, 5).embeddings.numpy() for kind in ("unit", "centered", "power")}
    centered = rows - rows.mean(axis=0)
    assert np.allclose(got["unit"], normalize(rows))
    assert np.allclose(got["centered"], normalize(centered))
    assert np.allclose(got["power"], normalize(np.sign(rows) * np.abs(rows) ** 0.5))
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    components = centered @ vectors[:, ::-1][:, :5]
    for kind, expected in (("pca", components), ("whitened", components / np.sqrt(values[::-1][:5]))):
        own = transformed(bank, kind, 5)  # type: ignore[arg-type]
        cosines = normalize(expected)
        assert np.allclose(own.embeddings @ own.embeddings.T, cosines @ cosines.T, atol=1e-5)  # (up to signs)
        assert own.note.startswith("5 ")
        assert transformed(bank, kind, 64).embeddings.shape == (30, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "least", "specs"),
    [
        ((30, 40, 50, 60, 70, 80), 2, [EpisodeSpec(5, 5, 15), EpisodeSpec(5, 1, 15)]),
        ((8, 30, 40), 2, [EpisodeSpec(3, 5, 3), EpisodeSpec(3, 1, 3)]),
        ((8, 30, 40), 9, [EpisodeSpec(2, 5, 15), EpisodeSpec(2, 1, 15)]),
        ((2, 2, 1), 2, [EpisodeSpec(2, 1, 1)]),
    ],
)
def test_episodes_are_as_large_as_the_smallest_class_allows(
    counts: tuple[int, ...], least: int, specs: list[EpisodeSpec]
) -> None:
    labels = np.repeat([f"class {number}" for number in range(len(counts))], counts)
    items, found, note = sizes(labels, least, EpisodeSpec(5, 1, 15), (5, 1))
    assert found == specs
    assert sorted(labels[items].tolist()) == [name for name in labels if (labels == name).sum() >= least]
    assert bool(note) == (min(counts) < least)


def test_bad_input_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^expected two classes or more with at least 7 photos each, got 1 of 4"):
        ranked(FIRST, least=7)
    with pytest.raises(UsageError, match=r"^expected a trunk that can be used, got none; resnet: expected .*; none/x:"):
        ranked("resnet", "none/x")
    with pytest.raises(UsageError, match=r"^expected dims to be an integer of at least 1, got 0"):
        ranked(FIRST, dims=0)
    with pytest.raises(UsageError, match=r"^expected an existing folder for "):
        ranked(FIRST, write=tmp_path / "nowhere" / "table.csv")
    for name in ("ant", "bee"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for photo in range(2):
            (tmp_path / "broken" / name / f"{photo}.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=r"0\.png"):  # not a failure of each trunk
        main(tmp_path / "broken", (FIRST, SECOND))


@pytest.mark.slow
def test_the_command_prints_the_table_or_one_line(folder: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "experiments.evaluate_trunks", "--photos", str(folder / "photos"), *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)

    trunk = f"torchvision/{NAME}={folder / '1.pth'}"
    done = command("--trunk", trunk, "nowhere", "--transform", "pca", "--csv", str(folder / "table.csv"))
    assert done.returncode == 0, done.stderr
    assert f"| {trunk}, pca (transductive) |" in done.stdout
    assert (folder / "table.csv").is_file()
    done = command("--trunk", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected a trunk that can be used, got none; nowhere: expected a trunk as ")
