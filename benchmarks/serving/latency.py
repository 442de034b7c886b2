"""Checks 5 and 6: what HTTP and the queue add, and a short request behind ten long ones."""

import json
import threading
import time
from http.client import HTTPConnection

import numpy as np

from benchmarks.parts import Figures, say
from benchmarks.serving.subjects import SAMPLING, STEPS, Served

REQUESTS = 200
LONG_REQUESTS, LONG_STEPS, SHORT_STEPS = 10, 200, 10
SHORT_RUNS = 10


def measure(ours: Served) -> Figures:
    """Latencies of a deployment that has nothing else to do."""
    figures = {**_overhead(_Client(ours)), **_behind_long_ones(ours)}
    say("latency", **figures)
    return figures


class _Client:
    """One connection that adds as little as it can: httpx alone takes half a millisecond."""

    def __init__(self, ours: Served) -> None:
        self._model = ours.one
        self._connection = HTTPConnection(ours.url.removeprefix("http://"), timeout=120)

    def generate(self, steps: int, number: int) -> tuple[float, float]:
        """Seconds until the answer, and those of it that the engine had the request."""
        request = {"model": self._model, "class_labels": [number % 10], "seed": number}
        body = json.dumps({**request, **SAMPLING, "num_inference_steps": steps})
        started = time.perf_counter()
        self._connection.request("POST", "/generate", body, {"content-type": "application/json"})
        answer = self._connection.getresponse().read()
        took = time.perf_counter() - started
        return took, json.loads(answer)["seconds"]["sampling"]


def _overhead(client: _Client) -> Figures:
    for number in range(10):
        client.generate(STEPS, number)
    added = [took - bare for took, bare in (client.generate(STEPS, n) for n in range(REQUESTS))]
    return {
        "overhead_p50_seconds": round(float(np.quantile(added, 0.5)), 4),
        "overhead_p95_seconds": round(float(np.quantile(added, 0.95)), 4),
    }


def _behind_long_ones(ours: Served) -> Figures:
    client = _Client(ours)
    alone = [client.generate(SHORT_STEPS, n)[0] for n in range(SHORT_RUNS)]
    ended: list[float] = []

    def long_one(number: int) -> None:
        _Client(ours).generate(LONG_STEPS, number)
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=long_one, args=(n,)) for n in range(LONG_REQUESTS)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    behind = []
    while not ended and len(behind) < SHORT_RUNS:
        behind.append(client.generate(SHORT_STEPS, len(behind))[0])
    for thread in threads:
        thread.join()
    return {
        "short_alone_seconds": round(float(np.median(alone)), 3),
        "short_behind_long_seconds": round(float(np.median(behind)), 3),
        "short_runs_before_any_long_one_ended": len(behind),
    }
