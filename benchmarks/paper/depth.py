"""Table 1: models of several depths, by every method."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable

from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import FINE, METHODS, Choice, first_stage, later_stage
from benchmarks.paper.rows import Row
from benchmarks.paper.setting import Setting
from benchmarks.paper.training import denoising_loss
from learngenes.model.dense import DenseDiT

Case = tuple[int, int, str]
STAGES = "ABC"


def cases(setting: Setting) -> list[Case]:
    return [*itertools.product(setting.seeds, setting.depths, (*METHODS, *FINE))]


def choices(lab: Lab, method: str) -> dict[str, Choice]:
    """What is best for the end of each stage, on what chooses, at one depth.

    FINE's rate for Sigma by stage A; else one rate for A and B, by B, and at that the share of the
    teacher; a rate of its own for C.
    """
    setting = lab.setting
    most, *others = setting.distillations

    def loss(stage: str, choice: Choice) -> float:
        def searched() -> float:
            model = first_stage(lab.ancestors, method, setting.searched_depth, 0, choice)
            if stage != "A":
                model = later_stage(lab.ancestors, method, model, stage, 0, choice)
            return denoising_loss(model, lab.ancestors.splits.choosing, setting)

        key = {"search": method, "stage": stage, **dataclasses.asdict(choice)}
        return lab.outcome(key, searched)

    def best(stage: str, choices: Iterable[Choice]) -> Choice:
        return min(choices, key=functools.partial(loss, stage))

    first = None
    if method in FINE:
        first = best("A", (Choice(rate, rate, 0) for rate in setting.sigma_learning_rates)).first

    def of(rate: float, share: float) -> Choice:
        return Choice(first or rate, rate, share)

    if method == "scratch":
        most, others = 0.0, []
    by_rate = best("B", (of(rate, most) for rate in setting.learning_rates))
    until_b = best("B", (by_rate, *(of(by_rate.further, share) for share in others)))
    until_c = best("C", (of(rate, until_b.distillation) for rate in setting.learning_rates))
    return {"A": until_b, "B": until_b, "C": until_c}


def measure(lab: Lab, seed: int, depth: int, method: str) -> list[Row]:
    """A row for each stage."""
    setting = lab.setting
    keys = {
        stage: {"table": "depth", "method": method, "depth": depth, "seed": seed, "stage": stage}
        for stage in STAGES
    }
    if not all(lab.rows.has(key) for key in keys.values()):
        chosen = choices(lab, method)

        @functools.cache
        def begun(choice: Choice) -> tuple[DenseDiT, float]:
            started = time.process_time()
            model = first_stage(lab.ancestors, method, depth, seed, choice)
            return model, time.process_time() - started

        for stage, key in keys.items():
            choice = chosen[stage]
            model, seconds = begun(choice)
            if stage != "A":
                started = time.process_time()
                model = later_stage(lab.ancestors, method, model, stage, seed, choice)
                seconds += time.process_time() - started
            figures = {"steps": setting.steps_until(stage), **dataclasses.asdict(choice)}
            lab.judged(key, model, seconds=seconds, **figures)
    return [lab.rows.get(key, dict) for key in keys.values()]
