"""How long the reports of finished runs take to draw, how large they are, and how soon a browser paints them.

    python -m experiments.speed.report_speed runs/mine runs/other --data-root DIR

Drawing begins with trained weights and loaded data, as at the end of a run. The browser is Debian's Chromium with its
driver, as in the tests; without it that column is empty.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pml_fewshot.experiment.run_report import report_run
from pml_fewshot.experiment.runs_report import trained_subject

FIRST_PAINT = """
const paint = performance.getEntriesByType("paint").find(each => each.name == "first-contentful-paint");
return paint ? paint.startTime : null;
"""


def first_paint(path: Path, driver: Any, rounds: int = 5) -> str:
    """Median milliseconds from the start of loading to the first content on the screen."""
    times = []
    for _ in range(rounds):
        driver.get(path.as_uri())
        times.append(driver.execute_script(FIRST_PAINT))
    seen = [each for each in times if each is not None]  # None if the page was read before it was painted
    return f"{statistics.median(seen):.0f} ms" if seen else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, whose reports are drawn again")
    parser.add_argument("--data-root", type=Path, help="folder of the data")
    given = parser.parse_args()
    lines = []
    for folder in given.runs:
        subject = trained_subject(folder, "", "auto", given.data_root)
        started = time.perf_counter()
        path = report_run(folder, subject)
        lines.append((folder.name, f"{time.perf_counter() - started:.1f}", f"{path.stat().st_size / 1e6:.1f}", path))
    from tests.browser import MISSING, browser  # from the checkout

    paints = [""] * len(lines)
    if not MISSING:
        with browser() as driver:
            paints = [first_paint(path.resolve(), driver) for *_, path in lines]
    print(f"{torch.get_num_threads()} threads\n\n| run | drawn in, s | size, MB | first paint |")
    print("| --- | --- | --- | --- |")
    for (name, seconds, size, _), paint in zip(lines, paints, strict=True):
        print(f"| {name} | {seconds} | {size} | {paint} |")


if __name__ == "__main__":
    main()
