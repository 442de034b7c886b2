"""A real browser on a real deployment."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.integration.conftest import Deployment

CHROMIUM = "/usr/bin/chromium"
FAMILIES = Path(__file__).parent.parent.parent / "families"


@pytest.fixture(scope="session")
def served() -> Iterator[Deployment]:
    """With the shipped family; one deployment for all tests: they only add models."""
    var = Path(tempfile.mkdtemp(prefix="fineserve-"))
    deployment = Deployment(var, FAMILIES)
    deployment.environment |= {"FINESERVE_RETRAINING_STEPS": "40"}
    try:
        up = deployment.run("up")
        assert up.returncode == 0, up.stdout + up.stderr
        yield deployment
    finally:
        deployment.http.close()
        for pid in deployment.pids():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(var, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(served: Deployment, browser: Browser) -> Iterator[Page]:
    """Anything that the page writes to the console as an error fails the test."""
    context = browser.new_context(base_url=str(served.http.base_url))
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert errors == []
