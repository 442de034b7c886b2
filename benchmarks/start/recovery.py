"""Workers killed under load: seconds until the next image, and until a build goes on."""

import json
import os
import random
import signal
import statistics
import threading
import time
from datetime import datetime

import httpx

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import Figures, say

KILLS = 20
LOAD_THREADS = 2


def measure() -> Figures:
    with Deployment(retraining_steps=100_000, retraining_max_seconds=600) as deployment:
        deployment.up()
        model = deployment.client.create_model(max_mem_gb=4).id
        deployment.wait_model(model, lambda m: m.revision is not None)
        building = _build_recovery(deployment, model)
        deployment.client.cancel_model(model)
        model = deployment.client.create_model(max_mem_gb=0.0016).id
        deployment.wait_model(model, lambda m: m.revision is not None)
        sampling = _sample_recovery(deployment, model)
    return {
        "recovery_median_seconds": round(statistics.median(sampling), 2),
        "recovery_worst_seconds": round(max(sampling), 2),
        "recovery_seconds": [round(seconds, 2) for seconds in sampling],
        "build_recovery_seconds": round(building, 2),
    }


def _build_recovery(deployment: Deployment, model: str) -> float:
    """Seconds from a kill in retraining to the next step of it."""
    steps = _Steps(deployment, model)
    wait(lambda: steps.last > 20)
    (victim,) = deployment.pids("-m worker build")
    os.kill(victim, signal.SIGKILL)
    killed, before = time.monotonic(), steps.last_at
    wait(lambda: steps.last_at > before and steps.last_at > killed)
    seconds = steps.last_at - killed
    say("build goes on", seconds=round(seconds, 1))
    return seconds


class _Steps:
    """Steps that a build tells of, by a thread that follows its events."""

    def __init__(self, deployment: Deployment, model: str) -> None:
        self.last, self.last_at = 0, 0.0
        self._deployment, self._model = deployment, model
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        url = f"/models/{self._model}/events"
        with self._deployment.http.stream("GET", url, timeout=None) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: ") and "step" in line:
                    told = json.loads(line.removeprefix("data: "))
                    self.last, self.last_at = told.get("step", 0), time.monotonic()


def _sample_recovery(deployment: Deployment, model: str) -> list[float]:
    """Seconds from each kill of the sampling worker to the next image that is delivered."""
    stop, delivered = threading.Event(), [0.0]

    def load() -> None:
        while not stop.is_set():
            body = {"model": model, "n": 1, "num_inference_steps": 10}
            try:
                answer = deployment.http.post("/generate", json=body, timeout=120)
            except httpx.HTTPError:  # the next request is what counts
                continue
            if answer.status_code == 200:
                delivered[0] = time.monotonic()

    threads = [threading.Thread(target=load) for _ in range(LOAD_THREADS)]
    for thread in threads:
        thread.start()
    taken = []
    for _ in range(KILLS):
        wait(lambda: delivered[0] > time.monotonic() - 1)
        time.sleep(random.uniform(1, 3))
        (victim,) = deployment.pids("-m worker sample")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        # what was done by then does not count
        wait(lambda after=killed: delivered[0] > after + 0.2)
        taken.append(delivered[0] - killed)
        say("images again", seconds=round(taken[-1], 1), at=f"{datetime.now():%H:%M:%S}")
    stop.set()
    for thread in threads:
        thread.join()
    return taken
