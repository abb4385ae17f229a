"""Reports in a real browser: they load nothing, fit a phone and a desk, and can be read in both themes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.quickstart import CONFIG
from pml_fewshot import run, sweep
from pml_fewshot.report import page, subject
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
from tests.tiny_experiments import TINY_EXPERIMENTS, few_glyphs

pytestmark = [needs_browser, pytest.mark.long]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the quickstart after two steps, on fewer letters, and of a sweep."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:  # fewer pixels and episodes, which takes less time
        patch.setattr(page, "DPI", 40)
        patch.setattr(subject, "MOST", 40)
        return written_below(folder)


def written_below(folder: Path) -> dict[str, Path]:
    quick = {"steps": 2, "num_episodes": 40, "val_episodes": 20, "data": few_glyphs}
    run(replace(CONFIG, run_dir=folder / "quickstart", **quick))
    tiny = replace(TINY_EXPERIMENTS["protonet"], steps=2)
    sweep([tiny, replace(tiny, name="<i>another</i>", steps=3, report=True)], folder / "sweep")
    return {name: folder / name / "report.html" for name in ("quickstart", "sweep")}


@pytest.mark.parametrize("name", ["quickstart", "sweep"])
def test_a_report_fits_and_can_be_read_everywhere_and_loads_nothing(
    name: str, driver: Any, reports: dict[str, Path]
) -> None:
    assert reports[name].stat().st_size < 8_000_000
    driver.get_log("performance")
    for theme in ("light", "dark"):
        set_theme(driver, theme)
        for width in (390, 1440):
            set_width(driver, width)
            driver.get(reports[name].as_uri())
            place = f"{name}, {theme}, {width} px"
            assert no_overflow(driver) == [], place
            assert contrast_failures(driver) == [], place
            dark = theme == "dark"
            images = driver.execute_script("""
                const images = [...document.images].filter(image => image.checkVisibility());
                return images.map(image => [image.naturalWidth, image.alt, image.currentSrc.slice(0, 14)]);
            """)
            assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") is dark, place
            assert images, place
            for natural_width, alt, source in images:
                assert (natural_width > 0, len(alt) > 30, source) == (True, True, "data:image/png"), place
    assert console_errors(driver) == []
    assert requests_elsewhere(driver) == []


def test_the_map_shows_the_image_and_class_of_a_point(driver: Any, reports: dict[str, Path]) -> None:
    set_width(driver, 1440)
    driver.get(reports["quickstart"].as_uri())
    # the first point's place on the screen, as Bokeh maps it
    x, y = driver.execute_script("""
        const view = Object.values(Bokeh.index.roots ?? Bokeh.index)[0];
        const points = view.model.renderers[0].data_source.data;
        const [sx, sy] = [view.frame.x_scale.compute(points.x[0]), view.frame.y_scale.compute(points.y[0])];
        view.el.scrollIntoView({block: "center"});
        const box = view.el.getBoundingClientRect();
        return [box.left + sx, box.top + sy];
    """)
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x - 3, "y": y - 3})
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    from selenium.webdriver.support.ui import WebDriverWait

    def tip(_: Any) -> Any:
        return driver.execute_script("""
            const inside = root => [...root.querySelectorAll("*")].flatMap(
                e => [e, ...e.shadowRoot ? inside(e.shadowRoot) : []]);
            const found = inside(document).filter(e => e.tagName === "IMG" && e.width === 84)[0];
            return found && [found.src.slice(0, 21), found.parentElement.innerText.trim()];
        """)

    source, name = WebDriverWait(driver, 20).until(tip)
    assert source == "data:image/png;base64"
    assert name.startswith("GREEK ")


def test_without_scripts_and_on_paper_the_map_is_a_picture(driver: Any, reports: dict[str, Path]) -> None:
    driver.get(reports["quickstart"].as_uri())
    shown = "const e = document.querySelector('#embedding-map .still img'); return e.checkVisibility()"
    assert driver.execute_script(shown) is False
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert driver.execute_script(shown) is True
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
