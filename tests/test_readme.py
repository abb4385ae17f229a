"""The README's Python blocks run, in order and in one namespace, and its commands name what exists."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pml_fewshot import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PML_FEWSHOT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (90, 100), (40 * number, 0, 0)).save(folder / "one.png")
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    code = "\n".join(blocks)
    assert "steps=300" in code
    namespace: dict[str, Any] = {}
    exec(code.replace("steps=300", "steps=2, num_episodes=20"), namespace)
    assert {row.figure for row in namespace["table"].rows} >= {"accuracy", "precision_at_1"}
    assert len(namespace["splits"].train) + len(namespace["splits"].val) + len(namespace["splits"].test) == 5
    # the derived variants are whole trainers, with the part swapped that they name
    for variant, part, expected in (
        ("other_distance", "loss", "PrototypicalLoss"),
        ("other_loss", "loss", "NTXentLoss"),
        ("with_miner", "miner", "MultiSimilarityMiner"),
    ):
        torch.manual_seed(0)
        trainer = namespace[variant]()
        assert type(getattr(trainer, part)).__name__ == expected
    changed = replace(namespace["on_batches"], steps=2, num_episodes=20, val_episodes=20, retrieval=None)
    assert {row.figure for row in run(changed).rows} == {"accuracy"}


def test_commands_name_what_exists() -> None:
    modules = re.findall(r"python -m (experiments[.\w]+)", README)
    assert modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^    |`)make ([\w-]+)", README, re.MULTILINE):
        assert target in targets, target


def test_nothing_is_left_to_be_filled_in() -> None:
    for place in [ROOT / "README.md", *(ROOT / "experiments").glob("*.py")]:
        assert "to be filled in" not in place.read_text(), place
        assert not re.search(r"\b[A-Z]+_TABLE\b", place.read_text()), place
