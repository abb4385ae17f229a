"""A map of embeddings that shows the image and class under the mouse, by Bokeh (extra `report`)."""

import base64
import html
import io

import numpy as np
from PIL import Image
from torch import Tensor

from pml_fewshot.checks import import_extra
from pml_fewshot.embedders.bank import EmbeddingBank, names_of
from pml_fewshot.report.image_plots import pixels
from pml_fewshot.report.theme import shortened, theme

THUMBNAIL = 48  # pixels; 1,000 of them are about 0.5 MB as PNG of letters, 1.5 MB of photos as JPEG


def interactive_map(bank: EmbeddingBank, images: Tensor, points: np.ndarray, ink: bool) -> str:
    """HTML of the map with all of Bokeh's scripts included, about 1 MB: nothing is loaded from elsewhere.

    Args:
        bank: M embeddings.
        images: (M, C, H, W') of its items, uint8 or in [0, 1].
        points: (M, 2) their positions.
        ink: as for plot_episode.
    """
    import_extra("report", "for a map that shows images", "bokeh")
    from bokeh.embed import components
    from bokeh.models import HoverTool
    from bokeh.plotting import figure
    from bokeh.resources import Resources

    places = np.unique(bank.labels.cpu().numpy(), return_inverse=True)[1]
    names = [html.escape(shortened(name, 60)) for name in names_of(bank.labels.cpu(), bank.class_names)]
    source = {
        "x": points[:, 0],
        "y": points[:, 1],
        "color": [MIDDLE[place % len(MIDDLE)] for place in places],
        "name": names,
        "image": [thumbnail(image, ink) for image in images],
    }
    plot = figure(
        height=560,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,reset",
        toolbar_location="above",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        match_aspect=True,
    )
    plot.toolbar.logo = None
    plot.axis.visible = False
    plot.grid.visible = False
    plot.scatter("x", "y", size=9, color="color", alpha=0.85, line_width=0, source=source)
    tip = '<div style="font:14px sans-serif"><img src="@image" width="84" height="84" alt=""><br>@name{safe}</div>'
    plot.add_tools(HoverTool(tooltips=tip))
    script, place = components(plot)
    scripts = Resources(mode="inline", components=["bokeh"]).render_js()  # 1 MB; 5 with widgets and formulas
    return f"{place}{scripts}{script}"


# hues of both themes' marks between light and dark, which stand out on white and on dark pages
MIDDLE = ["#2f86c2", "#d9731a", "#129271", "#b968a0", "#9a8419"]


def thumbnail(image: Tensor, ink: bool) -> str:
    """A small picture as a data URL; writing is black on white, because tooltips have a white background."""
    with theme("light"):
        values = pixels(image, False)
    values = 1 - values if ink else values
    picture = Image.fromarray(np.round(255 * values).astype(np.uint8)).convert("L" if ink else "RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out, kind = io.BytesIO(), "png" if ink else "jpeg"
    picture.save(out, kind, **({"optimize": True} if ink else {"quality": 70}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
