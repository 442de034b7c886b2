"""Seconds from `make up` in a fresh clone to the first image of somebody with the README only.

By curl and by Python as README and docs/api.md have it, by OpenAI's client, and on the page; each
deploys a model of its own for it, but for OpenAI's client, which knows those that are there.
"""

import re
import subprocess
import tempfile
import time
from pathlib import Path

import openai
from playwright.sync_api import sync_playwright

from benchmarks.deployment import CHROMIUM, Deployment, FreshClone
from benchmarks.parts import REPOSITORY, Figures, say

SAMPLED = (
    "until curl -s localhost:8000/models/$model | grep -q '\"revision\":[0-9]'; do sleep 0.1; done"
)


def measure() -> Figures:
    ways = {"curl": by_curl, "openai": by_openai, "python": by_python, "page": by_page}
    with FreshClone() as clone:
        figures: Figures = {"make_up_seconds": round(clone.make("up"), 1)}
        for name, way in ways.items():
            began = time.perf_counter()
            way(clone)
            seconds = round(time.perf_counter() - began, 1)
            figures[f"first_image_by_{name}_seconds"] = seconds
            say(name, seconds=seconds)
            if name != "curl":  # whose model is there for OpenAI's client, too
                _forget(clone)
    return figures


def _forget(deployment: Deployment) -> None:
    """What one way has deployed is not waited for by the next, which is somebody else's."""
    for model in deployment.client.models():
        deployment.client.delete_model(model.id)


def by_curl(deployment: Deployment) -> None:
    """What README shows under "From a budget to an image"."""
    readme = (REPOSITORY / "README.md").read_text()
    section = readme.split("## From a budget to an image")[1].split("\n## ")[0]
    deploy, generate = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        _shell(deployment, "\n".join((deploy, SAMPLED, generate)), Path(folder))
        _expect((Path(folder) / "images.png").read_bytes())


def by_python(deployment: Deployment) -> None:
    """The client, from an interpreter that starts."""
    code = f"""
from fineserve import Client
with Client("{deployment.url}") as client:
    model = client.create_model(max_mem_gb=0.004).id
    while client.model(model).revision is None:
        pass
    client.generate(model, class_labels=["Sneaker"], n=4, seed=1)[0].save("1.png")
"""
    with tempfile.TemporaryDirectory() as folder:
        python = deployment.bin / "python"
        subprocess.run([python, "-c", code], cwd=folder, check=True)
        _expect((Path(folder) / "1.png").read_bytes())


def by_openai(deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="any while there are no keys")
    model = client.models.list().data[0].id
    answer = client.images.generate(model=model, prompt="Sneaker", n=4)
    assert len(answer.data or []) == 4


def by_page(deployment: Deployment) -> None:
    """Open it, deploy the card that is chosen, and sample."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(base_url=deployment.url)
        page.goto("/")
        page.get_by_role("button", name="Deploy this size").click()
        page.get_by_role("button", name="Sample every class").click()
        page.locator(".images img").first.wait_for()
        chromium.close()


def _shell(deployment: Deployment, commands: str, folder: Path) -> None:
    commands = commands.replace("localhost:8000", deployment.url.removeprefix("http://"))
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=folder, check=True)


def _expect(picture: bytes) -> None:
    assert picture.startswith(b"\x89PNG"), picture[:200]
