"""Pictures for notebooks and pages: each function draws on one matplotlib Axes, and returns it.

    with theme("dark"):
        ax = plot_accuracy_grid([EpisodicEvaluator(spec).evaluate(bank) for spec in specs])
        ax.figure.savefig("grid.png")

Text and lines take the colors of the current rcParams, data the first colors of their cycle: C0 is what is right or
ours, C1 what is wrong. Any style will do; `theme` sets one for white pages and one for dark ones.

Letters: E episodes, W ways, K shots, Q queries a class, N = W*Q, M items, D dimensions, C H W' image.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb, to_rgba
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from pml_fewshot.checks import UsageError, check_choice
from pml_fewshot.data.dataset import as_floats
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec

Theme = Literal["light", "dark"]

PLUS_MINUS, CHECK, CROSS = "\N{PLUS-MINUS SIGN}", "\N{CHECK MARK}", "\N{BALLOT X}"
BAR = 0.86  # width of a probability of 1, where cells are 1 wide


def _settings(page: str, text: str, quiet: str, line: str, *marks: str) -> dict[str, Any]:
    """rc settings of colors: of the page, text, text that explains, lines, and the cycle of marks."""
    roles = {
        page: "figure.facecolor axes.facecolor savefig.facecolor",
        text: "text.color axes.titlecolor",
        quiet: "axes.labelcolor xtick.labelcolor ytick.labelcolor",
        line: "axes.edgecolor xtick.color ytick.color grid.color",
    }
    look: dict[str, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=marks),
    }
    look["font.family"] = ["DejaVu Sans"]  # comes with matplotlib: the same on every machine
    return look | {name: color for color, names in roles.items() for name in names.split()}


# Pages as GitHub's, so that pictures have no frame there. Marks are the hues of Okabe and Ito, which color-blind
# readers tell apart, on white dark enough for text.
THEMES: dict[Theme, Any] = {
    "light": _settings(
        "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0063a0", "#b54708", "#00745a", "#8f4a77", "#7a5c00"
    ),
    "dark": _settings(
        "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#ff9e4a", "#2fc79b", "#e39ac6", "#f0e442"
    ),
}


def theme(name: Theme) -> AbstractContextManager[None]:
    """A context in which pictures suit white pages, or GitHub's dark ones; text has a contrast of 4.5 or more."""
    check_choice("theme", name, list(THEMES))
    return rc_context(THEMES[name])


