"""All five views, by mouse and by keyboard."""

import io
import os
import re
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from benchmarks.deployment import Deployment, wait
from registry.keys import Keys, Scope
from registry.settings import Settings
from tests.support.archives import zipped

pytestmark = pytest.mark.browser

VIEWS = ("budgets", "models", "playground", "tasks", "health")


@pytest.fixture(scope="module")
def models(shipped: Deployment) -> list[str]:
    return [shipped.ready_model(max_mem_gb=gb) for gb in (4, 0.004)]


def heading(page: Page, name: str) -> None:
    expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()


def press(page: Page | Locator, name: str) -> None:
    page.get_by_role("button", name=name).click()


def visit(page: Page, view: str) -> None:
    page.goto(f"/#{view}")
    heading(page, "Your images" if view == "tasks" else view.capitalize())


def test_a_budget_is_dragged_and_deployed(page: Page) -> None:
    page.goto("/")
    heading(page, "Budgets")
    plan = page.get_by_role("heading", level=2).first
    expect(plan).to_contain_text("fits: ")
    best = plan.inner_text().split(" fits: ")[0].strip()
    samples = page.get_by_role("img", name=re.compile(f"a sample of {best}"))
    expect(samples.first).to_be_visible()
    memory = page.get_by_label("Memory, dragged")
    box = memory.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.1, box["y"] + box["height"] / 2)
    expect(plan).not_to_contain_text(best)
    press(page, "Deploy this size")
    expect(page).to_have_url(re.compile("#models/m-"))
    expect(page.locator("main .state").first).to_have_text("ready", timeout=90_000)
    expect(page.get_by_text("budget kept")).to_be_visible()
    expect(page.get_by_text("Nothing to train")).to_be_visible()
    press(page, "Sample every class")
    expect(page.locator(".images img")).to_have_count(10)
    nobody_is_shut_out(page)


def test_a_key_lets_the_page_in(url: str, settings: Settings, browser: Browser) -> None:
    _, key = Keys(settings.resolved_keys_file).create("shop", [Scope.DEPLOY])
    page = browser.new_page(base_url=url)
    page.goto("/")
    heading(page, "API key")
    page.get_by_label("Key").fill("wrong")
    press(page, "Sign in")
    expect(page.get_by_role("alert")).to_contain_text("no such API key")
    nobody_is_shut_out(page)
    page.get_by_label("Key").fill(key)
    press(page, "Sign in")
    heading(page, "Budgets")
    press(page, "Sign out shop")
    heading(page, "API key")
    page.close()


def test_a_model_is_refined_until_it_is_stopped(page: Page) -> None:
    page.goto("/")
    page.get_by_text("Images at once, steps, guidance").click()
    page.get_by_label("Refine every weight").select_option("For ten minutes")
    expect(page.get_by_text(re.compile("^materialised, "))).to_be_visible()
    press(page, "Deploy this size")
    stop = page.get_by_role("button", name="Stop refining, keep the best")
    expect(stop).to_be_visible(timeout=120_000)
    nobody_is_shut_out(page)
    stop.click()
    expect(page.locator("main .state").first).to_have_text("ready", timeout=90_000)
    expect(page.get_by_text(re.compile(r"refined for .*: held-out loss .* → "))).to_be_visible()
    expect(stop).to_have_count(0)


def test_a_task_is_sent_and_a_model_made_of_it(page: Page) -> None:
    visit(page, "tasks")
    page.get_by_label("Archive").set_input_files(
        {"name": "shapes.zip", "mimeType": "application/zip", "buffer": shapes()}
    )
    page.get_by_label("Name").fill("shapes")
    press(page, "Send")
    task = page.get_by_role("article", name="shapes")
    expect(task).to_contain_text("images16")
    picture = task.get_by_role("img", name="Some images of each class of shapes")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth / image.naturalHeight") == 8 / 2
    press(task, "Make a model")
    heading(page, "Budgets")
    expect(page.get_by_label("Classes")).to_have_value(re.compile("^t-"))
    press(page, "Deploy this size")
    expect(page.get_by_text("its classes are served once they are learned")).to_be_visible()
    expect(page.locator("main .state").first).to_have_text("ready", timeout=150_000)
    press(page, "Sample every class")
    expect(page.locator(".images img")).to_have_count(2)
    page.goto("/#models")
    expect(page.get_by_role("img", name="square, an image of its task")).to_be_visible()
    page.goto("/#tasks")
    page.on("dialog", lambda dialog: dialog.accept())
    press(task, "Delete")
    expect(task).to_have_count(0)


