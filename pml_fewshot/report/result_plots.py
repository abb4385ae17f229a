"""Plots of results for notebooks and pages: each function draws on one matplotlib Axes and returns it.

    with theme("dark"):
        ax = plot_accuracy_grid([EpisodicEvaluator(spec).evaluate(bank) for spec in specs])
        ax.figure.savefig("grid.png")

Letters: N queries, W ways, C classes.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.bank import ClassName
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.report.image_plots import draw_image
from pml_fewshot.report.theme import PLUS_MINUS, axes_or_new, page_color, readable_on, shortened
from pml_fewshot.sampling.episodes import EpisodeSpec


def plot_accuracy_grid(results: Sequence[EpisodicResult], ax: Axes | None = None) -> Axes:
    """Draws accuracies in % with 95 % intervals as a heat map: a row per number of ways, a column per number of shots.

    Args:
        results: from EpisodicEvaluator, one for each pair of ways and shots; a pair may be missing.
        ax: Axes to draw on; new when None. Cell centers are whole numbers, for columns and for rows.
    """
    sized = {each.spec: each for each in results if isinstance(each.spec, EpisodeSpec)}
    ways, shots = (sorted({getattr(spec, name) for spec in sized}) for name in ("ways", "shots"))
    cells = {(ways.index(spec.ways), shots.index(spec.shots)): each for spec, each in sized.items()}
    if not results or len(cells) < len(results):
        raise UsageError(f"expected one result for each pair of ways and shots, got {len(results)}; draw them apart")
    grid = np.full((len(ways), len(shots)), np.nan)
    for cell, each in cells.items():
        grid[cell] = 100 * each.mean
    page, mark, ax = np.array(page_color()), np.array(to_rgb("C0")), axes_or_new(ax)
    shown = ax.imshow(grid, LinearSegmentedColormap.from_list("", [0.8 * page + 0.2 * mark, mark]), aspect="auto")
    for (row, column), each in cells.items():
        behind = shown.to_rgba(grid)[row, column, :3]
        style: dict[str, Any] = {"ha": "center", "color": readable_on(behind)}
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
        unit: of all values, such as "episodes/s".
        ours: names of bars in the color C0; the others are gray.
        log: use a logarithmic axis, which begins at the power of ten below the lowest value.
        ax: Axes to draw on; new when None. Bar i is at y = i, and y points down.
    """
    numbers, others = list(values.values()), set(ours) - set(values)
    if not numbers or others or min(numbers) <= 0:
        do = "leave out what has no value, and name bars as they are named in values"
        raise UsageError(f"expected values above 0, got {dict(values)}, ours {list(ours)}; {do}")
    ax = axes_or_new(ax)
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
        results: from `adaptation_curve`, after 0, 1, 2, .. steps on the same episodes.
        ax: Axes to draw on; new when None.
    """
    means, halves = (100 * np.array([getattr(each, name) for each in results]) for name in ("mean", "ci95"))
    ax, steps = axes_or_new(ax), np.arange(len(results))
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


def plot_intervals(
    values: Mapping[str, tuple[float, float]], unit: str = "", zero: bool = False, ax: Axes | None = None
) -> Axes:
    """Draws values with their intervals, one per row: accuracies of runs, or their paired differences.

    Args:
        values: (value, half-width of its interval) by name; the first is on top. A half-width of NaN is not drawn.
        unit: of all values, "%" or "points".
        zero: draw a line at 0, and in gray the values whose interval contains it: differences that may be chance.
        ax: Axes to draw on; new when None. Row i is at y = i, and y points down.
    """
    if not values:
        raise UsageError("expected values to draw, got none; leave the picture out")
    ax = axes_or_new(ax)
    for row, (mean, half) in enumerate(values.values()):
        color = rcParams["axes.labelcolor"] if zero and not abs(mean) > half else "C0"
        ax.errorbar(mean, row, xerr=None if np.isnan(half) else half, fmt="o", color=color, capsize=4)
        shown = f"{mean:+.2f}" if zero else f"{mean:.2f}"
        shown += "" if np.isnan(half) else f" {PLUS_MINUS} {half:.2f}"
        place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        ax.annotate(shown, (mean, row), color=color, size="small", **place)
    if zero:
        ax.axvline(0, color=rcParams["axes.labelcolor"], linewidth=1, linestyle=":")
    ax.set_yticks(range(len(values)), [shortened(name, 40) for name in values])
    ax.set_ylim(len(values) - 0.5, -0.7)
    ax.margins(x=0.15)
    ax.set_xlabel(unit)
    ax.tick_params(axis="y", length=0, labelcolor=rcParams["text.color"])
    ax.spines["left"].set_visible(False)
    return ax


def plot_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str = "training steps",
    ylabel: str = "",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws values recorded during training over the training steps.

    Args:
        curves: by name: steps and values, or steps, values and half-widths of intervals, drawn as a band. NaN is a gap.
        xlabel, ylabel: of the axes.
        log: use a logarithmic axis of values if all of them are above 0.
        ax: Axes to draw on; new when None. If there are more curves than colors, the next ones are dashed.
    """
    ax, colors = axes_or_new(ax), len(rcParams["axes.prop_cycle"])
    positive = all(value > 0 for curve in curves.values() for value in curve[1])
    for number, (name, (steps, values, *halves)) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": f"C{number % colors}", "linestyle": ("-", "--", ":")[number // colors % 3]}
        look["marker"] = "o" if len(steps) <= 20 else ""
        ax.plot(steps, values, label=shortened(name, 40), **look)
        for half in halves:
            low, high = np.subtract(values, half), np.add(values, half)
            ax.fill_between(steps, low, high, color=look["color"], alpha=0.3, linewidth=0)
    if log and positive:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rounded(value)))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(axis="y", linewidth=0.6)
    if curves:
        ax.legend(frameon=False)
    return ax


