"""Check 5: from `make up` to images by the page's sliders, in a fresh clone; and how it looks.

Screenshots of every view, light, dark and narrow, go to docs/figures.
"""

import re
import time
from pathlib import Path
from statistics import median

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.deployment import CHROMIUM, FreshClone
from benchmarks.parts import REPOSITORY, Figures

FIGURES = REPOSITORY / "docs" / "figures"
VIEWS = ("budgets", "models", "playground", "tasks", "health")
LOADS = 5
PATIENCE_MS = 120_000
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 860}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 860}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 380, "height": 800}},
}


def measure() -> Figures:
    started = time.perf_counter()
    with FreshClone() as clone, sync_playwright() as playwright:
        up_seconds = clone.make("up")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=clone.url, **LOOKS["light"])
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        images_seconds = _deploy_and_sample(page)
        clone.make("down")
        stranger_seconds = time.perf_counter() - started
        clone.make("up")
        loads = [_load(browser, clone.url) for _ in range(LOADS)]
        violations = _pictures(browser, clone.url)
        browser.close()
    return {
        "up_seconds": round(up_seconds, 1),
        "slider_to_images_seconds": round(images_seconds, 1),
        "stranger_seconds": round(stranger_seconds, 1),
        "page_first_paint_seconds": round(median(paint for paint, _ in loads), 3),
        "page_interactive_seconds": round(median(plan for _, plan in loads), 3),
        "axe_serious": len(violations),
        "axe_violations": violations,
    }


def _deploy_and_sample(page: Page) -> float:
    """Drag, deploy, and wait for the first images."""
    page.goto("/")
    memory = page.get_by_label("Memory")
    expect(page.get_by_role("button", name="Deploy this size")).to_be_enabled()
    started = time.perf_counter()
    box = memory.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Deploy this size").click()
    page.get_by_role("button", name="Sample every class").click()
    expect(page.locator(".images img")).to_have_count(10)
    took = time.perf_counter() - started
    expect(page.locator("main .state").first).to_have_text("ready")
    return took


def _load(browser: Browser, url: str) -> tuple[float, float]:
    """Seconds until something is painted, and until the plan for the sliders is shown."""
    page = browser.new_page(base_url=url)
    page.goto("/")
    expect(page.get_by_role("button", name="Deploy this size")).to_be_enabled()
    plan = float(page.evaluate("performance.now()"))
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    first = float(page.evaluate(paint))
    page.close()
    return first / 1000, plan / 1000


def _pictures(browser: Browser, url: str) -> list[str]:
    """Serious violations that axe finds."""
    FIGURES.mkdir(exist_ok=True)
    found: list[str] = []
    for look, options in LOOKS.items():
        page = browser.new_page(base_url=url, **options)
        page.goto("/#models")
        model = page.get_by_role("rowheader").get_by_role("link").first.get_attribute("href")
        for name, address in (*((view, f"#{view}") for view in VIEWS), ("model", str(model))):
            page.goto(f"/{address}")
            _settle(page, name)
            page.screenshot(path=FIGURES / f"page-{name}-{look}.png", full_page=True)
            found += [
                f"{name} {look}: {violation['id']}"
                for violation in Axe().run(page).response["violations"]
                if violation["impact"] in ("serious", "critical")
            ]
        page.close()
    _shrink()
    return found


def _settle(page: Page, view: str) -> None:
    if view == "playground":
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_text(re.compile("to sample"))).to_be_visible()
    elif view == "model":
        page.get_by_role("button", name="Sample every class").click()
        expect(page.locator(".images img")).to_have_count(10)
    page.wait_for_timeout(800)


def _shrink() -> None:
    """Reduce screenshots to palettes of 128 colours: a third of the bytes."""
    from PIL import Image

    for path in Path(FIGURES).glob("page-*.png"):
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
