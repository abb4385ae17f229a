"""The Python blocks of README and docs run, in order, one namespace a page; commands, options and links exist."""

import csv
import functools
import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import experiments.quickstart
import pml_fewshot
from pml_fewshot import __main__ as commands
from pml_fewshot.report import page as report_page
from pml_fewshot.report import subject as report_subject
from tests.tiny_experiments import few_glyphs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# (code, what it prints where the page shows that)
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {page: BLOCK.findall(text) for page, text in TEXTS.items()}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
FEWER = {"num_episodes=100)": "num_episodes=2)", "steps=200,": "steps=2, num_episodes=20, val_episodes=20,"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PACKAGES = {
    "export.md": ("onnx", "onnxruntime", "onnxscript"),
    "serve.md": ("starlette", "httpx", "python_multipart"),
}  # of extras, which a page's code needs


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
    (root / "new").mkdir()
    for number in (1, 2):  # of none of the classes
        Image.new("RGB", (100, 90), (250, 5 * number, 250)).save(root / "new" / f"{number}.png")
    features = np.random.default_rng(0).normal(size=(80, 16)) + np.repeat(np.arange(8), 10)[:, None]
    frame = pandas.DataFrame(features).add_prefix("feature").assign(label=np.repeat(classes, 10))
    frame.to_parquet(root / "features.parquet")


def without_figures(text: str) -> str:
    """Figures differ in their last digits from processor to processor."""
    return " ".join(re.sub(r"-?\d+\.\d+", "#", text).split())


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("PYTHONPATH", "PML_FEWSHOT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_page, "DPI", 40)  # fewer pixels and episodes, which takes less time
    monkeypatch.setattr(report_subject, "MOST", 40)
    quick = {"steps": 2, "num_episodes": 20, "val_episodes": 20, "data": few_glyphs, "report": False}
    for name, value in quick.items():
        monkeypatch.setitem(vars(experiments.quickstart.CONFIG), name, value)
    if page.name == "README.md":  # it trains on all of them
        monkeypatch.setattr(pml_fewshot, "load_glyphs", few_glyphs)
    if page.name in PACKAGES:
        for package in PACKAGES[page.name]:
            pytest.importorskip(package)
    write_data(tmp_path)
    torch.manual_seed(0)  # the trunk of README has random weights
    namespace: dict[str, Any] = {}
    for code, output in BLOCKS[page]:
        capsys.readouterr()
        for full, few in FEWER.items():
            code = code.replace(full, few)
        exec(code, namespace)  # noqa: S102
        assert not output or without_figures(capsys.readouterr().out) == without_figures(output)
    for variant in ("cosine", "mined", "on_batches", "variant"):
        if variant in namespace:  # a whole trainer, with the part that the page swaps
            trainer = namespace[variant].trainer()
            assert trainer.loss is not None


def headings(text: str) -> set[str]:
    """The anchors that a forge and MyST give a page's headings."""
    titles = re.findall(r"^#{1,3} (.*)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def test_readme_is_short_and_shows_its_picture_first() -> None:
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.encode()) <= 10_240
    assert re.search(r"<img|!\[", readme[:1500])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_and_pictures_have_alternative_text(page: Path) -> None:
    text = FENCE.sub("", TEXTS[page])
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        place, _, anchor = target.partition("#")
        if place.startswith("https://"):
            continue
        other = page.parent / place if place else page
        assert other.exists(), target
        assert not anchor or anchor in headings(TEXTS[other.resolve()]), target
    for alternative in re.findall(r"!\[([^]]*)\]", text) + re.findall(r"<img [^>]*alt=\"([^\"]*)\"", text):
        assert len(alternative.split()) >= 5, alternative
    assert len(re.findall(r"<img ", text)) == len(re.findall(r"<img [^>]*alt=", text))


def shown_commands(text: str) -> list[str]:
    """Lines of a page's command blocks, without comments; a loop's body, and what is put behind a variable, as well."""
    blocks = [body for _, language, body in FENCE.findall(text) if language in ("sh", "bash", "console")]
    blocks += re.findall(r"(?:\A|\n)\n((?:    .*\n)+)", FENCE.sub("", text))
    blocks += re.findall(r"`((?:pml-fewshot|make) [a-z][^`\n]*)`", FENCE.sub("", text))
    lines = [re.sub(r"\s#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in re.split(r"&&|;|\bdo\b", line) if part.strip()]


COMMANDS = sorted({(name_of(page), line) for page, text in TEXTS.items() for line in shown_commands(text)})
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:python3?(?:\.\d+)?) -m ((?:experiments|pml_fewshot)\S*)(.*)")


@functools.cache
def help_of(module: str, *arguments: str) -> str:
    """What `python -m module .. --help` prints."""
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments, "--help"])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys.stdout, "write", printed.append)
        # or runpy warns of what another test has imported; of a package it runs __main__
        spec = importlib.util.find_spec(module)
        own = f"{module}.__main__" if spec and spec.submodule_search_locations else module
        for name in (own, *(f"{commands.package()}.{name}" for name in ("quickstart", "benchmark_embeddings"))):
            patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert stop.value.code in (0, None), printed
    return "".join(printed)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=str)
