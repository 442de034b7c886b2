"""A real browser on a real deployment."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from benchmarks.deployment import CHROMIUM, Deployment
from tests.fineserve.conftest import url
from tests.integration.conftest import shipped

__all__ = ["shipped", "url"]  # for pytest to find them here


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(shipped: Deployment, browser: Browser) -> Iterator[Page]:
    """A page whose every error in the console fails the test.

    Chromium's own word of a budget that nothing keeps is none.
    """
    context = browser.new_context(base_url=str(shipped.http.base_url))
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def note(said: ConsoleMessage) -> None:
        if said.type == "error" and "status of 422" not in said.text:
            errors.append(said.text)

    page.on("console", note)
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert errors == []