class CalibrationBin(NamedTuple):
    """Queries whose best class has a probability in (low, high]: their number, its mean, and how often it was right."""

    low: float
    high: float
    queries: int
    probability: float
    accuracy: float
    lower: float
    """of the accuracy's 95 % interval, as if queries were independent (Wilson 1927)"""
    upper: float


def calibration_bins(probabilities: Tensor, labels: Tensor, bins: int = 10) -> list[CalibrationBin]:
    """How often the best class was right, by its probability, for (N, W) probabilities and (N,) true classes.

    The bins divide [0, 1] evenly, as in Guo et al. 2017; empty bins are left out.
    """
    best, predicted = probabilities.double().max(dim=1)
    place = (best * bins).ceil().long().clamp(1, bins) - 1
    right = (predicted == labels).double()
    found = []
    for number in place.unique().tolist():
        inside = place == number
        count, share = int(inside.sum()), right[inside].mean().item()
        middle, half = (share + 1.9208 / count), 1.96 * (share * (1 - share) / count + 0.9604 / count**2) ** 0.5
        lower, upper = ((middle + side * half) / (1 + 3.8416 / count) for side in (-1, 1))
        lower, upper = min(lower, share), max(upper, share)  # rounding may put it outside
        edges = number / bins, (number + 1) / bins
        found.append(CalibrationBin(*edges, count, best[inside].mean().item(), share, lower, upper))
    return found


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: the mean gap of probability and accuracy over queries (Guo et al. 2017, eq. 3)."""
    total = sum(each.queries for each in bins)
    return sum(each.queries * abs(each.accuracy - each.probability) for each in bins) / total


def plot_reliability(probabilities: Tensor, labels: Tensor, bins: int = 10, ax: Axes | None = None) -> Axes:
    """Draws a reliability diagram: how often queries are classified correctly, by the probability of their best class.

    On the diagonal, probabilities are calibrated; below it, they are too high. Dot areas are shares of the queries.

    Args:
        probabilities: (N, W), of queries of many episodes.
        labels: (N,) indices of the true classes among the W.
        bins: number of bins, of equal width.
        ax: Axes to draw on; new when None.
    """
    ax, found = axes_or_new(ax), calibration_bins(probabilities, labels, bins)
    ax.plot([0, 100], [0, 100], color=rcParams["axes.labelcolor"], linestyle=":", linewidth=1)
    sure, right, lower, upper = (100 * np.array(column) for column in list(zip(*found, strict=True))[3:])
    ax.errorbar(sure, right, yerr=(right - lower, upper - right), color="C0", linewidth=1.5, capsize=3)
    sizes = np.array([each.queries for each in found]) / len(labels)
    ax.scatter(sure, right, s=20 + 400 * sizes, color="C0", zorder=3, clip_on=False)
    ax.set(xlim=(0, 102), ylim=(0, 105), xlabel="probability of the best class, %", ylabel="how often it is right, %")
    ax.grid(linewidth=0.6)
    return ax


def hardest_classes(result: EpisodicResult, most: int = 8) -> list[int]:
    """The classes that are confused with each other most, as indices into `result.classes`, pair by pair."""
    shares = _shares(result)
    pairs = (shares + shares.T).nan_to_num().triu(diagonal=1)
    chosen: dict[int, None] = {}
    for pair in pairs.flatten().argsort(descending=True, stable=True).tolist():
        a, b = divmod(pair, len(pairs))
        if pairs[a, b] == 0 or len(chosen.keys() | {a, b}) > most:
            break
        chosen |= {a: None, b: None}
    return list(chosen)


def _shares(result: EpisodicResult) -> Tensor:
    """(C, C) the share of each class's queries (row) that was classified as each class (column)."""
    if result.confusion is None:
        raise UsageError("expected a result with its confusion matrix, got none; use evaluate(..., confusion=True)")
    return result.confusion.double() / result.confusion.sum(dim=1, keepdim=True)


