"""Sphinx configuration: `make docs` builds the site into build/docs, where a warning is an error."""

import re
from typing import Any

import pml_fewshot

project, author = "pml_fewshot", "the developers of pml_fewshot"
version = release = pml_fewshot.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3  # the same anchors as on a forge
exclude_patterns = ["notebooks"]
nitpicky = False  # types of torch and PML have no pages here

autodoc_member_order = "bysource"
toc_object_entries = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

html_theme = "furo"
html_theme_options = {"dark_css_variables": {"color-background-primary": "#0d1117"}}  # as in the pictures
html_title = f"pml_fewshot {release}"
html_show_sphinx = html_show_copyright = False


def escape(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Escapes what reStructuredText would take for emphasis or a link: docstrings are plain text with `code`."""
    for number, line in enumerate(lines):
        texts = line.split("`")
        texts[::2] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", text) for text in texts[::2]]
        lines[number] = "``".join(texts)
    if what == "attribute":
        lines.insert(0, "")  # or napoleon takes the text before a colon for a type


def both_themes(app: object, name: str, source: list[str]) -> None:
    """Shows each picture's dark version on dark pages."""
    picture = re.compile(r"!\[([^]]*)\]\(([^)]*)-light\.png\)")
    source[0] = picture.sub(r"![\1](\2-light.png){.only-light} ![\1](\2-dark.png){.only-dark}", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", both_themes)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon reads it
