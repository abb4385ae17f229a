"""Makes the notebooks in docs/notebooks/ from documentation pages, with the output that the pages show.

python docs/notebooks.py            writes them
python docs/notebooks.py --check    only says which are stale, with exit code 1
"""

import argparse
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = ("tutorials/first-training.md", "how-to/evaluate-embeddings.md")
# code, and its output if the page shows it right below
BLOCK = re.compile(r"^```python\n(.*?)\n```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")  # the start of a Markdown link or picture, up to its anchor


def notebook(text: str, folder: str) -> dict[str, Any]:
    """Returns the notebook (nbformat 4.5) of a page's Markdown, whose links start from `folder` below docs."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, **more: Any) -> None:
        lines = source.strip("\n").splitlines(keepends=True)
        cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines, **more})

    def from_notebooks(link: re.Match[str]) -> str:
        return f"]({posixpath.relpath(posixpath.join(folder, link[1]), 'notebooks')}"

    parts = BLOCK.split(LINK.sub(from_notebooks, text))  # Markdown, code, output, Markdown, ..
    for place in range(0, len(parts), 3):
        if parts[place].strip():
            add("markdown", parts[place])
        for code, printed in [parts[place + 1 : place + 3]] if place + 1 < len(parts) else ():
            stream = {"name": "stdout", "output_type": "stream", "text": (printed or "").splitlines(keepends=True)}
            add("code", code, execution_count=None, outputs=[stream] if printed else [])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def contents() -> dict[Path, str]:
    """Returns the text of each notebook's file, as generated from its page."""
    pages = {page: notebook((DOCS / page).read_text("utf-8"), posixpath.dirname(page)) for page in PAGES}
    return {
        DOCS / "notebooks" / f"{Path(page).stem}.ipynb": f"{json.dumps(made, ensure_ascii=False, indent=1)}\n"
        for page, made in pages.items()
    }


def stale() -> dict[Path, str]:
    """Returns the notebooks whose files differ or are missing."""
    return {path: text for path, text in contents().items() if not path.exists() or path.read_text("utf-8") != text}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where one is stale")
    check, old = parser.parse_args().check, stale()
    for path, text in old.items():
        print(f"{'stale' if check else 'written'}: {path.relative_to(DOCS)}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    sys.exit(1 if check and old else 0)
