"""The page in a real browser: drawn on with a pointer, saved, restarted, loaded; looks, console and requests."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import (
    browser,
    console_errors,
    contrast_failures,
    needs_browser,
    no_overflow,
    requests_elsewhere,
    set_theme,
    set_width,
)

pytestmark = needs_browser
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

# strokes of points in a square of 0 to 1
SHAPES = {
    "cross": [[(0.2, 0.2), (0.8, 0.8)], [(0.8, 0.2), (0.2, 0.8)]],
    "box": [[(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75), (0.25, 0.25)]],
    "lambda": [[(0.5, 0.15), (0.2, 0.85)], [(0.5, 0.15), (0.8, 0.85)]],
    "zigzag": [[(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)]],
    "comb": [[(0.1, y), (0.9, y)] for y in (0.15, 0.32, 0.5, 0.68, 0.85)] + [[(0.1, 0.15), (0.1, 0.85)]],
}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the app, started as a user does."""
    command = [sys.executable, "-m", "pml_fewshot.app", "--port", "0", "--sets", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), process.stderr.read()
            yield line.split()[1]
        finally:
            process.terminate()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


class Page:
    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def wait(self, what: Callable[[], Any]) -> Any:
        """The first true value within half a minute: a loaded machine takes seconds for what is done at once."""
        for _ in range(600):
            if value := what():
                return value
            time.sleep(0.05)
        raise AssertionError(f"still not: {what.__name__}; {self['alert'].text!r} {self['answer'].text!r}")

    def draw(self, canvas: str, shape: str, size: float = 1.0, shift: float = 0.0) -> None:
        """With the mouse: the browser makes pointer events of it."""
        box = self.driver.execute_script(
            "const e = document.getElementById(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
            canvas,
        )

        def send(kind: str, point: tuple[float, float]) -> None:
            x, y = (
                start + length * (0.5 + (value - 0.5) * size + shift)
                for start, length, value in zip(box[:2], box[2:], point, strict=True)
            )
            event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

        for first, *rest in SHAPES[shape]:
            send("mousePressed", first)
            for before, after in zip([first, *rest], rest, strict=False):
                for step in (1 / 3, 2 / 3, 1.0):
                    send("mouseMoved", tuple(a + (b - a) * step for a, b in zip(before, after, strict=True)))
            send("mouseReleased", rest[-1])

    def examples(self) -> int:
        return len(self.driver.find_elements("css selector", ".thumb"))

    def teach(self, name: str, **how: float) -> None:
        before = self.examples()
        self["name"].clear()
        self["name"].send_keys(name)
        self.draw("teach-canvas", name, **how)
        self["add"].click()
        self.wait(lambda: self.examples() == before + 1)

    def ask(self, shape: str, **how: float) -> str:
        """The verdict on a new drawing."""
        self["ask-clear"].click()
        self.settled()
        self.draw("ask-canvas", shape, **how)
        self.settled()
        return self["verdict"].text

    def settled(self) -> None:
        """Once the answer is to all of the drawing: no question waits or is under way."""
        self.wait(lambda: self["answer"].get_attribute("aria-busy") == "false")

    def alert(self, part: str) -> str:
        return self.wait(
            lambda: self["alert"].is_displayed() and part in self["alert-text"].text and self["alert"].text
        )


@pytest.mark.long
def test_classes_are_taught_asked_saved_and_loaded(tmp_path: Path) -> None:
    with browser() as driver:
        page = Page(driver)
        with served(tmp_path / "sets") as address:
            driver.get(address)
            page.wait(lambda: page["advice"].text)
            for name in ("cross", "box", "lambda"):
                page.teach(name)
                page.teach(name, size=0.8, shift=0.03)
            assert page.ask("box", size=0.9, shift=-0.02) == "box"
            assert page.ask("comb") == "none of these"
            page.draw("teach-canvas", "zigzag")
            page["name"].clear()
            page["name"].send_keys("zigzag")
            before = page.examples()
            driver.execute_script("const add = document.getElementById('add'); add.click(); add.click()")
            page.wait(lambda: page.examples() == before + 1)  # a double click teaches once
            page.teach("zigzag", size=0.8)
            assert page.ask("zigzag", size=0.9) == "zigzag"
            answer = page["answer"].text
            page["set-name"].send_keys("my shapes")
            page["save-form"].find_element("tag name", "button").click()
            page.wait(lambda: "Saved as" in page["saved-state"].text)
            for theme in ("light", "dark"):
                set_theme(driver, theme)
                for width in (390, 1440):
                    set_width(driver, width)
                    assert no_overflow(driver) == []
                    assert contrast_failures(driver) == []
            assert console_errors(driver) == []
            assert requests_elsewhere(driver) == []
        with served(tmp_path / "sets") as address:
            driver.get(address)
            page.wait(lambda: page["sets"].text).startswith("my shapes")
            page["sets"].find_element("tag name", "button").click()
            page.wait(lambda: page.examples() == 8)
            assert page.ask("zigzag", size=0.9) == "zigzag"
            assert page["answer"].text == answer
            assert console_errors(driver) == []
            bad_files_are_refused_with_a_message(page, tmp_path)


def bad_files_are_refused_with_a_message(page: Page, folder: Path) -> None:
    (folder / "notes.png").write_text("no image at all")
    Image.effect_noise((400, 400), 80).save(folder / "whole.png")
    (folder / "broken.png").write_bytes((folder / "whole.png").read_bytes()[:40_000])
    (folder / "huge.png").write_bytes(bytes(30 * 2**20))
    page["name"].send_keys("x")
    for name, message in (
        ("notes.png", "a file of another kind"),
        ("broken.png", "expected a readable image"),
        ("huge.png", "at most 20 MB"),
    ):
        page["photos"].send_keys(str(folder / name))
        page.alert(message)
    # the server says it by itself, and a browser that is still sending hears it
    status = page.driver.execute_async_script(
        "const form = new FormData(); form.append('picture', new Blob([new Uint8Array(30 << 20)]), 'huge.png');"
        "fetch('/api/classify', {method: 'POST', body: form}).then(r => r.json().then(a => [r.status, a.error]))"
        ".catch(e => [0, e.message]).then(arguments[0])"
    )
    assert status[0] == 413
    assert "at most 20 MB" in status[1]
    assert page.examples() == 8
