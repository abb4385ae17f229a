"""Fills the tables of the README and pages from the CSV files in docs/results: `make tables`.

    python docs/render.py            # writes the pages whose tables changed, and names them
    python docs/render.py --check    # writes nothing; exits with 1 and names the stale pages

A marker names a file, relative to docs/results, and optionally rows and columns. The text up to its end is replaced:

    <!-- table: omniglot.csv | where: method=ProtoNet;Matching, source=this library | columns: method, 5-way 1-shot -->
    <!-- end of table -->

A name with a comma is quoted, as in CSV. Commands and commits become code; rows that look alike are shown once. A row
holds the results of one run, and BOOKKEEPING says how. A published figure has its paper as `source` and no command.
"""

import csv
import sys
from pathlib import Path

# shown only where a marker names them
BOOKKEEPING = ("note", "seed", "episodes", "minutes", "command", "commit", "machine")
CODE = ("command", "commit")
START, END = "<!-- table: ", "<!-- end of table -->"


def names(text: str) -> list[str]:
    """Returns the parts of a comma-separated list."""
    return next(csv.reader([text], skipinitialspace=True), [])


def check(wanted: list[str], present: list[str], what: str, marker: str) -> None:
    """Raises ValueError if something wanted is missing."""
    if missing := [name for name in wanted if name not in present]:
        raise ValueError(f"{marker}: expected {what}, got {missing}; use some of {sorted(set(present))}")


def table(marker: str, results: Path, page: str) -> list[str]:
    """Returns the lines of the table that a marker asks for."""
    file, *parts = (part.strip() for part in marker.removeprefix(START).removesuffix("-->").split("|"))
    marker = f"{page}: {marker}"
    options = {key: names(value.strip()) for key, _, value in (part.partition(":") for part in parts)}
    present = [file] if (results / file).is_file() else [path.name for path in results.glob("*.csv")]
    check([file], present, "a file of docs/results", marker)
    check(list(options), ["where", "columns"], "options", marker)
    with (results / file).open(newline="", encoding="utf-8") as stream:
        header, *lines = csv.reader(stream)
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    for condition in options.get("where", []):
        column, _, values = condition.partition("=")
        check([column], header, f"a column of {file}", marker)
        check(values.split(";"), [row[column] for row in rows], f"values of {column!r} in the rows left", marker)
        rows = [row for row in rows if row[column] in values.split(";")]
    shown = options.get("columns", [name for name in header if name not in BOOKKEEPING])
    check(shown, header, f"columns of {file}", marker)
    cells = [[f"`{row[name]}`" if row[name] and name in CODE else row[name] for name in shown] for row in rows]
    lines = [[text.replace("|", r"\|") for text in line] for line in (shown, ["---"] * len(shown), *cells)]
    return list(dict.fromkeys(f"| {' | '.join(line)} |" for line in lines))


def render(text: str, results: Path, page: str) -> str:
    """Returns a page's text with its tables filled. Markers in fenced code stay as they are."""
    lines: list[str] = []
    marker = fence = ""
    for line in text.split("\n"):
        if not marker and line.lstrip().startswith(fence or ("```", "~~~")):
            fence = "" if fence else line.lstrip()[:3]
        elif line.startswith(START) and not fence:
            if marker:
                break
            marker = line
            lines += [marker, "", *table(marker, results, page), ""]
        if marker and line == END:
            marker = ""
        if not marker:
            lines.append(line)
    if marker:
        raise ValueError(f"{page}: {marker}: expected {END!r} below it, got {line!r}; add it")
    return "\n".join(lines)


def main(arguments: list[str], root: Path = Path(__file__).parent.parent) -> int:
    """Writes the README and pages, or with --check only names the stale ones; returns the exit code."""
    if arguments not in ([], ["--check"]):
        raise ValueError(f"expected no argument or --check, got {arguments}; leave the others out")
    stale = []
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        old, name = page.read_text(encoding="utf-8"), page.relative_to(root).as_posix()
        if (new := render(old, root / "docs" / "results", name)) != old:
            stale.append(f"{name}: stale; run `python docs/render.py`" if arguments else f"{name}: written")
            if not arguments:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale or ["all tables are those of docs/results"]))
    return int(bool(arguments and stale))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as failure:
        sys.exit(str(failure))
