"""Table 1: models of several depths, by every method."""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.methods import FINE, METHODS, first_stage, second_stage
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.training import denoising_loss


def learning_rates(ancestors: Ancestors, method: str, rows: Rows) -> tuple[float, float]:
    """Of stage A and stage B: the best of a search on what chooses."""
    setting = ancestors.setting
    depth, everything = setting.searched_depth, setting.learning_rates
    choosing = ancestors.splits.choosing

    def measure(first: float, second: float | None) -> float:
        key: Row = {"search": method, "A": first, "B": second}

        def run() -> Row:
            model = first_stage(ancestors, method, depth, 0, first)
            if second is not None:
                model = second_stage(ancestors, model, 0, second)
            return {"loss": denoising_loss(model, choosing, setting)}

        return float(rows.get(key, run)["loss"])

    if method in FINE:
        first = min(setting.sigma_learning_rates, key=lambda rate: measure(rate, None))
        return first, min(everything, key=lambda rate: measure(first, rate))
    best = min(everything, key=lambda rate: measure(rate, rate))
    return best, best


def measure(ancestors: Ancestors, judge: Judge, work: Path) -> Iterator[Row]:
    """Two rows, after stages A and B, for each method, depth and seed."""
    setting = ancestors.setting
    rows = Rows(work / "depth.jsonl")
    for seed in setting.seeds:
        for depth in setting.depths:
            for method in (*METHODS, *FINE):
                yield from _both(ancestors, judge, rows, method, depth, seed)


def _both(
    ancestors: Ancestors, judge: Judge, rows: Rows, method: str, depth: int, seed: int
) -> list[Row]:
    keys = [{"method": method, "depth": depth, "seed": seed, "stage": stage} for stage in "AB"]
    if not all(rows.has(key) for key in keys):
        first, second = learning_rates(ancestors, method, rows)
        started = time.monotonic()
        model = first_stage(ancestors, method, depth, seed, first)
        seconds = time.monotonic() - started
        rows.get(keys[0], lambda: {"seconds": round(seconds, 1), "rate": first, **judge(model)})
        started = time.monotonic()
        model = second_stage(ancestors, model, seed, second)
        seconds += time.monotonic() - started
        rows.get(keys[1], lambda: {"seconds": round(seconds, 1), "rate": second, **judge(model)})
    return [rows.get(key, dict) for key in keys]
