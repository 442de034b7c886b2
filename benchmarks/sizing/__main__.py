"""`python -m benchmarks.sizing [PART …]`: all parts, or those that are named.

Each part's figures are kept in benchmarks/results/sizing.json as soon as it has ended; its
`summary` is what the README shows.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sizing import cases, dit_xl, kernel_cap, optimality, speed
from benchmarks.sizing.subjects import RESULTS
from learngenes.device import default_device, device_class

Figures = dict[str, Any]
RESULT = RESULTS / "sizing.json"
PARTS: dict[str, Callable[[], Figures]] = {
    "optimality": optimality.measure,
    "speed": speed.measure,
    "dit_xl": dit_xl.measure,
    "kernel_cap": kernel_cap.measure,
    "cases": cases.measure,
}
SUMMARY = {
    "cases": ("cases", "over_budget", "memory_error_median", "memory_error_max"),
    "dit_xl": ("dit_xl_dense_bf16_bytes", "dit_xl_factored_bytes"),
    "speed": ("solve_p99_seconds", "plan_http_p99_seconds"),
    "optimality": ("bruteforce_beaten",),
}
SUMMARY["cases"] += ("latency_error_median", "latency_within_budget_share")


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"no part {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    parts: Figures = json.loads(RESULT.read_text())["parts"] if RESULT.exists() else {}
    for name in wanted:
        sys.stdout.write(f"{name}\n")
        started = time.perf_counter()
        parts[name] = PARTS[name]()
        parts[name]["seconds"] = round(time.perf_counter() - started)
        save(parts)
    if "cases" in parts:
        cases.draw(parts["cases"]["measured"])


def save(parts: Figures) -> None:
    summary = {
        figure: parts[part][figure]
        for part, figures in SUMMARY.items()
        if part in parts
        for figure in figures
    }
    machine = {
        "device_class": device_class(default_device()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps({"summary": summary, "machine": machine, "parts": parts}) + "\n")


if __name__ == "__main__":
    main()
