"""Draws the pictures of the README and pages, light and dark, from the repository's runs: `make pictures`.

    python docs/pictures.py
    python docs/pictures.py --only demo speed --runs runs/pictures

The first call trains the quickstart and MAML on the built-in letters (1 and 6 minutes on two quiet cores) and evaluates
them; both stay in the folder of runs, and later calls only draw. The numbers that the pictures show are written next to
them, to figures.json. Seeds are 0 throughout.
"""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parent.parent))  # for the experiments

import matplotlib.pyplot as plt
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import glyphs_maml, quickstart
from pml_fewshot import (
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    FewShotDataset,
    ResultTable,
    adaptation_curve,
    load_glyphs,
    load_trained,
    plot_accuracy_grid,
    plot_adaptation,
    plot_bars,
    plot_embedding_map,
    run,
)
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.report.theme import THEMES, theme

DOCS = Path(__file__).parent
SPEED = DOCS / "results" / "evaluation_speed.csv"
SPEC = EpisodeSpec(ways=5, shots=1, queries=15)
GRID = [EpisodeSpec(ways, shots, queries=10) for ways in (5, 10, 20, 50, 100) for shots in (1, 2, 5, 10)]
INNER_STEPS = 5
PERPLEXITY = 200
ALPHABET = "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA LAMDA MU "
ALPHABET += "NU XI OMICRON PI RHO SIGMA TAU UPSILON PHI CHI PSI OMEGA"
COMMAND = "OMP_NUM_THREADS=2 python -m experiments.quickstart"
PROTONET = "ProtoNet trained on Latin and Cyrillic letters (experiments.quickstart, seed 0)"
PER_SECOND, OURS = " episodes/s", "pml_fewshot"
DPI = 100
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


class Runs:
    """The trainings behind the pictures, and the measurements on them; each is made once and then kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.test: FewShotDataset = load_glyphs().test
        self.measured_in = folder / "measured.json"

    def quickstart(self) -> tuple[ResultTable, Any]:
        torch.set_num_threads(2)  # as for the README's table: the last digits of a training depend on it
        folder = self.folder / "quickstart"
        return run(replace(quickstart.CONFIG, run_dir=folder), resume=True), load_trained(folder, quickstart.CONFIG)

    def maml(self) -> Any:
        torch.set_num_threads(1)
        folder = self.folder / "glyphs_maml"
        config = replace(glyphs_maml.CONFIG, run_dir=folder, num_episodes=200)
        run(config, resume=True)
        return load_trained(folder, config)

    def known(self) -> dict[str, Any]:
        return json.loads(self.measured_in.read_text()) if self.measured_in.exists() else {}

    def forget(self, names: list[str]) -> None:
        kept = {name: value for name, value in self.known().items() if name not in names}
        self.measured_in.parent.mkdir(parents=True, exist_ok=True)
        self.measured_in.write_text(json.dumps(kept, indent=1))

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the result of `measure`, or of an earlier call."""
        if not self.known().get(name):
            value = measure()
            self.measured_in.write_text(json.dumps(self.known() | {name: value}, indent=1))
        return self.known()[name]

    def results(self, name: str, evaluate: Callable[[], list[EpisodicResult]]) -> list[EpisodicResult]:
        """Returns the means and intervals of results, which are evaluated in the first call."""

        def measure() -> list[dict[str, Any]]:
            kept = ("mean", "ci95", "seed", "episodes_hash")
            return [
                {
                    **{name: getattr(each, name) for name in kept},
                    "spec": asdict(each.spec),
                    "count": len(each.per_episode),
                }
                for each in evaluate()
            ]

        results = []
        for each in self.measured(name, measure):
            spec, per_episode = EpisodeSpec(**each.pop("spec")), torch.empty(each.pop("count"))
            results.append(EpisodicResult(spec=spec, per_episode=per_episode, **each))
        return results


