"""Themes for pictures on white and on dark pages, in colors that can be read and distinguished on both.

Text and lines use the colors of the current rcParams, data the first colors of the cycle: C0 for what is right or
ours, C1 for what is wrong. Any style works; `theme` sets one for white pages or one for dark ones.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba

from pml_fewshot.checks import check_choice

Theme = Literal["light", "dark"]

PLUS_MINUS, CHECK, CROSS = "\N{PLUS-MINUS SIGN}", "\N{CHECK MARK}", "\N{BALLOT X}"


def _settings(page: str, text: str, quiet: str, line: str, *marks: str) -> dict[str, Any]:
    """rc settings for the colors of the page, text, explanatory text, lines, and the cycle of marks."""
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
    look["text.parse_math"] = False  # a class may be called "a$b$"
    look["font.family"] = ["DejaVu Sans"]  # comes with matplotlib: the same on every machine
    return look | {name: color for color, names in roles.items() for name in names.split()}


# Page colors are GitHub's, so that pictures have no frame there. Marks have the hues of Okabe and Ito, which
# color-blind readers can distinguish, and on white are dark enough for text.
THEMES: dict[Theme, Any] = {
    "light": _settings(
        "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0063a0", "#b54708", "#00745a", "#8f4a77", "#7a5c00"
    ),
    "dark": _settings(
        "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#ff9e4a", "#2fc79b", "#e39ac6", "#f0e442"
    ),
}


def theme(name: Theme) -> AbstractContextManager[None]:
    """Context manager for pictures on white pages, or on GitHub's dark ones; text has a contrast of 4.5 or more."""
    check_choice("theme", name, list(THEMES))
    return rc_context(THEMES[name])


def contrast(color: Any, other: Any) -> float:
    """The contrast of two colors by WCAG 2.2, from 1 to 21; text should have 4.5 to its background (level AA)."""

    def luminance(of: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    darker, lighter = sorted((luminance(color), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def readable_on(behind: Any) -> str:
    """Black or white, whichever has the greater contrast with a color."""
    return max("black", "white", key=lambda color: contrast(color, behind))


def page_color() -> tuple[float, float, float]:
    """The color behind the axes; if they are transparent, black or white, to suit the text."""
    red, green, blue, alpha = to_rgba(rcParams["axes.facecolor"])
    return (red, green, blue) if alpha else to_rgb(readable_on(rcParams["text.color"]))


def axes_or_new(ax: Axes | None) -> Axes:
    """The given Axes, or those of a new pyplot figure when None."""
    import matplotlib.pyplot as plt  # it chooses a window system at its first use

    return plt.subplots()[1] if ax is None else ax


def shortened(text: object, most: int = 24) -> str:
    """A name on one line, cut in its middle, where similar names are most alike."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most // 2]}\N{HORIZONTAL ELLIPSIS}{line[-(most - most // 2 - 1) :]}"
