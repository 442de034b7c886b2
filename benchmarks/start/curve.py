"""The first ten minutes: images a second, from the first one on, and what changes meanwhile.

Of another deployment predictions are compared with the stopwatch: those of the estimate that a busy
first start made, and those of ten minutes later, in which nobody asked for anything.
"""

import json
import random
import statistics
import time
from typing import Any

import matplotlib as mpl

from benchmarks.deployment import Deployment
from benchmarks.parts import RESULTS, Figures, say
from benchmarks.start.first import core_taken

mpl.use("Agg")
from matplotlib import pyplot as plt

MINUTES = 10
PART_SECONDS = 15
PAUSE_SECONDS = 6.0
"""Pause after each burst of requests, in which the engine may measure itself."""
BUDGETS = 50
MEMORY_GB = (0.001, 0.0015, 0.002, 0.003, 0.006, 0.015)
BRIEFLY = {"retraining_steps": 2, "retraining_max_seconds": 2, "verify_seconds": 0.5}
TIMED = 5
PASSES = 3
"""Times, minutes apart, at which the stopwatch is put to each plan: a guest's machine is slower for
half a minute now and then, by a quarter for a product of two matrices."""
PICTURE = RESULTS.parent / "start" / "first-ten-minutes.png"


def measure() -> Figures:
    with Deployment(**BRIEFLY) as deployment:
        deployment.up()
        model = deployment.ready_model(max_mem_gb=4)
        began = time.monotonic()
        points, slowest, failed = _serve(deployment, model)
        log = (deployment.var / "logs" / "sample-worker.log").read_text()
        events = [json.loads(line) for line in log.splitlines() if line.startswith('{"')]
        kernels = [e for e in events if e["event"] == "kernels ready"]
        _draw(points)
    first, last = (
        statistics.mean(rate for _, rate, _ in some) for some in (points[:2], points[-4:])
    )
    return {
        "graphs": sum(e["graphs"] for e in kernels),
        "compile_seconds": round(sum(e["compile_seconds"] for e in kernels)),
        "minutes": round((time.monotonic() - began) / 60),
        "images_per_second_first": round(first, 2),
        "images_per_second_last": round(last, 2),
        "points": [[round(at), round(rate, 2), share] for at, rate, share in points],
        "slowest_request_seconds": round(slowest, 2),
        "failed_requests": failed,
    }


def estimate() -> Figures:
    """A busy first start, and ten idle minutes."""
    with Deployment(**BRIEFLY) as deployment:
        with core_taken():
            deployment.up()
            estimates = _plans(deployment, 0)
        time.sleep(60 * MINUTES)
        later = _plans(deployment, 1)
        taken: dict[str, list[float]] = {}
        for number in range(PASSES):
            say("stopwatch", budgets=len(estimates), number=number)
            for plan in {_key(plan): plan for plan in [*estimates, *later]}.values():
                taken.setdefault(_key(plan), []).append(_stopwatch(deployment, plan))
    measured = {key: statistics.median(seconds) for key, seconds in taken.items()}
    spreads = [max(seconds) / min(seconds) for seconds in taken.values() if min(seconds)]
    estimated = [(plan, measured[_key(plan)]) for plan in estimates if measured[_key(plan)]]
    ratios = {
        _key(plan): plan["predicted"]["latency_seconds"] / measured[_key(plan)]
        for plan in later
        if measured[_key(plan)]
    }
    errors = [abs(ratio - 1) for ratio in ratios.values()]
    return {
        "estimates": len(estimated),
        "interval_true_share": round(
            statistics.mean(_within(plan, seconds) for plan, seconds in estimated), 3
        ),
        "estimated_over_measured": sorted(
            round(plan["predicted"]["latency_seconds"] / seconds, 2) for plan, seconds in estimated
        ),
        "later_over_measured": {key: round(ratio, 2) for key, ratio in ratios.items()},
        "stopwatch_slowest_over_fastest": round(statistics.median(spreads), 2),
        "later_plans_estimated": sum(plan["latency_estimated"] for plan in later),
        "profile_error_after_10_min": round(statistics.median(errors), 3),
        "profile_error_after_10_min_most": round(max(errors), 3),
    }


def _serve(
    deployment: Deployment, model: str
) -> tuple[list[tuple[float, float, float]], float, int]:
    """(Seconds, images a second, compiled share) of each part; the slowest request; failures."""
    body = {"model": model, "n": 4}
    points, slowest, failed, began = [], 0.0, 0, time.monotonic()
    while time.monotonic() < began + MINUTES * 60:
        until, images, part = time.monotonic() + PART_SECONDS, 0, time.monotonic()
        while time.monotonic() < until:
            asked = time.monotonic()
            answer = deployment.http.post("/generate", json=body)
            slowest = max(slowest, time.monotonic() - asked)
            failed += answer.status_code != 200
            images += 4
        rate = images / (time.monotonic() - part)
        shares = [w.gauges.get("engine_compiled") for w in deployment.client.status().workers]
        compiled = next((share for share in shares if share is not None), 0.0)
        points.append((time.monotonic() - began, rate, compiled))
        say("images a second", rate=round(rate, 2), compiled=compiled)
        time.sleep(PAUSE_SECONDS)
    return points, slowest, failed


def _plans(deployment: Deployment, seed: int) -> list[dict[str, Any]]:
    """Plans of random budgets of the default family."""
    chance, plans = random.Random(seed), list[dict[str, Any]]()
    while len(plans) < BUDGETS:
        budget = {
            "max_mem_gb": chance.choice(MEMORY_GB),
            "n": chance.choice((1, 2, 4, 8)),
            "num_inference_steps": chance.choice((5, 10, 25)),
            "guidance_scale": chance.choice((1, 2)),
        }
        answer = deployment.http.post("/plan", json=budget)
        if answer.status_code == 200:
            plans.append({**answer.json()["plan"], "budget": budget})
    return plans


def _key(plan: dict[str, Any]) -> str:
    return json.dumps([plan[k] for k in ("depth", "rank", "mode", "dtype", "budget")])


_models: dict[str, str] = {}


def _stopwatch(deployment: Deployment, plan: dict[str, Any]) -> float:
    """Median seconds of requests for exactly this plan over HTTP; 0 where it cannot be made."""
    fixed = {name: plan[name] for name in ("depth", "rank", "mode", "dtype")}
    key = json.dumps(fixed)
    if key not in _models:
        _models[key] = deployment.client.create_model(max_mem_gb=4, **fixed).id
        deployment.client.wait(_models[key])
    budget = plan["budget"]
    body = {
        "model": _models[key],
        "n": budget["n"],
        "num_inference_steps": budget["num_inference_steps"],
        "guidance_scale": budget["guidance_scale"],
    }
    seconds = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        if deployment.http.post("/generate", json=body).status_code != 200:
            return 0.0
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _within(plan: dict[str, Any], seconds: float) -> bool:
    least, most = plan["latency_range_seconds"]
    return bool(least <= seconds <= most)


def _draw(points: list[tuple[float, float, float]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 3))
    minutes = [at / 60 for at, _, _ in points]
    axes.plot(minutes, [rate for _, rate, _ in points], label="images a second")
    axes.set(xlabel="minutes after the first start", ylabel="images a second", ylim=(0, None))
    share = axes.twinx()
    share.fill_between(minutes, [s for _, _, s in points], alpha=0.15, step="post", color="gray")
    share.set(ylabel="share that is compiled", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)
