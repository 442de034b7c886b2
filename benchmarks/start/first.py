"""A fresh clone: seconds to install, from there to the first image, and of a second start."""

import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.deployment import Deployment, FreshClone, wait
from benchmarks.parts import Figures, say


def idle() -> Figures:
    with FreshClone() as clone:
        began = time.perf_counter()
        clone.make(".venv/installed")
        install_seconds = time.perf_counter() - began
        first, parts = first_image(clone)
        packages = list((clone.root / ".venv").glob("lib/python*/site-packages/*.dist-info"))
        clone.client.wait(next(clone.client.models()).id)
        clone.run("down")
        second, second_parts = first_image(clone)
        compiled = "kernels ready" in (clone.var / "logs" / "sample-worker.log").read_text()
        return {
            "install_seconds": round(install_seconds, 1),
            "installed_bytes": _bytes(clone.root / ".venv"),
            "installed_packages": len(packages),
            "first_image_seconds": round(first, 1),
            "first_image_parts": parts,
            "second_start_seconds": round(second, 1),
            "second_start_parts": second_parts,
            "compiled_in_the_minute_between": compiled,
        }


def busy() -> Figures:
    """The same beside a process that takes a core."""
    with Deployment() as deployment, core_taken():
        seconds, parts = first_image(deployment)
    return {"first_image_busy_seconds": round(seconds, 1), "first_image_busy_parts": parts}


def first_image(deployment: Deployment) -> tuple[float, Figures]:
    """Seconds from `fineserve up` to a picture over HTTP, and those of each step."""
    began = time.perf_counter()
    command = [str(deployment.bin / "fineserve"), "up"]
    with subprocess.Popen(
        command, cwd=deployment.root, env=deployment.environment, stdout=subprocess.DEVNULL
    ) as up:
        seconds, parts = until_picture(deployment.http, began)
        up.wait()
    return seconds, parts


def until_picture(http: httpx.Client, began: float) -> tuple[float, Figures]:
    """Seconds since `began` until the service of `http` makes a picture, and those of each step.

    By its newest model, or one of 4 GB where it has none.
    """
    wait(lambda: _ready(http), 600)
    parts = {"ready": round(time.perf_counter() - began, 1)}
    models = http.get("/models").json()["models"]
    model = (models[0] if models else http.post("/models", json={"max_mem_gb": 4}).json())["id"]
    parts["model"] = round(time.perf_counter() - began, 1)
    wait(lambda: picture(http, model), 600)
    seconds = time.perf_counter() - began
    say("first image", seconds=round(seconds, 1), **parts)
    return seconds, parts


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def picture(http: httpx.Client, model: str) -> bool:
    """Whether it makes four images of a model, now."""
    try:
        body = {"model": model, "n": 4}
        answer = http.post("/generate", json=body, headers={"accept": "image/png"})
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and answer.content.startswith(b"\x89PNG")


@contextmanager
def core_taken() -> Iterator[None]:
    """Beside it a process computes all the time."""
    process = multiprocessing.get_context("spawn").Process(target=_compute, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _compute() -> None:
    while True:
        sum(range(10_000))


def _bytes(directory: Path) -> int:
    return sum(p.lstat().st_size for p in directory.rglob("*") if p.is_file())
