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
        wait(deployment.ready, 600)
        parts = {"ready": round(time.perf_counter() - began, 1)}
        models = deployment.http.get("/models").json()["models"]
        model = models[0]["id"] if models else deployment.client.create_model(max_mem_gb=4).id
        parts["model"] = round(time.perf_counter() - began, 1)
        wait(lambda: _picture(deployment, model), 600)
        seconds = time.perf_counter() - began
        up.wait()
    say("first image", seconds=round(seconds, 1), **parts)
    return seconds, parts


def _picture(deployment: Deployment, model: str) -> bool:
    try:
        body = {"model": model, "n": 4}
        answer = deployment.http.post("/generate", json=body, headers={"accept": "image/png"})
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