def shapes() -> bytes:
    """Archive of eight squares and eight stripes, a folder each."""
    files = {}
    for i in range(8):
        square, stripe = np.zeros((2, 28, 28), np.uint8)
        square[i : i + 16, i : i + 16] = stripe[:, i : i + 8] = 255
        for name, pixels in (("square", square), ("stripe", stripe)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            files[f"{name}/{i}.png"] = png.getvalue()
    return zipped(files).getvalue()


def test_a_budget_by_keyboard_and_one_that_nothing_keeps(page: Page) -> None:
    page.goto("/#budgets")
    plan = page.get_by_role("heading", level=2).first
    expect(plan).to_contain_text("fits: ")
    best = plan.inner_text().split(" fits: ")[0].strip()
    memory = page.get_by_label("Memory, dragged")
    memory.focus()
    page.keyboard.press("Home")
    expect(page.get_by_role("alert")).to_contain_text("No size fits")
    nobody_is_shut_out(page)
    expect(page.get_by_role("button", name="Deploy this size")).to_be_disabled()
    page.keyboard.press("End")
    expect(plan).to_contain_text(best)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Percentile of the latency")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("textbox", name="Latency")).to_be_focused()
    page.keyboard.type("0.2 ms")
    expect(page.get_by_role("alert")).to_contain_text("No size fits")
    press(page, "Take ")
    expect(page.get_by_role("button", name="Deploy this size")).to_be_enabled()
    page.get_by_role("textbox", name="Latency").focus()
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("textbox", name="Memory")).to_be_focused()
    card = page.get_by_role("button", name=re.compile("^Smallest"))
    card.focus()
    page.keyboard.press("Enter")
    expect(card).to_have_attribute("aria-pressed", "true")
    deploy = page.get_by_role("button", name="Deploy this size")
    expect(deploy).to_be_enabled()
    point = page.get_by_role("button", name=re.compile("^depth .* quality")).last
    point.focus()
    page.keyboard.press("Enter")
    expect(card).to_have_attribute("aria-pressed", "false")


def test_from_a_card_to_a_comparison_by_keyboard_alone(page: Page, models: list[str]) -> None:
    def enter(name: str | re.Pattern[str], role: str = "button", key: str = "Enter") -> None:
        tab_to(page, page.get_by_role(role, name=name).first)
        page.keyboard.press(key)

    page.goto("/")
    expect(page.get_by_role("button", name=re.compile("^Smallest"))).to_be_visible()
    enter(re.compile("^Smallest"))
    enter("Deploy this size")
    expect(page).to_have_url(re.compile("#models/m-"))
    sample = page.get_by_role("button", name="Sample every class")
    expect(sample).to_be_enabled(timeout=60_000)
    enter("Sample every class")
    expect(page.locator(".images img")).to_have_count(10)
    enter("Playground", "link")
    heading(page, "Playground")
    for model in models:
        choice = page.get_by_label(re.compile(model[-4:]))
        tab_to(page, choice)
        if not choice.is_checked():
            page.keyboard.press("Space")
    enter("Generate")
    expect(page.locator("article img").first).to_be_visible()
    enter("Your images", "link")
    heading(page, "Your images")
    enter("Try it with drawn shapes")
    expect(page.get_by_text("disc: 24")).to_be_visible()
    enter("Send")
    task = page.get_by_role("article", name="shapes")
    expect(task).to_contain_text("images72")
    page.on("dialog", lambda dialog: dialog.accept())
    tab_to(page, task.get_by_role("button", name="Delete"))
    page.keyboard.press("Enter")
    expect(task).to_have_count(0)
    enter("Health", "link")
    heading(page, "Health")


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until the target has the focus, and a ring that shows it."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            assert target.evaluate(
                "element => getComputedStyle(element).outlineStyle !== 'none'"
                " || getComputedStyle(element).boxShadow !== 'none'"
            )
            return
    raise AssertionError(f"Tab never comes to {target}")


