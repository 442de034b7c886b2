"""Served beside measured beside predicted: models over the front, each asked for 20 times by HTTP.

Then more are built beside a process that takes a core; the profile must stay as it was.
"""

import json
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.deployment import Deployment
from benchmarks.parts import Figures, say
from benchmarks.start.first import core_taken

MODELS = 40
REQUESTS = 20
BESIDE_OTHERS = 6
"""Models that are built beside a process that takes a core."""
PROFILED_SECONDS = 1500
BRIEFLY = {"retraining_steps": 2, "retraining_max_seconds": 2, "verify_seconds": 3}


def measure() -> Figures:
    with Deployment(**BRIEFLY) as deployment:
        deployment.up()
        _wait_profiled(deployment)
        plans = _front(deployment)
        rows = [_row(deployment, plan) for plan in plans]
        before = _profile(deployment)
        with core_taken():
            beside = [_built(deployment, plan) for plan in plans[:: len(plans) // BESIDE_OTHERS]]
        after = _profile(deployment)
    reliable = [row for row in rows if not row["disturbed"]]
    errors = [row["served_p50"] / row["measured_p50"] - 1 for row in reliable]
    builds = sorted(rows, key=lambda row: row["memory_bytes"])
    return {
        "models": len(rows),
        "disturbed": len(rows) - len(reliable),
        "promise_error_median": round(statistics.median(map(abs, errors)), 3),
        "promise_error_most": round(max(map(abs, errors)), 3),
        "predicted_error_median": round(
            statistics.median(abs(r["measured_p50"] / r["predicted_p50"] - 1) for r in reliable), 3
        ),
        "p95_kept": round(statistics.mean(r["served_p95"] <= r["predicted_p95"] for r in rows), 3),
        "build_seconds": [round(builds[i]["build_seconds"], 1) for i in (0, -1)],
        "disturbed_beside_others": sum(bool(model.disturbed) for model in beside),
        "built_beside_others": len(beside),
        "correction_before": before,
        "correction_beside_others": after,
        "rows": rows,
    }


def hour(minutes: float = 60, pause_seconds: float = 300) -> Figures:
    """What is predicted before, and after an hour beside a process that takes a core."""
    with Deployment(**BRIEFLY) as deployment:
        deployment.up()
        _wait_profiled(deployment)
        plans = _front(deployment)
        for plan in plans[::8]:
            _built(deployment, plan)
        before, built, disturbed = _predictions(deployment), 0, 0
        began = time.monotonic()
        with core_taken():
            while time.monotonic() < began + 60 * minutes:
                model = _built(deployment, plans[built % len(plans)])
                built, disturbed = built + 1, disturbed + bool(model.disturbed)
                say("built", number=built, disturbed=model.disturbed)
                time.sleep(pause_seconds)
        after = _predictions(deployment)
    changes = [abs(b / a - 1) for a, b in zip(before, after, strict=True)]
    return {
        "minutes": minutes,
        "profile_change_after_an_hour": round(max(changes), 3),
        "built_in_the_hour": built,
        "disturbed_in_the_hour": disturbed,
    }


def _predictions(deployment: Deployment) -> list[float]:
    """Predicted latency of each size of the front."""
    front = deployment.http.post("/plan", json={"max_mem_gb": 4}).json()["front"]
    return [plan["predicted"]["latency_seconds"] for plan in front]


def _wait_profiled(deployment: Deployment) -> None:
    """Until kernels are compiled and the default family is measured."""
    began = time.monotonic()
    while time.monotonic() < began + PROFILED_SECONDS:
        status = deployment.client.status()
        if not any(p.estimated for p in status.profiles if p.family == "fashion"):
            break
        time.sleep(2)
    say("profiled", after=round(time.monotonic() - began))


def _front(deployment: Deployment) -> list[dict[str, Any]]:
    """Evenly chosen sizes of the default family's front."""
    front = deployment.http.post("/plan", json={"max_mem_gb": 4}).json()["front"]
    return [front[i * (len(front) - 1) // (MODELS - 1)] for i in range(min(MODELS, len(front)))]


def _built(deployment: Deployment, plan: dict[str, Any]) -> Any:
    fixed = {name: plan[name] for name in ("depth", "rank", "mode", "dtype")}
    return deployment.client.wait(deployment.client.create_model(max_mem_gb=4, **fixed).id)


def _row(deployment: Deployment, plan: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    model = _built(deployment, plan)
    build_seconds = time.monotonic() - began
    seconds = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        deployment.http.post("/generate", json={"model": model.id, "n": 4}).raise_for_status()
        seconds.append(time.perf_counter() - began)
    row = {
        "size": f"L{plan['depth']} r{plan['rank']} {plan['mode']} {plan['dtype']}",
        "memory_bytes": plan["predicted"]["memory_bytes"],
        "predicted_p50": model.plan.predicted.latency_seconds,
        "predicted_p95": model.plan.predicted.latency_p95_seconds,
        "measured_p50": model.measured.latency_seconds,
        "served_p50": statistics.median(seconds),
        "served_p95": float(np.quantile(seconds, 0.95)),
        "disturbed": model.disturbed,
        "build_seconds": build_seconds,
    }
    say(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))
    return row


def _profile(deployment: Deployment) -> float:
    profiles = deployment.client.status().profiles
    return next(p.speed_correction for p in profiles if p.family == "fashion")
