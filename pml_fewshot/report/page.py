"""A report as one HTML file: sections of text, tables and charts, with everything that they need inside."""

import base64
import csv
import html
import io
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pml_fewshot.checks import UsageError
from pml_fewshot.io.atomic import atomic_write, translate_write_errors, write_text
from pml_fewshot.report.theme import THEMES, Theme, theme

SMALL = 5.4  # inches wide; two fit next to each other
DPI, CSS_DPI = 144, 96  # sharp on dense screens at half again as many pixels
# what a browser may load: only what is in the file, so that a report that is passed on notifies nobody
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Chart:
    """A picture and the numbers in it.

    Args:
        name: of its files.
        title: above it.
        alt: what it shows, for readers who cannot see it.
        draw: called with the Axes as `ax`, once for each theme.
        size: width and height in inches, before empty edges are cropped.
        head, rows: its numbers as a table.
        caption: below it.
        live: HTML shown in its place on screens if scripts run.
    """

    name: str
    title: str
    alt: str
    draw: Callable[..., object]
    size: tuple[float, float] = (7.0, 4.0)
    head: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    caption: str = ""
    live: str = ""


@dataclass
class Section:
    """A heading, with HTML (whose names and texts are escaped) and charts below it."""

    title: str
    html: str = ""
    charts: list[Chart] = field(default_factory=list)


def escaped(text: object) -> str:
    return html.escape(str(text))


def paragraph(text: object, kind: str = "") -> str:
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def not_drawn(error: Exception) -> str:
    """Why there is no picture: what the user can do about it, or a bug with its type."""
    if isinstance(error, UsageError):
        return paragraph(f"Not drawn: {error}", "quiet")
    traceback.print_exception(error)
    return paragraph(f"Not drawn: {type(error).__name__}: {error}", "warning")


def section_of(title: str, make: Callable[[], "Section | list[Chart]"]) -> list[Section]:
    """The result of `make` below its title, or why there is none; no section if there is nothing to show."""
    try:
        made = make()
    except Exception as error:  # noqa: BLE001 (one part must not cost the others)
        return [Section(title, not_drawn(error))]
    if isinstance(made, Section):
        return [made]
    return [Section(title, charts=made)] if made else []


def table(head: Sequence[object], rows: Sequence[Sequence[object]], name: str) -> str:
    """A table that scrolls on its own if the page is narrow; columns of numbers are right-aligned."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(name)}">{inside}</div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    kind = ' class="number"' if isinstance(value, int) else ' dir="auto"'
    return f"<td{kind}>{escaped(f'{value:,}' if isinstance(value, int) else value)}</td>"


def write_report(folder: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Draws the charts and writes report.html and, in report/, each chart as PNG files and its numbers as CSV.

    Each file is complete or as it was before; files of an earlier report in report/ that this one lacks are removed.
    """
    place = folder / "report"
    with translate_write_errors(folder):
        place.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    bodies = []
    for section in sections:
        charts = []
        for chart in section.charts:
            try:
                pngs = {style: drawn(chart, style) for style in THEMES}
            except Exception as error:  # noqa: BLE001 (one picture must not cost the others)
                charts.append(f"<h3>{escaped(chart.title)}</h3>{not_drawn(error)}")
                continue
            contents = {f"{chart.name}{'' if style == 'light' else '-dark'}.png": png for style, png in pngs.items()}
            contents |= {f"{chart.name}.csv": _csv(chart)} if chart.head else {}
            for name, content in contents.items():
                with atomic_write(place / name) as temporary:
                    temporary.write_bytes(content)
            written |= contents.keys()
            charts.append(_figure(chart, pngs))
        bodies.append(f"<section><h2>{escaped(section.title)}</h2>{section.html}{_beside(section, charts)}</section>")
    for old in {path.name for path in place.iterdir()} - written:
        if Path(old).suffix in (".png", ".csv"):
            (place / old).unlink()
    write_text(folder / "report.html", page(title, "".join(bodies), subtitle))
    return folder / "report.html"


def _beside(section: Section, charts: Sequence[str]) -> str:
    """Small charts next to each other if the window is wide."""
    small = len(charts) > 1 and all(chart.size[0] <= SMALL for chart in section.charts)
    return f'<div class="tiles">{"".join(charts)}</div>' if small else "".join(charts)


def page(title: str, body: str, subtitle: str = "") -> str:
    """The whole document."""
    style = files(__package__).joinpath("page.css").read_text("utf-8")
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title><style>{style}</style></head><body><main>",
            f'<header><h1 dir="auto">{escaped(title)}</h1>{paragraph(subtitle, "quiet") if subtitle else ""}</header>',
            f"{body}</main></body></html>\n",
        )
    )


def drawn(chart: Chart, style: Theme) -> bytes:
    """The chart as a PNG, with its alternative text inside."""
    look = rc_context({"font.size": 10.5, "axes.unicode_minus": False})
    with theme(style), look, warnings.catch_warnings():
        # a name in a script that matplotlib's font lacks shows as boxes in the picture, but is readable in the table
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=chart.size, dpi=DPI)
        FigureCanvasAgg(figure)
        chart.draw(ax=figure.add_subplot())
        out = io.BytesIO()
        about = {"Title": chart.title, "Description": chart.alt, "Software": None}
        figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.08, metadata=about)
        return out.getvalue()


def _figure(chart: Chart, pngs: dict[Theme, bytes]) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(pngs[style]).decode()}" for style in ("light", "dark"))
    width, height = (round(int.from_bytes(pngs["light"][at : at + 4], "big") * CSS_DPI / DPI) for at in (16, 20))
    # on a phone a wide picture scrolls, because its text would be too small
    look = f"min-width:min({width}px,{max(340, round(0.72 * width))}px)"
    image = f'<img src="{light}" width="{width}" height="{height}" style="{look}" alt="{escaped(chart.alt)}">'
    picture = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">{image}</picture>'
    shown = f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(chart.title)}">{picture}</div>'
    if chart.live:
        label = f'role="img" aria-label="{escaped(chart.alt)}"'
        shown = f'<div class="live" {label}>{chart.live}</div><div class="still">{shown}</div>'
    below = f"<figcaption>{escaped(chart.caption)}</figcaption>" if chart.caption else ""
    numbers = ""
    if chart.head:
        numbers = f"<details><summary>numbers</summary>{table(chart.head, chart.rows, chart.title)}</details>"
    return f'<figure id="{escaped(chart.name)}"><h3>{escaped(chart.title)}</h3>{shown}{below}{numbers}</figure>'


def _csv(chart: Chart) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([chart.head, *chart.rows])
    return out.getvalue().encode()


def definitions(items: Sequence[tuple[str, object]]) -> str:
    """A list of names and values."""
    inside = (f'<div><dt>{escaped(name)}</dt><dd dir="auto">{escaped(value)}</dd></div>' for name, value in items)
    return f"<dl>{''.join(inside)}</dl>"