def plot_confusion(
    result: EpisodicResult,
    images: Mapping[ClassName, Tensor] | None = None,
    most: int = 8,
    ink: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the most confused classes: the share of each row's queries that was classified as a column's class.

    Args:
        result: from `EpisodicEvaluator(..).evaluate(.., confusion=True)`; some pair of classes must have been confused.
        images: (C, H, W') of each class, uint8 or in [0, 1], drawn before its row and above its column.
        most: how many classes.
        ink: gray images are writing, as for plot_episode.
        ax: Axes to draw on; new when None. Cells are 1 x 1, their centers are whole numbers, y points down.
    """
    chosen = hardest_classes(result, most)
    if not chosen:
        raise UsageError("expected classes that were taken for each other, got none; leave the picture out")
    shares, names = 100 * _shares(result)[chosen][:, chosen], [result.classes[place] for place in chosen]
    page, ax = np.array(page_color()), axes_or_new(ax)
    for row in range(len(chosen)):
        for column in range(len(chosen)):
            share, color = shares[row, column].item(), np.array(to_rgb("C0" if row == column else "C1"))
            behind = page + (color - page) * share / 100
            ax.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color=behind, linewidth=0))
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": readable_on(behind)}
            ax.text(column, row, "" if share == 0 else f"{share:.0f}" if share >= 1 else "<1", **style)
    for place, name in enumerate(names):
        if images is not None and name in images:
            draw_image(ax, images[name], -1.5, place - 0.5, ink)
            draw_image(ax, images[name], place - 0.5, -1.5, ink)
    ax.set(xlim=(-1.5 if images else -0.5, len(chosen) - 0.5), ylim=(len(chosen) - 0.5, -1.5 if images else -0.5))
    ax.set_aspect("equal")
    ax.set_yticks(range(len(names)), [shortened(name) for name in names])
    ax.set_xticks(
        range(len(names)), [shortened(name, 12) for name in names], rotation=60, ha="right", rotation_mode="anchor"
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="taken for", ylabel="class of the queries")
    return ax


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