def test_a_budget_is_typed_with_its_unit(page: Page) -> None:
    page.goto("/#budgets")
    memory = page.get_by_role("textbox", name="Memory")
    memory.fill("4 GB")
    expect(page.get_by_text(re.compile("^fits: .* of 4.00 GB"))).to_be_visible()
    memory.fill("nonsense")
    expect(memory).to_have_attribute("aria-invalid", "true")
    memory.fill("2.2 mb")
    expect(page.get_by_text(re.compile("^fits: .* of 2.20 MB"))).to_be_visible()
    page.get_by_role("button", name=re.compile("^This machine")).click()
    expect(page.get_by_text(re.compile(r"^fits: .* of \d+\.?\d* GB"))).to_be_visible()


def test_a_latency_is_of_the_percentile_that_is_chosen(page: Page, shipped: Deployment) -> None:
    page.goto("/#budgets")
    result = page.get_by_role("region", name="The size that keeps it")
    expect(result.get_by_text("latency", exact=True)).to_be_visible()
    page.get_by_label("Percentile of the latency").select_option("median")
    expect(result.get_by_text("latency, median")).to_be_visible()
    nobody_is_shut_out(page)
    press(page, "Deploy this size")
    expect(page).to_have_url(re.compile("#models/m-"))
    expect(page.get_by_text("latency, median")).to_be_visible()
    model = shipped.client.model(page.url.split("/")[-1])
    assert model.budget.latency_percentile == 50
    predicted = model.plan.predicted.latency_seconds
    shown = page.locator("dd").filter(has_text=" predicted").last
    expect(shown).to_contain_text(f"{predicted * 1000:.0f} ms")
    press(page, "Cancel")


def test_models_come_and_go_in_the_list(page: Page, shipped: Deployment, models: list[str]) -> None:
    visit(page, "models")
    fresh = shipped.client.create_model(max_mem_gb=0.005).id
    item = page.get_by_role("listitem", name=re.compile(fresh))
    expect(item).to_be_visible()
    shipped.client.wait(fresh)
    expect(item).to_contain_text("ready")
    page.get_by_label("Filter").fill("ready nothing-like-it")
    expect(item).to_have_count(0)
    page.get_by_label("Filter").fill(f"ready {fresh}")
    item.get_by_role("link").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=re.compile("^fashion · .* MB · "))).to_be_visible()
    expect(page.get_by_text(fresh).first).to_be_visible()
    with page.expect_download() as download:
        press(page, "Export for diffusers")
    with tarfile.open(download.value.path()) as tar:
        assert f"{fresh}/transformer/config.json" in tar.getnames()
    page.on("dialog", lambda dialog: dialog.accept())
    press(page, "Delete")
    heading(page, "Models")
    expect(item).to_have_count(0)


def test_a_family_is_asked_within_seconds(page: Page, shipped: Deployment) -> None:
    visit(page, "playground")
    page.get_by_text("Steps, guidance, scheduler").click()
    page.get_by_label("Family").select_option("fashion")
    page.get_by_label("Within, seconds").fill("60")
    for model in page.get_by_role("checkbox").all():
        model.uncheck()
    press(page, "Generate")
    told = page.get_by_text(re.compile(r"depth \d+ of the family, quality"))
    expect(told).to_be_visible(timeout=60_000)
    expect(page.get_by_role("img", name="Sneaker")).to_have_count(1)
    visit(page, "health")
    expect(page.get_by_role("heading", name="Elastic requests")).to_be_visible(timeout=30_000)


