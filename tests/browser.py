"""A headless Chromium for tests of pages: what it shows, says on its console, and fetches."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from json import loads
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = ", ".join(
    name
    for name, there in (("chromium", CHROMIUM), ("chromedriver", DRIVER), ("selenium", find_spec("selenium")))
    if not there
)
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs a browser: no {MISSING} here")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"),
)


@contextmanager
def browser(width: int = 1440, height: int = 1000) -> Iterator[Any]:
    """Yields a selenium driver with a profile of its own that records its console and its requests; skips without."""
    if MISSING:
        pytest.skip(f"needs a browser: no {MISSING} here")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for option in (*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = Chrome(options=options, service=ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def set_width(driver: Any, width: int, height: int = 1000) -> None:
    """The page as wide as this, below what a window can be too; touch and a phone's scale are not imitated."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def set_theme(driver: Any, theme: str) -> None:
    """The page as somebody sees it who prefers "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": theme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def no_overflow(driver: Any) -> list[str]:
    """What sticks out of the page to the right so that it scrolls sideways; empty where all is well."""
    return driver.execute_script("""
        const page = document.documentElement, wide = page.clientWidth;
        if (page.scrollWidth <= wide) return [];
        const out = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > wide + 0.5);
        const names = out.slice(0, 9).map(e => `${e.tagName} ${e.id} ${e.className}`);
        return [`${page.scrollWidth} of ${wide} px`, ...names];
    """)


def contrast_failures(driver: Any) -> list[str]:
    """Visible texts with less contrast to their background than WCAG's AA asks for: 4.5, large ones 3.

    Colors with alpha and the opacity of elements are laid over what is behind them; background images are not seen.
    Disabled controls are exempt, as in WCAG.
    """
    return driver.execute_script("""
        const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
        const rgba = css => {                                        // of any CSS color, as Chromium paints it
            pen.clearRect(0, 0, 1, 1); pen.fillStyle = css; pen.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
        };
        const over = ([r, g, b, a], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
        const canvas = matchMedia("(prefers-color-scheme: dark)").matches
            && getComputedStyle(document.documentElement).colorScheme.includes("dark") ? [18, 18, 18] : [255, 255, 255];
        const parents = e => { const all = []; for (; e; e = e.parentElement) all.unshift(e); return all; };
        const behind = element => parents(element).reduce(
            (below, e) => over(rgba(getComputedStyle(e).backgroundColor), below), canvas);
        const light = color => {
            const [r, g, b] = color.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => {
            const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return (x + 0.05) / (y + 0.05);
        };
        const failures = [];
        const check = (element, text, style) => {
            if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) return;
            if (element.closest(":disabled, [aria-disabled=true]")) return;
            const box = element.getBoundingClientRect();
            if (box.width < 2 || box.height < 2) return;             // for screen readers alone
            const below = behind(element);
            const [r, g, b, a] = rgba(element.closest("svg") ? style.fill : style.color);
            const opacity = parents(element).reduce((all, e) => all * getComputedStyle(e).opacity, 1);
            const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
            const found = contrast(over([r, g, b, a * opacity], below), below);
            if (found >= (large ? 3 : 4.5)) return;
            failures.push(`${found.toFixed(2)}: ${element.tagName} "${text.slice(0, 40)}"`);
        };
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const element = walker.currentNode.parentElement;
            if (!["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE", "OPTION"].includes(element.tagName))
                check(element, walker.currentNode.data.trim(), getComputedStyle(element));
        }
        for (const field of document.querySelectorAll("input, textarea, select")) {
            check(field, field.value, getComputedStyle(field));
            if (!field.value) check(field, field.placeholder, getComputedStyle(field, "::placeholder"));
        }
        return [...new Set(failures)];
    """)


def console_errors(driver: Any, refused_requests: bool = True) -> list[str]:
    """Errors on the console since the last call; without `refused_requests` no answers such as 404 and 413."""
    return [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE" and (refused_requests or entry["source"] != "network")
    ]


def requests_elsewhere(driver: Any) -> list[str]:
    """Addresses that were fetched since the last call from another place than that of the page: network or file."""
    own = urlsplit(driver.current_url)
    events = [loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    sent += [each["params"]["url"] for each in events if each["method"] == "Network.webSocketCreated"]
    return [
        url
        for url in sent
        if urlsplit(url)[:2] != own[:2] and urlsplit(url).scheme not in ("data", "blob", "about", "chrome")
    ]
