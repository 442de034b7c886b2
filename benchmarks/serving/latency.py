"""Checks 5 and 6: what HTTP and the queue add, and a short request behind ten long ones."""

import threading
import time

import numpy as np

from benchmarks.serving.subjects import STEPS, Figures, Served, say

REQUESTS = 200
LONG_REQUESTS, LONG_STEPS, SHORT_STEPS = 10, 200, 10
SHORT_RUNS = 10


def measure(ours: Served) -> Figures:
    """Of a deployment that has nothing else to do."""
    figures = {**_overhead(ours), **_behind_long_ones(ours)}
    say("latency", figures)
    return figures


def _generate(ours: Served, steps: int, number: int) -> tuple[float, float]:
    """Seconds until the answer, and those of it that the engine had the request."""
    body = {"model": ours.one, "class_labels": [number % 10], "seed": number}
    started = time.perf_counter()
    answer = ours.deployment.http.post("/generate", json={**body, "num_inference_steps": steps})
    took = time.perf_counter() - started
    return took, answer.raise_for_status().json()["seconds"]["sampling"]


def _overhead(ours: Served) -> Figures:
    for number in range(10):
        _generate(ours, STEPS, number)
    added = [took - bare for took, bare in (_generate(ours, STEPS, n) for n in range(REQUESTS))]
    return {
        "overhead_p50_seconds": round(float(np.quantile(added, 0.5)), 4),
        "overhead_p95_seconds": round(float(np.quantile(added, 0.95)), 4),
    }


def _behind_long_ones(ours: Served) -> Figures:
    alone = [_generate(ours, SHORT_STEPS, n)[0] for n in range(SHORT_RUNS)]
    ended: list[float] = []

    def long_one(number: int) -> None:
        _generate(ours, LONG_STEPS, number)
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=long_one, args=(n,)) for n in range(LONG_REQUESTS)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    behind = []
    while not ended and len(behind) < SHORT_RUNS:
        behind.append(_generate(ours, SHORT_STEPS, len(behind))[0])
    for thread in threads:
        thread.join()
    return {
        "short_alone_seconds": round(float(np.median(alone)), 3),
        "short_behind_long_seconds": round(float(np.median(behind)), 3),
        "short_runs_before_any_long_one_ended": len(behind),
    }
