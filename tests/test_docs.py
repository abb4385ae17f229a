"""The Python blocks of README and docs run, in order, one namespace a page, and their commands name what exists."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

import experiments.quickstart
from tests.tiny_experiments import few_glyphs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# (code, what it prints where the page shows that)
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
BLOCKS = {page: BLOCK.findall(page.read_text()) for page in PAGES}


def write_data(root: Path) -> None:
    """What the pages find in the working folder: eight classes of ten photos, each of its own color."""
    classes, rows = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"], ["path,label,split"]
    for label, name in enumerate(classes):
        for number in range(10):
            pixels = np.random.default_rng(10 * label + number).integers(0, 150, (100, 90, 3), dtype=np.uint8)
            image = Image.fromarray(pixels + np.array([15 * label, 105 - 15 * label, 50 * (label % 2)], np.uint8))
            split = "train" if label < 4 else "val" if label < 6 else "test"
            for folder in (
                "photos",
                f"train_and_val/{'train' if label < 4 else 'val'}",
                f"seen/{'test' if number > 3 else 'train'}",
            ):
                (root / folder / name).mkdir(parents=True, exist_ok=True)
                image.save(root / folder / name / f"{number}.png")
            rows.append(f"photos/{name}/{number}.png,{name},{split}")
    (root / "photos.csv").write_text("\n".join(rows))
    features = np.random.default_rng(0).normal(size=(80, 16)) + np.repeat(np.arange(8), 10)[:, None]
    frame = pandas.DataFrame(features).add_prefix("feature").assign(label=np.repeat(classes, 10))
    frame.to_parquet(root / "features.parquet")


def without_figures(text: str) -> str:
    """Figures differ in their last digits from processor to processor."""
    return " ".join(re.sub(r"-?\d+\.\d+", "#", text).split())


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("PYTHONPATH", "PML_FEWSHOT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    quick = {"steps": 2, "num_episodes": 20, "val_episodes": 20, "data": few_glyphs}
    for name, value in quick.items():
        monkeypatch.setitem(vars(experiments.quickstart.CONFIG), name, value)
    write_data(tmp_path)
    namespace: dict[str, Any] = {}
    for code, output in BLOCKS[page]:
        capsys.readouterr()
        exec(code.replace("num_episodes=100)", "num_episodes=2)"), namespace)  # noqa: S102
        assert not output or without_figures(capsys.readouterr().out) == without_figures(output)
    for variant in ("cosine", "mined", "on_batches", "variant"):
        if variant in namespace:  # a whole trainer, with the part that the page swaps
            trainer = namespace[variant].trainer()
            assert trainer.loss is not None
    if page.name == "README.md":
        assert {row.figure for row in namespace["table"].rows} >= {"accuracy", "precision_at_1"}


def test_pages_are_short_and_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_and_tests_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m ((?:experiments|pml_fewshot)[.\w]+)", text):
            assert (ROOT / f"{module.rstrip('.').replace('.', '/')}.py").exists() or module.endswith("..."), module
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, target
        for path in re.findall(r"`((?:tests|experiments|pml_fewshot)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