def new_figure(width: int, height: int, title: str, subtitle: str = "", caption: str = "") -> Figure:
    """Returns a figure of the given size in pixels, with a title, a subtitle below it, and a caption at its foot."""
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    left = 30 / width
    figure.text(left, 1 - 24 / height, title, size=21, weight="bold", va="top")
    figure.text(left, 1 - 66 / height, subtitle, size=14.5, color=rcParams["axes.labelcolor"], va="top")
    figure.text(left, 20 / height, caption, size=12.5, color=rcParams["axes.labelcolor"], va="bottom", linespacing=1.4)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes at a position in pixels from the figure's upper left corner."""
    across, down = figure.get_size_inches() * DPI
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def write_at(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Writes text whose upper left corner is x and y pixels from the figure's."""
    across, down = figure.get_size_inches() * DPI
    figure.text(x / across, 1 - y / down, text, **{"va": "top", **style})


def quickstart_bank(trainer: Any, dataset: FewShotDataset) -> EmbeddingBank:
    return EmbeddingBank(trainer.bank(dataset), dataset.labels, dataset.fingerprint(), dataset.class_names)


def demo(runs: Runs, out: Path) -> dict[str, Any]:
    """Copies the picture from the demo's report; its accuracy is in the table."""
    table = runs.quickstart()[0]
    row = next(row for row in table.rows if (row.ways, row.shots, row.queries) == (5, 1, 15))
    for style, end in (("light", ""), ("dark", "-dark")):
        picture = runs.folder / "quickstart" / "report" / f"result{end}.png"
        shutil.copyfile(picture, out / f"demo-{style}.png")
    return {"command": COMMAND, "seed": row.seed, "episodes": row.count, "accuracy": row.value, "ci95": row.ci95}


def embedding_map(runs: Runs) -> tuple[Callable[[], Figure], dict[str, Any]]:
    """t-SNE of the modern Greek letters without accents, whose shapes a reader knows."""
    trainer = runs.quickstart()[1]
    names = [f"GREEK {case} LETTER {letter}" for case in ("CAPITAL", "SMALL") for letter in ALPHABET.split()]
    letters = runs.test.select_classes(names)
    bank = quickstart_bank(trainer, letters)

    def draw() -> Figure:
        figure = new_figure(
            1200,
            900,
            "Embeddings of Greek letters, a script not seen in training",
            f"{len(bank)} drawings in 21 typefaces; each of the {len(names)} letters stands at the middle of its own",
            f"{PROTONET}; t-SNE of the embeddings (64 dimensions)",
        )
        ax = axes_at(figure, 20, 100, 1160, 740)
        plot_embedding_map(bank, letters.images, thumbnails=len(names), ink=True, perplexity=PERPLEXITY, ax=ax)
        return figure

    numbers = {"classes": len(names), "embeddings": len(bank), "perplexity": PERPLEXITY, "seed": 0}
    return draw, {"command": COMMAND, **numbers}


def accuracy_grid(runs: Runs) -> tuple[Callable[[], Figure], dict[str, Any]]:
    def evaluate() -> list[EpisodicResult]:
        bank = quickstart_bank(runs.quickstart()[1], runs.test)
        return [EpisodicEvaluator(spec).evaluate(bank) for spec in GRID]

    results = runs.results("accuracy-by-ways-and-shots", evaluate)

    def draw() -> Figure:
        figure = new_figure(
            1200,
            700,
            "Accuracy on unseen Greek letters, in %",
            f"{len(results[0].per_episode):,} episodes in each cell, with 95 % intervals",
            f"{PROTONET}; {GRID[0].queries} queries a class, inductive",
        )
        ax = plot_accuracy_grid(results, axes_at(figure, 110, 110, 1060, 460))
        for text in ax.texts:
            text.set_fontsize(17 if text.get_fontweight() == "bold" else 14)
        return figure

    return draw, {"command": COMMAND, "cells": in_words(results)}


def in_words(results: list[EpisodicResult]) -> list[dict[str, Any]]:
    return [
        {
            "spec": str(each.spec),
            "accuracy": each.mean,
            "ci95": each.ci95,
            "episodes": len(each.per_episode),
            "seed": each.seed,
            "episodes_hash": each.episodes_hash,
        }
        for each in results
    ]


def maml_adaptation(runs: Runs) -> tuple[Callable[[], Figure], dict[str, Any]]:
    def evaluate() -> list[EpisodicResult]:
        trainer = runs.maml()
        trainer.eval_inner_steps = INNER_STEPS
        return adaptation_curve(trainer, runs.test, SPEC, num_episodes=1_000)

    results = runs.results("maml-adaptation", evaluate)

    def draw() -> Figure:
        figure = new_figure(
            1200,
            700,
            "MAML adapts to five unseen letters, one example of each",
            f"accuracy over {len(results[0].per_episode):,} episodes of 5 ways and 1 shot, with 95 % intervals",
            "Trained on Latin and Cyrillic letters with 1 inner step (experiments.glyphs_maml, seed 0); transductive",
        )
        ax = plot_adaptation(results, axes_at(figure, 110, 120, 1040, 450))
        ax.set_ylim(0, 109)
        ax.axhline(100 / SPEC.ways, color=rcParams["axes.labelcolor"], linestyle=":", linewidth=1.5)
        ax.text(len(results) - 1, 100 / SPEC.ways + 2, "chance", color=rcParams["axes.labelcolor"], ha="right")
        return figure

    command = "python -m experiments.glyphs_maml --num-episodes 200, then adaptation_curve"
    return draw, {
        "command": command,
        "points": [{"inner steps": n, **each} for n, each in enumerate(in_words(results))],
    }


def speed(runs: Runs) -> tuple[Callable[[], Figure], dict[str, Any]]:
    """Everything measured in episodes per second, as one group of bars for each measurement."""
    with SPEED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["this library"].endswith(PER_SECOND)]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: float(row["ratio"])):
        groups.setdefault(row["measured"], []).append(row)

    def draw() -> Figure:
        figure = new_figure(
            1200,
            860,
            "Few-shot evaluation: episodes per second",
            "5-way 1-shot, 15 queries a class; peers' accuracies agree; logarithmic axis",
            f"python -m experiments.speed.evaluation_speed, medians of 5 rounds; {rows[0]['machine']}",
        )
        top = 120
        for name in dict.fromkeys(row["measured"] for row in rows):
            peers = groups[name]
            values = {OURS: number_in(peers[0]["this library"])}
            values |= {shortened(row["peer"]): number_in(row["peer's figure"]) for row in peers}
            write_at(figure, 30, top, name[0].upper() + name[1:], weight="bold", size=15)
            ax = plot_bars(values, ours=[OURS], log=True, ax=axes_at(figure, 390, top + 30, 560, 38 * len(values)))
            ax.set_xlim(1, 200_000)
            ax.xaxis.set_visible(False)
            ax.spines["bottom"].set_visible(False)
            for text, row in zip(ax.texts[1:], peers, strict=True):
                text.set_text(f"{text.get_text()}  (ours {row['ratio']} times as fast)")
            top += 38 * len(values) + 64
        return figure

    shown = ("measured", "this library", "peer", "peer's figure", "ratio", "machine")
    numbers = [{key: row[key] for key in shown} for row in rows]
    return draw, {"command": rows[0]["command"], "from": "docs/results/evaluation_speed.csv", "bars": numbers}