def test_the_same_seeds_from_two_models(page: Page, models: list[str]) -> None:
    visit(page, "playground")
    expect(page.get_by_label(re.compile(models[0][-4:]))).to_be_visible()
    for chosen in page.get_by_role("checkbox").all():
        chosen.uncheck()
    for model in models:
        page.get_by_label(re.compile(model[-4:])).check()
    page.get_by_label("Class").select_option("Sneaker")
    page.get_by_text("Steps, guidance, scheduler").click()
    page.get_by_label("Steps", exact=True).fill("60")
    page.get_by_role("spinbutton", name="Seed").fill("7")
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("progressbar").first).to_be_visible()
    nobody_is_shut_out(page)
    sneakers = page.get_by_role("img", name="Sneaker")
    expect(sneakers).to_have_count(4 * len(models), timeout=60_000)
    pictures = [image.get_attribute("src") for image in sneakers.all()]
    assert len(set(pictures)) == len(pictures)
    page.reload()
    expect(sneakers.first).to_be_visible()
    assert {image.get_attribute("src") for image in sneakers.all()} >= set(pictures), "kept"
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")
    expect(page.get_by_label(re.compile(models[1][-4:]))).to_be_checked()
    page.get_by_role("button", name="Random").click()
    expect(page.get_by_role("spinbutton", name="Seed")).not_to_have_value("7")
    page.get_by_text("Steps, guidance, scheduler").click()
    page.get_by_label("Steps", exact=True).fill("250")
    page.get_by_label("Images").fill("100")
    press(page, "Generate")
    for run in page.get_by_role("button", name="Cancel").all():
        run.click()
    cancelled = page.get_by_role("alert").filter(has_text="cancelled")
    expect(cancelled).to_have_count(len(models), timeout=60_000)


def test_health_tells_of_a_worker_that_died(page: Page, shipped: Deployment) -> None:
    page.goto("/#health")
    expect(page.get_by_text("a budget sent now becomes images")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^sample"))).to_be_visible()
    (worker,) = shipped.pids("-m worker sample")
    os.kill(worker, signal.SIGSTOP)
    try:
        expect(page.get_by_text("a worker for the queue 'sample'")).to_be_visible()
    finally:
        os.kill(worker, signal.SIGCONT)
    expect(page.get_by_text("a budget sent now becomes images")).to_be_visible()
    wait(shipped.ready)


def test_the_page_says_that_the_service_is_gone_and_comes_back(
    page: Page, shipped: Deployment
) -> None:
    page.goto("/#health")
    expect(page.get_by_text("a budget sent now becomes images")).to_be_visible()
    for api in shipped.pids("-m service"):
        os.kill(api, signal.SIGSTOP)
    gone = page.get_by_text("The service does not answer")
    try:
        expect(gone).to_be_visible(timeout=5_000)
        nobody_is_shut_out(page)
    finally:
        for api in shipped.pids("-m service"):
            os.kill(api, signal.SIGCONT)
    expect(gone).to_have_count(0)
    expect(page.get_by_text("a budget sent now becomes images")).to_be_visible()


def test_a_folder_and_drawn_shapes_are_packed_in_the_browser(
    page: Page, tmp_path: Path, shipped: Deployment
) -> None:
    visit(page, "tasks")
    with zipfile.ZipFile(io.BytesIO(shapes())) as archive:
        archive.extractall(tmp_path / "mine")
    page.get_by_label("Folder").set_input_files(tmp_path / "mine")
    expect(
        page.get_by_text(re.compile("square: 8 · stripe: 8|stripe: 8 · square: 8"))
    ).to_be_visible()
    press(page, "Only look at what is in it")
    expect(page.get_by_role("status", name="What is in it")).to_contain_text("square: 8")
    press(page, "Take it back")
    press(page, "Try it with drawn shapes")
    expect(page.get_by_text("disc: 24")).to_be_visible()
    nobody_is_shut_out(page)
    press(page, "Send")
    task = page.get_by_role("article", name="shapes")
    expect(task).to_contain_text("images72")
    page.on("dialog", lambda dialog: dialog.accept())
    press(task, "Delete")
    expect(task).to_have_count(0)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_nobody_is_shut_out(page: Page, models: list[str], view: str, colours: str) -> None:
    page.emulate_media(color_scheme=colours)
    visit(page, view)
    page.wait_for_timeout(500)
    nobody_is_shut_out(page)


def nobody_is_shut_out(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []


def test_every_view_fits_a_narrow_screen(page: Page, models: list[str]) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for view in VIEWS:
        visit(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        expect(page.locator("nav [aria-current]")).to_be_in_viewport(ratio=0.99)
