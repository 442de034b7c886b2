"""Table 1: models of several depths, by every method."""

import itertools
import time

from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import FINE, METHODS, first_stage, second_stage
from benchmarks.paper.rows import Row
from benchmarks.paper.setting import Setting
from benchmarks.paper.training import denoising_loss

Case = tuple[int, int, str]
STAGES = "AB"


def cases(setting: Setting) -> list[Case]:
    return [*itertools.product(setting.seeds, setting.depths, (*METHODS, *FINE))]


def learning_rates(lab: Lab, method: str) -> tuple[float, float]:
    """Learning rates of stages A and B: the best of a search on what chooses."""
    setting, choosing = lab.setting, lab.ancestors.splits.choosing

    def loss(first: float, second: float | None) -> float:
        model = first_stage(lab.ancestors, method, setting.searched_depth, 0, first)
        if second is not None:
            model = second_stage(lab.ancestors, model, 0, second)
        return denoising_loss(model, choosing, setting)

    key = {"search": method}
    if method not in FINE:
        best = lab.best_rate(key, setting.learning_rates, lambda rate: loss(rate, rate))
        return best, best
    first = lab.best_rate(
        {**key, "stage": "A"}, setting.sigma_learning_rates, lambda rate: loss(rate, None)
    )
    return first, lab.best_rate(
        {**key, "stage": "B"}, setting.learning_rates, lambda rate: loss(first, rate)
    )


def measure(lab: Lab, seed: int, depth: int, method: str) -> list[Row]:
    """Two rows, after stages A and B."""
    setting = lab.setting
    keys = [
        {"table": "depth", "method": method, "depth": depth, "seed": seed, "stage": stage}
        for stage in STAGES
    ]
    if not all(lab.rows.has(key) for key in keys):
        first, second = learning_rates(lab, method)
        started = time.process_time()
        model = first_stage(lab.ancestors, method, depth, seed, first)
        seconds = time.process_time() - started
        lab.judged(keys[0], model, seconds=seconds, steps=setting.sigma_steps, learning_rate=first)
        started = time.process_time()
        model = second_stage(lab.ancestors, model, seed, second)
        seconds += time.process_time() - started
        steps = setting.sigma_steps + setting.further_steps
        lab.judged(keys[1], model, seconds=seconds, steps=steps, learning_rate=second)
    return [lab.rows.get(key, dict) for key in keys]
