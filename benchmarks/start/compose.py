"""The same by docker compose: a first start, a second one, and a sampling container killed."""

import os
import signal
import time

import httpx

from benchmarks.deployment import wait
from benchmarks.operate.compose import Stack, stack
from benchmarks.parts import Figures
from benchmarks.start.first import picture, until_picture


def measure() -> Figures:
    with stack() as made, httpx.Client(base_url=made.url, timeout=120, trust_env=False) as http:
        began = time.perf_counter()
        made.up()
        first, parts = until_picture(http, began)
        model = http.get("/models").json()["models"][0]["id"]
        wait(lambda: http.get(f"/models/{model}").json()["status"] == "ready", 600)
        made.compose("down", "--timeout", "60")  # the volumes stay
        began = time.perf_counter()
        made.up()
        second, second_parts = until_picture(http, began)
        return {
            "compose_first_image_seconds": round(first, 1),
            "compose_first_image_parts": parts,
            "compose_second_start_seconds": round(second, 1),
            "compose_second_start_parts": second_parts,
            "compose_recovery_seconds": round(_recovery(made, http, model), 1),
            "stand_ins": made.stand_ins,
        }


def _recovery(made: Stack, http: httpx.Client, model: str) -> float:
    """Seconds from the end of the sampling container to the next picture.

    The signal comes from outside: what `docker kill` ends stays down, as if somebody wished it.
    """
    container = made.compose("ps", "--quiet", "worker-sample").strip()
    process = made.engine.docker("inspect", "--format", "{{.State.Pid}}", container)
    began = time.perf_counter()
    os.kill(int(process), signal.SIGKILL)
    wait(lambda: picture(http, model), 600)
    return time.perf_counter() - began