def test_a_command_of_a_page_exists_with_its_options(page: str, line: str) -> None:
    line = re.sub(r"^(?:\S*/)?pml-fewshot\b", "python -m pml_fewshot", line)
    words = shlex.split(line)
    if program := PROGRAM.fullmatch(line):
        module, rest = program[1], shlex.split(program[2])
        command = [rest.pop(0)] if module == "pml_fewshot" and rest else []
        if module.endswith("...") or module == "experiments.NAME":
            return
        text = help_of("pml_fewshot.__main__" if module == "pml_fewshot" else module, *command)
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert re.search(rf"(?<!\S){re.escape(option)}(?![\w.-])", text), f"{option} of {line}"
    elif words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets, line
    elif words[0].endswith("python") and words[1].endswith(".py") and "/" in words[1]:
        assert (ROOT / words[1]).exists(), line
    for extras in re.findall(r"(?:pml_fewshot|\.)\[([\w,]+)\]", line):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras.split(",")) <= known.keys(), line


def test_files_that_pages_name_exist() -> None:
    for page, text in TEXTS.items():
        for path in re.findall(r"`((?:tests|experiments|pml_fewshot|docs)/[\w/.-]+)`", text):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"
        for module in re.findall(r"`(?:python -m )?((?:experiments|pml_fewshot)(?:\.\w+)+)", text):
            place = ROOT / module.replace(".", "/")  # of a module, of a name in it, or of an attribute of that
            files = [place, *(each.with_suffix(".py") for each in (place, place.parent, place.parent.parent))]
            assert any(file.exists() for file in files), f"{name_of(page)}: {module}"


def test_pictures_have_both_themes_and_the_numbers_of_the_results() -> None:
    made = json.loads((ROOT / "docs/pictures/figures.json").read_text())
    for name in set(re.findall(r"pictures/([\w-]+)-(?:light|dark)\.png", "".join(TEXTS.values()))):
        assert name in made
        assert all((ROOT / f"docs/pictures/{name}-{theme}.png").exists() for theme in ("light", "dark"))
    with (ROOT / "docs/results/evaluation_speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(any(bar.items() <= row.items() for row in rows) for bar in made["speed"]["bars"])
    with (ROOT / "docs/results/glyphs.csv").open(newline="") as file:
        accuracy = f"{100 * made['demo']['accuracy']:.2f} +- {100 * made['demo']['ci95']:.2f}"
        assert accuracy in next(csv.DictReader(file)).values()


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pml_fewshot.__version__
    assert f"\nversion: {pml_fewshot.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^\.\. auto\w+:: pml_fewshot\.(\w+)$", TEXTS[ROOT / "docs/reference/api.md"], re.MULTILINE)
    assert sorted(listed) == sorted(pml_fewshot.__all__)
