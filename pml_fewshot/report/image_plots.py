"""Plots with images in them: an episode, a map of embeddings, nearest neighbors; each on one matplotlib Axes.

Letters: E episodes, W ways, K shots, Q queries a class, N = W*Q, M items, D dimensions, C H W' image.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyBboxPatch, Rectangle
from pytorch_metric_learning.distances import BaseDistance
from threadpoolctl import threadpool_limits
from torch import Tensor

from pml_fewshot.checks import UsageError, import_extra
from pml_fewshot.data.dataset import as_floats
from pml_fewshot.embedders.bank import EmbeddingBank, names_of
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.neighbors import Neighbors
from pml_fewshot.evaluation.statistics import average
from pml_fewshot.report.theme import CHECK, CROSS, PLUS_MINUS, axes_or_new, page_color, shortened
from pml_fewshot.sampling.episodes import Episode

PRINCIPAL = 50  # components given to t-SNE at most, as in its paper (30): 1,600 take three times as long
BAR = 0.86  # width of the bar for a probability of 1, in cells


def plot_episode(
    episode: Episode,
    logits: Tensor,
    number: int = 0,
    queries: int | None = None,
    class_names: Sequence[str] = (),
    ink: bool = False,
    columns: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws an episode as a table: a row per class with its support images, a column per query with its probabilities.

    A cell shows the probability as a bar and, from 1 % up, as a number. Each query's best class has the color C0 and a
    check mark below if it is the query's true class; otherwise C1 and a cross, and the true class is framed.

    Args:
        episode: E episodes of images in [0, 1]: support (E, W, K, C, H, W'), query (E, W, Q, C, H, W'), C 1 or 3.
        logits: (E, N, W) of a trainer's `classify(support, query.flatten(1, 2))`; their softmax is drawn.
        number: which of the E episodes.
        queries: how many of each class are drawn; all when None.
        class_names: of the W ways.
        ink: gray images are writing, high on 0: drawn in the text's color without a background.
        columns: which of the N queries are drawn, in this order; `queries` of each class when None.
        ax: Axes to draw on; new when None. Cells are 1 x 1, the first one's corner is at (0, 0), y points down.
    """
    support, query = episode.support[number], episode.query[number]
    (ways, shots), per_class = support.shape[:2], query.shape[1]
    wanted, got = (len(episode.query), ways * per_class, ways), tuple(logits.shape)
    if got != wanted:
        raise UsageError(f"expected logits (E, N, W) of shape {wanted}, got {got}; classify this episode")
    if columns is None:
        drawn = per_class if queries is None else min(queries, per_class)
        columns = [place for place in range(ways * per_class) if place % per_class < drawn]
    probabilities = logits[number].detach().double().softmax(dim=1)[list(columns)]
    ax, centered = axes_or_new(ax), dict[str, Any](ha="center", va="center")
    for way in range(ways):
        for shot in range(shots):
            draw_image(ax, support[way, shot], shot - shots - 0.15, way, ink)
        if class_names:
            ax.text(-shots - 0.3, way + 0.5, shortened(class_names[way]), ha="right", va="center")
    for column, (place, shares) in enumerate(zip(columns, probabilities.tolist(), strict=True)):
        own, best = place // per_class, int(np.argmax(shares))
        mark = "C0" if best == own else "C1"
        draw_image(ax, query[own, place % per_class], column, -1.15, ink)
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
    ax.set(xlim=(-shots - 0.2, len(columns)), ylim=(ways + 0.7, -1.2), aspect="equal")
    ax.set_axis_off()
    return ax