def shortened(peer: str) -> str:
    return peer.replace("the method of Snell et al.'s code", "Snell et al.'s method")


def number_in(text: str) -> float:
    return float(text.removesuffix(PER_SECOND).replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pictures"), help="folder of the trainings, made once")
    parser.add_argument("--out", type=Path, default=DOCS / "pictures", help="where the pictures go")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure these of measured.json again")
    names = ["demo", *PICTURES]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="which pictures")
    options = parser.parse_args()
    runs = Runs(options.runs)
    runs.forget(options.again)
    options.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    if "demo" in options.only:
        figures["demo"] = demo(runs, options.out)
    for name in [each for each in options.only if each in PICTURES]:
        draw, figures[name] = PICTURES[name](runs)
        for style in THEMES:
            with theme(style), matplotlib.rc_context({"font.size": 14}):
                figure = draw()
                figure.savefig(
                    options.out / f"{name}-{style}.png", metadata={"Software": None}, pil_kwargs={"optimize": True}
                )
                plt.close(figure)
    listed = options.out / "figures.json"
    figures = (json.loads(listed.read_text()) if listed.exists() else {}) | figures
    listed.write_text(json.dumps(figures, indent=1) + "\n")


PICTURES: dict[str, Callable[[Runs], tuple[Callable[[], Figure], dict[str, Any]]]] = {
    "speed": speed,
    "embedding-map": embedding_map,
    "accuracy-by-ways-and-shots": accuracy_grid,
    "maml-adaptation": maml_adaptation,
}

if __name__ == "__main__":
    main()
