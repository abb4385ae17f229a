"""Takes the screenshots of reports in docs/how-to/reports.md, light and dark, with a headless Chromium.

    python docs/screenshots.py report=runs/quickstart report-maml=runs/glyphs_maml report-sweep=runs/losses

Names are those of the pictures; each shows its report starting at the section that SECTIONS gives.
"""

import argparse
import json
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests

from tests.browser import browser, set_theme, set_width

PICTURES = Path(__file__).parent / "pictures"
WIDTH, HEIGHT = 1100, 1000
SECTIONS = {"report": "", "report-maml": "Training", "report-sweep": "Results"}  # the first one from the top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", metavar="NAME=RUN", help="a picture's name and the folder of its report")
    given = [text.partition("=")[::2] for text in parser.parse_args().reports]
    figures = json.loads((PICTURES / "figures.json").read_text())
    with browser(WIDTH, HEIGHT) as driver:
        set_width(driver, WIDTH, HEIGHT)
        for name, folder in given:
            for theme in ("light", "dark"):
                set_theme(driver, theme)
                driver.get((Path(folder).resolve() / "report.html").as_uri())
                top = driver.execute_script(
                    "const found = [...document.querySelectorAll('h2')].find(e => e.textContent == arguments[0]);"
                    "return found ? found.closest('section').getBoundingClientRect().top + scrollY : 0",
                    SECTIONS[name],
                )
                clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT, "scale": 1}
                options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
                shot = b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
                few = Image.open(BytesIO(shot)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
                few.save(PICTURES / f"{name}-{theme}.png", optimize=True)
            figures[name] = {"command": "python docs/screenshots.py", "report": Path(folder).name}
    (PICTURES / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
