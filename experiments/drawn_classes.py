"""How well the teaching page's network classifies drawings: people's characters, and shaky shapes with "none of these".

    python -m experiments.drawn_classes --data-root DIR
    python -m experiments.drawn_classes                      # the shapes alone

The characters are Omniglot's 659 evaluation characters, 105 x 105 pixels, each drawn with a mouse by 20 people. They
are preprocessed as in `pml-fewshot app`, and also with the whole picture scaled to 28 x 28. The shapes are polylines
with random corners, size, place, slant and rotation: ten are taught and five are not.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pml_fewshot import (
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    FewShotDataset,
    ImageEmbedder,
    Preprocessing,
    load_omniglot,
)
from pml_fewshot.app.drawings import glyph_embedder
from pml_fewshot.app.pictures import Picture, PictureEmbedder
from pml_fewshot.app.taught_set import TaughtSet

Stroke = list[tuple[float, float]]  # points in a square of 0 to 1
CIRCLE = [(0.5 + 0.35 * np.cos(turn), 0.5 + 0.35 * np.sin(turn)) for turn in np.linspace(0, 2 * np.pi, 20)]
SPIRAL = [(0.5 + 0.04 * turn * np.cos(turn), 0.5 + 0.04 * turn * np.sin(turn)) for turn in np.linspace(0, 9, 40)]
TAUGHT: dict[str, list[Stroke]] = {
    "circle": [CIRCLE],
    "square": [[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8), (0.2, 0.2)]],
    "triangle": [[(0.5, 0.15), (0.85, 0.8), (0.15, 0.8), (0.5, 0.15)]],
    "cross": [[(0.2, 0.2), (0.8, 0.8)], [(0.8, 0.2), (0.2, 0.8)]],
    "plus": [[(0.5, 0.15), (0.5, 0.85)], [(0.15, 0.5), (0.85, 0.5)]],
    "Z": [[(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)]],
    "A": [[(0.2, 0.85), (0.5, 0.15), (0.8, 0.85)], [(0.32, 0.58), (0.68, 0.58)]],
    "E": [[(0.75, 0.15), (0.25, 0.15), (0.25, 0.85), (0.75, 0.85)], [(0.25, 0.5), (0.65, 0.5)]],
    "star": [[(0.5, 0.1), (0.72, 0.85), (0.1, 0.38), (0.9, 0.38), (0.28, 0.85), (0.5, 0.1)]],
    "S": [[(0.75, 0.25), (0.5, 0.15), (0.27, 0.3), (0.5, 0.5), (0.73, 0.7), (0.5, 0.85), (0.25, 0.75)]],
}
OTHERS: dict[str, list[Stroke]] = {
    "arrow": [[(0.15, 0.5), (0.85, 0.5)], [(0.6, 0.25), (0.85, 0.5), (0.6, 0.75)]],
    "M": [[(0.15, 0.85), (0.15, 0.15), (0.5, 0.6), (0.85, 0.15), (0.85, 0.85)]],
    "hash": [[(x, 0.15), (x, 0.85)] for x in (0.35, 0.65)] + [[(0.15, y), (0.85, y)] for y in (0.37, 0.65)],
    "spiral": [SPIRAL],
    "Y": [[(0.2, 0.15), (0.5, 0.5), (0.8, 0.15)], [(0.5, 0.5), (0.5, 0.85)]],
}
SIDE, PEN, FINER = 320, 13, 3  # the page's canvas and pen in pixels; drawn FINER times larger, then scaled down


def drawing(strokes: list[Stroke], rng: np.random.Generator) -> bytes:
    """Returns a PNG of a shape as a shaky hand would draw it on the page."""
    size, turn = rng.uniform(0.45, 1), np.radians(rng.normal(0, 6))
    slant, stretch = rng.normal(0, 0.1), np.exp(rng.normal(0, 0.08))
    rotated = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = size * rotated @ np.array([[stretch, slant], [0, 1 / stretch]])
    place = 0.5 + rng.uniform(-(1 - size) / 2, (1 - size) / 2, 2)
    image = Image.new("L", (SIDE * FINER, SIDE * FINER), 255)
    pen, width = ImageDraw.Draw(image), PEN * FINER
    for stroke in strokes:
        corners = np.array(stroke) - 0.5 + rng.normal(0, 0.03, (len(stroke), 2))
        points = [tuple(point) for point in (corners @ shape.T + place) * SIDE * FINER]
        pen.line(points, 0, width, joint="curve")
        for x, y in points:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)
    out = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out, "PNG")
    return out.getvalue()


def shapes(embedder: PictureEmbedder, shots: int, sets: int) -> str:
    """Returns a table row: results on new drawings of taught shapes and of others, over several taught sets."""

    def seen(strokes: list[Stroke], rng: np.random.Generator) -> tuple[Picture, np.ndarray]:
        picture = embedder.picture(drawing(strokes, rng), "drawing")
        return picture, embedder(picture)

    likeliest, rejected, others = [], [], []
    for seed in range(sets):
        rng, taught = np.random.default_rng(seed), TaughtSet()
        for name, strokes in TAUGHT.items():
            pictures, rows = zip(*(seen(strokes, rng) for _ in range(shots)), strict=True)
            taught.add(name, pictures, rows)
        for name, strokes in TAUGHT.items():
            for _ in range(2):
                answer = taught.answer(seen(strokes, rng)[1])
                likeliest.append(answer["classes"][0]["name"] == name)
                rejected.append(answer["rejected"])
        others += [taught.answer(seen(each, rng)[1])["rejected"] for each in OTHERS.values() for _ in range(2)]
    cells = (interval(per_set) for per_set in (np.array_split(each, sets) for each in (likeliest, rejected, others)))
    return f"| {shots} | {' | '.join(cells)} |"


def interval(groups: list[np.ndarray]) -> str:
    """Formats the mean and 95 % interval over taught sets, in %."""
    means = np.array([100 * np.mean(group) for group in groups])
    return f"{means.mean():.1f} +- {1.96 * means.std(ddof=1) / len(means) ** 0.5:.1f}"


def characters(dataset: FewShotDataset, embedder: ImageEmbedder, num_episodes: int) -> str:
    # dark ink on light paper, as drawn
    pages = [Image.fromarray(255 - image) for image in dataset.images[:, 0].numpy()]
    bank = EmbeddingBank(torch.from_numpy(embedder.transform(pages)), dataset.labels)
    return str(EpisodicEvaluator(EpisodeSpec(5, 2, 5), num_episodes).evaluate(bank))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder of Omniglot; only shapes when not given")
    parser.add_argument("--num-episodes", type=int, default=10_000)
    parser.add_argument("--sets", type=int, default=20, help="taught sets of shapes (%(default)s)")
    given = parser.parse_args()
    if given.data_root is not None:
        test = load_omniglot(given.data_root, 105, "official", rotations=False).test
        ours = glyph_embedder()
        scaled = ImageEmbedder(ours.embedder, Inverted((28, 28), (28, 28), channels=1), progress=False)
        print(
            f"{len(test.class_names)} characters, as the page sees them: {characters(test, ours, given.num_episodes)}"
        )
        print(f"the whole picture scaled to 28 x 28: {characters(test, scaled, given.num_episodes)}\n")
    print("| examples a class | likeliest is right, % | wrongly rejected, % | other shapes rejected, % |")
    print("| --- | --- | --- | --- |")
    page = PictureEmbedder.of("glyphs")
    for shots in (1, 2, 5):
        print(shapes(page, shots, given.sets), flush=True)
    print(f"\n{given.sets} sets of {len(TAUGHT)} shapes; two new drawings of each, and of {len(OTHERS)} other shapes")


class Inverted(Preprocessing):
    """Preprocessing of the whole picture, with high values for ink, like the letters."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        return 255 - super().__call__(image)


if __name__ == "__main__":
    main()
