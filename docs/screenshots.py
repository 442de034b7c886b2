"""Write docs/figures/page-*.png, what the page looks like: `make screenshots`."""

import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.deployment import CHROMIUM, Deployment

FIGURES = Path(__file__).parent / "figures"
LOOKS = {"light": ("light", 1280), "dark": ("dark", 1280), "narrow": ("light", 390)}
COLOURS = 128
SETTLED_MILLISECONDS = 1500


def main() -> None:
    with Deployment() as deployment, sync_playwright() as playwright:
        deployment.up()
        model = deployment.ready_model(max_mem_gb=4)
        deployment.ready_model(max_mem_gb=0.002)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for look, (colours, width) in LOOKS.items():
            _look(chromium, deployment, model, look, colours, width)
        chromium.close()


def _look(
    chromium: Browser, deployment: Deployment, model: str, look: str, colours: str, width: int
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800}, base_url=deployment.url)
    page.emulate_media(color_scheme=colours)
    page.goto("/#health")  # its lines take a while
    page.goto("/#budgets")
    page.get_by_role("button", name="Balanced").click()
    _keep(page, f"budgets-{look}")
    page.goto("/#models")
    _keep(page, f"models-{look}")
    page.goto(f"/#models/{model}")
    page.get_by_role("button", name="Sample every class").click()
    page.locator(".images img").first.wait_for()
    _keep(page, f"model-{look}")
    page.goto("/#playground")
    for choice in page.get_by_role("checkbox").all():
        choice.check()
    page.get_by_role("button", name="Generate").click()
    page.locator(".images img").nth(19).wait_for()
    _keep(page, f"playground-{look}")
    page.goto("/#tasks")
    page.get_by_role("button", name="Try it with drawn shapes").click()
    page.get_by_text("disc: 24").wait_for()
    _keep(page, f"tasks-{look}")
    page.goto("/#health")
    _keep(page, f"health-{look}")
    page.close()


def _keep(page: Page, name: str) -> None:
    page.wait_for_timeout(SETTLED_MILLISECONDS)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    # others lose a state's dot among the greys
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(FIGURES / f"page-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