def plot_result(
    accuracies: Tensor,
    episode: Episode,
    logits: Tensor,
    number: int = 0,
    queries: int = 2,
    class_names: Sequence[str] = (),
    ink: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws one episode next to the mean accuracy of all, with a dot for each by how many of its queries were wrong.

    Args:
        accuracies: (E,) of the episodes, from 0 to 1, as in an EpisodicResult's `per_episode`; two or more.
        episode, logits, number, class_names, ink: as for plot_episode.
        queries: how many of each class are drawn.
        ax: Axes to draw on, about 16 : 7; new when None.
    """
    ways, shots, asked = *episode.support.shape[1:3], episode.query.shape[1] * episode.query.shape[2]
    wrong = ((1 - accuracies.double()) * asked).round()
    few = max(1, round(asked / 25))
    groups = [
        (f"all {asked} queries right", wrong == 0, to_rgb("C0")),
        (f"1 to {few} wrong" if few > 1 else "1 wrong", (wrong > 0) & (wrong <= few), None),
        (f"{few + 1} or more wrong", wrong > few, to_rgb("C1")),
    ]
    half = 0.5 * np.array(to_rgb("C0")) + 0.5 * np.array(page_color())
    colors = np.array([half if color is None else color for _, _, color in groups])
    group = sum(place * which.long() for place, (_, which, _) in enumerate(groups))
    assert isinstance(group, Tensor)

    ax = axes_or_new(ax)
    ax.set(xlim=(0, 1600), ylim=(700, 0), aspect="equal")
    ax.set_axis_off()
    figure = ax.get_figure(root=True)
    assert figure is not None
    width = ax.get_window_extent().width / (16 * figure.dpi)  # text sizes are for 16 inches
    quiet = rcParams["axes.labelcolor"]

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        ax.text(x, y, text, size=size * width, **{"va": "top", **style})

    examples = "1 example" if shots == 1 else f"{shots} examples"
    write(30, 24, f"1 episode: {ways} new classes, {examples} of each", 23, weight="bold")
    write(137, 70, f"queries: which of the {ways} is it? Probabilities in %", 17, color=quiet)
    write(34, 400, f"support set: {examples} of each class", 17, rotation=90, va="center", ha="center", color=quiet)
    inset = ax.inset_axes((60 / 1600, 10 / 700, 950 / 1600, 590 / 700))
    plot_episode(episode, logits, number, queries, class_names, ink, ax=inset)
    inset.set_anchor("NW")
    for text in inset.texts:
        text.set_fontsize(width * (24 if text.get_text() in (CHECK, CROSS) else 18 if ways <= 6 else 12))

    mean, ci95 = average([accuracies])
    write(1064, 24, f"{len(accuracies):,} such episodes", 23, weight="bold")
    write(1064, 74, f"{100 * mean:.2f} {PLUS_MINUS} {100 * ci95:.2f} %", 42, weight="bold", color="C0")
    write(1064, 135, "mean accuracy, 95 % interval", 17, color=quiet)
    across = max(1, round((len(accuracies) * 500 / 320) ** 0.5))  # a dot per episode, in rows
    grid = np.full(-(-len(accuracies) // across) * across, -1)
    grid[: len(accuracies)] = group.numpy()
    picture = np.vstack([colors, [page_color()]])[grid.reshape(-1, across)]
    dots = ax.inset_axes((1064 / 1600, 202 / 700, 500 / 1600, 320 / 700))
    dots.imshow(picture, interpolation="nearest", aspect="auto")
    dots.set_axis_off()
    for line, ((name, which, _), color) in enumerate(zip(groups, colors, strict=True)):
        top = 520 + 36 * line
        ax.add_patch(Rectangle((1064, top), 20, 20, facecolor=color, linewidth=0))
        share = f"{100 * which.double().mean().item():.1f} %{' of episodes' if line == 0 else ''}"
        write(1096, top - 4, f"{name}: {share}", 16)
    return ax


def embedding_points(
    bank: EmbeddingBank, seed: int = 0, perplexity: float = 30.0, method: Literal["tsne", "umap"] = "tsne"
) -> np.ndarray:
    """(M, 2) positions of embeddings on a map that keeps near ones near, by scikit-learn's t-SNE or umap-learn's UMAP.

    Args:
        bank: M embeddings, a few thousand at most; for fewer than four, their first two principal components are used.
        seed: of the method.
        perplexity: how many neighbors count, below M.
        method: "tsne" or "umap"; t-SNE is given the first 50 principal components.
    """
    if not perplexity < max(len(bank), 1):
        raise UsageError(f"expected a perplexity below the {len(bank)} embeddings, got {perplexity}; lower it")
    rows = bank.embeddings.detach().float().cpu().numpy()
    if len(rows) < 4 or rows.shape[1] < 2 or np.ptp(rows, axis=0).max() == 0:  # nothing that has neighbors
        centered = rows - rows.mean(axis=0)
        axes = np.linalg.svd(centered, full_matrices=False)[2][:2]
        return np.pad(centered @ axes.T, ((0, 0), (0, 2 - len(axes))))
    if method == "umap":
        umap, near = import_extra("umap", "for a map by UMAP", "umap"), min(max(2, round(perplexity)), len(rows) - 1)
        return umap.UMAP(n_neighbors=near, random_state=seed, n_jobs=1).fit_transform(rows)
    from sklearn.decomposition import PCA  # both take a second to import
    from sklearn.manifold import TSNE

    # each of its 1,000 steps waits for all threads: next to another busy process 44 s on two threads, 4 s on one
    with threadpool_limits(1):
        if min(rows.shape) > PRINCIPAL:
            rows = PCA(PRINCIPAL, svd_solver="full").fit_transform(rows)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def plot_embedding_map(
    bank: EmbeddingBank,
    images: Tensor | None = None,
    thumbnails: int = 30,
    ink: bool = False,
    seed: int = 0,
    perplexity: float = 30.0,
    points: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws embeddings as points on a map that keeps near ones near, by scikit-learn's t-SNE.

    Which points are neighbors is meaningful; distances between groups, their sizes and the axes are not.

    Args:
        bank: M embeddings, a few thousand at most; each class has a color, which repeats if there are many classes.
        images: (M, C, H, W') of the items, uint8 or in [0, 1]; of a class, the one nearest its points' middle is drawn.
        thumbnails: for how many classes, the first by label, an image is drawn.
        ink: as for plot_episode.
        seed, perplexity: passed to `embedding_points`.
        points: (M, 2) from `embedding_points`; computed when None.
        ax: Axes to draw on; new when None.
    """
    if images is not None and len(images) != len(bank):
        raise UsageError(f"expected {len(bank)} images, one an embedding, got {len(images)}; give those of the bank")
    points = embedding_points(bank, seed, perplexity) if points is None else points
    values, labels = np.unique(bank.labels.cpu().numpy(), return_inverse=True)
    colors = [each["color"] for each in islice(cycle(rcParams["axes.prop_cycle"]), len(values))]
    ax = axes_or_new(ax)
    ax.scatter(points[:, 0], points[:, 1], s=16, c=[to_rgba(colors[label], 0.8) for label in labels], linewidths=0)
    for label, color in enumerate(colors[:thumbnails] if images is not None else ()):
        assert images is not None
        items = np.flatnonzero(labels == label)
        middle = np.median(points[items], axis=0)
        picture = pixels(images[items[np.linalg.norm(points[items] - middle, axis=1).argmin()]], ink)
        shown = OffsetImage(picture, zoom=22 / max(picture.shape[:2]))  # points high
        look = {"facecolor": page_color(), "edgecolor": color, "boxstyle": "round,pad=0.1"}
        ax.add_artist(AnnotationBbox(shown, tuple(middle), pad=0.1, bboxprops=look))
    ax.set_axis_off()
    return ax


def neighbors_in(
    bank: EmbeddingBank, items: Sequence[int], k: int = 10, distance: BaseDistance | None = None
) -> Neighbors:
    """The k other items of a bank nearest to each of some items (N,) of it, by a PML distance, Euclidean when None."""
    k = min(k, len(bank) - 1)
    if k < 1:
        raise UsageError(f"expected a bank of two items or more, got {len(bank)}; nothing else can be near")
    found = Gallery(bank, "flat", distance=distance).search(bank.embeddings[list(items)], k + 1)
    # without the item itself or, if more than k twins are nearer, without the last
    other = found.indices != torch.tensor(items)[:, None]
    keep = other & (other.cumsum(dim=1) <= k)
    indices, distances, labels = (
        each[keep].unflatten(0, (-1, k)) for each in (found.indices, found.distances, found.labels)
    )
    return Neighbors(indices, distances, labels, found.class_names)


def plot_neighbours(
    bank: EmbeddingBank,
    images: Tensor,
    items: Sequence[int],
    k: int = 10,
    distance: BaseDistance | None = None,
    ink: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws a strip for each of some items: its image, and the images nearest to it with their distances.

    Neighbors of its class have a frame of color C0 and a check mark, others C1 and a cross.

    Args:
        bank: M embeddings.
        images: (M, C, H, W') of its items, uint8 or in [0, 1].
        items: indices in the bank of those whose neighbors are shown.
        k: how many neighbors, fewer if the bank has fewer.
        distance: PML distance that ranks, Euclidean when None; its values are drawn.
        ink: as for plot_episode.
        ax: Axes to draw on; new when None. Images are 1 x 1, strip i begins at y = 1.5 i, y points down.
    """
    if len(images) != len(bank):
        raise UsageError(f"expected {len(bank)} images, one an embedding, got {len(images)}; give those of the bank")
    found, ax = neighbors_in(bank, items, k, distance), axes_or_new(ax)
    names = names_of(bank.labels[list(items)].cpu(), bank.class_names)
    centered = dict[str, Any](ha="center", va="center", size="small")
    for row, (item, name) in enumerate(zip(items, names, strict=True)):
        top, label = 1.5 * row, bank.labels[item].cpu()
        draw_image(ax, images[item], -0.2, top, ink)
        ax.text(-0.35, top + 0.5, shortened(name), ha="right", va="center")
        columns = found.indices[row].tolist(), (found.labels[row] == label).tolist(), found.distances[row].tolist()
        for left, (index, right, value) in enumerate(zip(*columns, strict=True), start=1):
            mark, sign = ("C0", CHECK) if right else ("C1", CROSS)
            draw_image(ax, images[index], left + 0.1, top, ink)
            box = Rectangle((left + 0.13, top + 0.03), 0.94, 0.94, facecolor="none", edgecolor=mark, linewidth=2.5)
            ax.add_patch(box)
            ax.text(left + 0.6, top + 1.17, f"{sign} {value:.3g}", color=mark, **centered)
    ax.set(xlim=(-0.3, found.indices.shape[1] + 1.2), ylim=(1.5 * len(items), -0.1), aspect="equal")
    ax.set_axis_off()
    return ax


def pixels(image: Tensor, ink: bool) -> np.ndarray:
    """A color or gray image (C, H, W') as (H, W', 3), or as ink (H, W', 4)."""
    values = as_floats(image).detach().cpu().permute(1, 2, 0).numpy().clip(0, 1)
    color = np.broadcast_to(to_rgb(rcParams["text.color"]), (*values.shape[:2], 3))
    return np.dstack([color, values]) if ink and values.shape[2] == 1 else np.broadcast_to(values, color.shape)


def draw_image(ax: Axes, image: Tensor, left: float, top: float, ink: bool) -> None:
    """Draws an image in a 1 x 1 cell whose upper left corner is given, as large as fits."""
    high, wide = (0.43 * side / max(image.shape[1:]) for side in image.shape[1:])
    x, y = left + 0.5, top + 0.5
    ax.imshow(pixels(image, ink), extent=(x - wide, x + wide, y + high, y - high))