def contrast(color: Any, other: Any) -> float:
    """The contrast of two colors by WCAG 2.2, from 1 to 21; text should have 4.5 with what is behind it (level AA)."""

    def luminance(of: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    darker, lighter = sorted((luminance(color), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def plot_episode(
    episode: Episode,
    logits: Tensor,
    number: int = 0,
    queries: int | None = None,
    class_names: Sequence[str] = (),
    ink: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws an episode as a table: a row a class with its support images, a column a query with its probabilities.

    A cell holds the probability as a bar, and from 1 % on as a number. Each query's best class has the color C0 where
    it is the query's own, with a check mark below; else C1 with a cross, and the query's own class is framed.

    Args:
        episode: E episodes of images in [0, 1]: support (E, W, K, C, H, W'), query (E, W, Q, C, H, W'), C 1 or 3.
        logits: (E, N, W) of a trainer's `classify(support, query.flatten(1, 2))`; their softmax is drawn.
        number: which of the E episodes.
        queries: how many of each class are drawn; all when None.
        class_names: of the W ways.
        ink: gray images are writing, high on 0: drawn in the text's color on no background.
        ax: where; new when None. Cells are 1 x 1, the first one's corner is at (0, 0), y points down.
    """
    support, query = episode.support[number], episode.query[number]
    (ways, shots), per_class = support.shape[:2], query.shape[1]
    wanted, got = (len(episode.query), ways * per_class, ways), tuple(logits.shape)
    if got != wanted:
        raise UsageError(f"expected logits (E, N, W) of shape {wanted}, got {got}; classify this episode")
    drawn = per_class if queries is None else min(queries, per_class)
    probabilities = logits[number].detach().double().softmax(dim=1).unflatten(0, (ways, per_class))[:, :drawn]
    ax, centered = _axes(ax), dict[str, Any](ha="center", va="center")
    for way in range(ways):
        for shot in range(shots):
            _draw_image(ax, support[way, shot], shot - shots - 0.15, way, ink)
        if class_names:
            ax.text(-shots - 0.3, way + 0.5, class_names[way], ha="right", va="center")
    for column, shares in enumerate(probabilities.flatten(0, 1).tolist()):
        own, best = column // drawn, int(np.argmax(shares))
        mark = "C0" if best == own else "C1"
        _draw_image(ax, query[own, column % drawn], column, -1.15, ink)
        for way, share in enumerate(shares):
            color, weight = (mark, "bold") if way == best else (rcParams["axes.labelcolor"], "normal")
            corner = (column + (1 - BAR) / 2, way + 0.62)
            ax.add_patch(Rectangle(corner, BAR, 0.16, color=rcParams["grid.color"], linewidth=0, gid="track"))
            ax.add_patch(Rectangle(corner, BAR * share, 0.16, color=color, linewidth=0, gid="bar"))
            if share >= 0.01:
                ax.text(column + 0.5, way + 0.36, f"{100 * share:.0f}", color=color, weight=weight, **centered)
        if best != own:
            box = FancyBboxPatch((column + 0.06, own + 0.06), 0.88, 0.88, "round,pad=0,rounding_size=0.1", gid="own")
            ax.add_patch(box).set(facecolor="none", edgecolor=rcParams["text.color"], linestyle="--")
        ax.text(column + 0.5, ways + 0.35, CHECK if best == own else CROSS, color=mark, **centered)
    ax.set(xlim=(-shots - 0.2, ways * drawn), ylim=(ways + 0.7, -1.2), aspect="equal")
    ax.set_axis_off()
    return ax


def plot_embedding_map(
    bank: EmbeddingBank,
    images: Tensor | None = None,
    thumbnails: int = 30,
    ink: bool = False,
    seed: int = 0,
    perplexity: float = 30.0,
    ax: Axes | None = None,
) -> Axes:
    """Draws embeddings as points, near ones near each other, by scikit-learn's t-SNE.

    Which points are neighbors means something; distances between groups, their sizes and the axes mean nothing.

    Args:
        bank: of M embeddings, a few thousand at most; a color a class, which repeat where classes are many.
        images: (M, C, H, W') of the items, uint8 or in [0, 1]; at the middle of a class's points the nearest is drawn.
        thumbnails: for how many classes, the first by their labels, an image is drawn.
        ink: as for plot_episode.
        seed: of t-SNE.
        perplexity: how many neighbors count, below M.
        ax: where; new when None.
    """
    from sklearn.manifold import TSNE  # a second to import

    if not perplexity < len(bank):
        raise UsageError(f"expected a perplexity below the {len(bank)} embeddings, got {perplexity}; lower it")
    if images is not None and len(images) != len(bank):
        raise UsageError(f"expected {len(bank)} images, one an embedding, got {len(images)}; give those of the bank")
    rows = bank.embeddings.detach().float().cpu().numpy()
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    values, labels = np.unique(bank.labels.cpu().numpy(), return_inverse=True)
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    colors = [cycle[number % len(cycle)] for number in range(len(values))]
    ax = _axes(ax)
    ax.scatter(points[:, 0], points[:, 1], s=16, c=[to_rgba(colors[label], 0.8) for label in labels], linewidths=0)
    for label, color in enumerate(colors[:thumbnails] if images is not None else ()):
        assert images is not None
        items = np.flatnonzero(labels == label)
        middle = np.median(points[items], axis=0)
        picture = _pixels(images[items[np.linalg.norm(points[items] - middle, axis=1).argmin()]], ink)
        shown = OffsetImage(picture, zoom=22 / len(picture))  # points high
        look = {"facecolor": _page(), "edgecolor": color, "boxstyle": "round,pad=0.1"}
        ax.add_artist(AnnotationBbox(shown, tuple(middle), pad=0.1, bboxprops=look))
    ax.set_axis_off()
    return ax


def plot_accuracy_grid(results: Sequence[EpisodicResult], ax: Axes | None = None) -> Axes:
    """Draws accuracies in % with their 95 % intervals as a heat map: a row a number of ways, a column of shots.

    Args:
        results: of EpisodicEvaluator, one for each pair of ways and shots; a pair may be missing.
        ax: where; new when None. The centers of cells are whole numbers, of columns and of rows.
    """
    sized = {each.spec: each for each in results if isinstance(each.spec, EpisodeSpec)}
    ways, shots = (sorted({getattr(spec, name) for spec in sized}) for name in ("ways", "shots"))
    cells = {(ways.index(spec.ways), shots.index(spec.shots)): each for spec, each in sized.items()}
    if not results or len(cells) < len(results):
        raise UsageError(f"expected one result for each pair of ways and shots, got {len(results)}; draw them apart")
    grid = np.full((len(ways), len(shots)), np.nan)
    for cell, each in cells.items():
        grid[cell] = 100 * each.mean
    page, mark, ax = np.array(_page()), np.array(to_rgb("C0")), _axes(ax)
    shown = ax.imshow(grid, LinearSegmentedColormap.from_list("", [0.8 * page + 0.2 * mark, mark]), aspect="auto")
    for (row, column), each in cells.items():
        behind = shown.to_rgba(grid)[row, column, :3]
        style: dict[str, Any] = {"ha": "center", "color": max("black", "white", key=lambda c: contrast(c, behind))}
        ax.text(column, row, f"{100 * each.mean:.2f}", weight="bold", va="bottom", **style)
        ax.text(column, row + 0.05, f"{PLUS_MINUS} {100 * each.ci95:.2f}", size="small", va="top", **style)
    for draw, count in ((ax.axhline, len(ways)), (ax.axvline, len(shots))):
        for line in range(1, count):
            draw(line - 0.5, color=page, linewidth=3)
    ax.set_xticks(range(len(shots)), list(map(str, shots)))
    ax.set_yticks(range(len(ways)), list(map(str, ways)))
    ax.set(xlabel="shots (examples of each class)", ylabel="ways (classes to choose from)")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def plot_bars(
    values: Mapping[str, float], unit: str = "", ours: Collection[str] = (), log: bool = False, ax: Axes | None = None
) -> Axes:
    """Draws a horizontal bar for each value, with its number (three digits, or whole) and unit at the end.

    Args:
        values: above 0, by name; the first is on top.
        unit: of all values, "episodes/s".
        ours: names of bars in the color C0; the others are gray.
        log: a logarithmic axis, which begins at the power of ten below the lowest value.
        ax: where; new when None. Bar i is at y = i, which points down.
    """
    numbers, others = list(values.values()), set(ours) - set(values)
    if not numbers or others or min(numbers) <= 0:
        do = "leave out what has no value, and name bars as they are named in values"
        raise UsageError(f"expected values above 0, got {dict(values)}, ours {list(ours)}; {do}")
    ax = _axes(ax)
    colors = ["C0" if name in ours else rcParams["axes.labelcolor"] for name in values]
    ax.barh(range(len(values)), numbers, height=0.62, color=colors)
    for row, (name, value) in enumerate(values.items()):
        place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center_baseline"}
        ax.annotate(f"{_rounded(value)} {unit}".strip(), (value, row), weight="bold" if name in ours else None, **place)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    if log:
        ax.set_xscale("log")
        ax.set_xlim(left=10.0 ** np.floor(np.log10(min(numbers)) - 0.01))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _rounded(value)))
    ax.tick_params(axis="y", length=0, labelcolor=rcParams["text.color"])
    ax.spines["left"].set_visible(False)
    return ax


def plot_adaptation(results: Sequence[EpisodicResult], ax: Axes | None = None) -> Axes:
    """Draws accuracies in % before an inner loop and after each of its steps, with their 95 % intervals as a band.

    Args:
        results: of `adaptation_curve`, after 0, 1, 2, .. steps on the same episodes.
        ax: where; new when None.
    """
    means, halves = (100 * np.array([getattr(each, name) for each in results]) for name in ("mean", "ci95"))
    ax, steps = _axes(ax), np.arange(len(results))
    ax.fill_between(steps, means - halves, means + halves, color="C0", alpha=0.3, linewidth=0)
    ax.plot(steps, means, color="C0", marker="o")
    for step, (mean, half) in enumerate(zip(means, halves, strict=True)):
        aside: dict[str, Any] = {"xytext": (10, -6), "ha": "left", "va": "top"}  # the curve rises on the left
        above: dict[str, Any] = {"xytext": (0, 10), "ha": "center", "va": "bottom"}
        place = aside if step == 0 else above
        ax.annotate(f"{mean:.1f} {PLUS_MINUS} {half:.1f}", (step, mean), textcoords="offset points", **place)
    ax.set_xticks(steps)
    ax.set(xlabel="inner steps", ylabel="accuracy, %")
    return ax


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def _page() -> tuple[float, float, float]:
    """The color behind the axes; where they are transparent, black or white, as suits the text."""
    red, green, blue, alpha = to_rgba(rcParams["axes.facecolor"])
    opposite = max("black", "white", key=lambda color: contrast(color, rcParams["text.color"]))
    return (red, green, blue) if alpha else to_rgb(opposite)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _pixels(image: Tensor, ink: bool) -> np.ndarray:
    """A color or gray image (C, H, W') as (H, W', 3), as ink (H, W', 4)."""
    values = as_floats(image).detach().cpu().permute(1, 2, 0).numpy().clip(0, 1)
    color = np.broadcast_to(to_rgb(rcParams["text.color"]), (*values.shape[:2], 3))
    return np.dstack([color, values]) if ink and values.shape[2] == 1 else np.broadcast_to(values, color.shape)


def _draw_image(ax: Axes, image: Tensor, left: float, top: float, ink: bool) -> None:
    ax.imshow(_pixels(image, ink), extent=(left + 0.07, left + 0.93, top + 0.93, top + 0.07))
