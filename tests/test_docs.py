"""The Python blocks of README and docs run, in order, one namespace a page, and their commands name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import experiments.quickstart

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PML_FEWSHOT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    quick = {"steps": 2, "num_episodes": 20, "val_episodes": 20}
    for name, value in quick.items():
        monkeypatch.setitem(vars(experiments.quickstart.CONFIG), name, value)
    for number in range(5):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (90, 100), (40 * number, 0, 0)).save(folder / "one.png")
    namespace: dict[str, Any] = {}
    exec("\n".join(BLOCKS[page]).replace("num_episodes=100)", "num_episodes=2)"), namespace)  # noqa: S102
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
