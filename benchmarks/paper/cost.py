"""Table 2: what training from scratch needs to be as good as FINE after s steps."""

import itertools
import time

from benchmarks.paper.depth import choices
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import scratch, train_all
from benchmarks.paper.rows import LAYER_STEPS, OURS, SIZES, TASKS, Row
from benchmarks.paper.setting import Setting
from learngenes.config import NetworkConfig
from learngenes.sizing.cost import (
    BYTES_PER_FLOAT32,
    dense_parameters,
    learngene_parameters,
    scale_parameters,
    stem_parameters,
)

Case = tuple[int, int]


LATE = 0.4
"""Share of the steps in which a drawn depth is trained beside the full size."""
COUNTS = (1, 3, 5, 10)
"""Numbers of models of different sizes, and of tasks."""
WHOLE = "whole models"


def totals(setting: Setting) -> list[Row]:
    """What models of several sizes, and of several tasks, cost together; counted, not measured.

    Layer steps: training steps, each times the layers that it trains, phase 1 included. Bytes of
    FINE are those after Sigma alone: what is trained further owns its weights.
    """
    network, steps = setting.network, setting.steps_until("B")
    dense = setting.ancestor_steps * network.depth
    any_size = dense + round(LATE * setting.ancestor_steps * _drawn(setting))
    any_size += setting.prepared_steps * sum(setting.trained_depths)
    stem, layer = stem_parameters(network), layer_parameters(network)
    family = (
        stem + int(learngene_parameters(network, network.rank)) + _sigma(network, network.depth)
    )
    task_depth = setting.searched_depth
    classes = (network.num_classes + 1) * network.width
    rows: list[Row] = []
    for n in COUNTS:
        depths = spread_depths(network.depth, n)
        layers = sum(depths)
        trained = {f"scratch, {k} s": k * steps * layers for k in setting.scratch_multiples}
        trained |= {"pruning": dense + steps * layers, OURS: any_size + steps * layers}
        parameters = {
            SIZES: {
                WHOLE: n * stem + layers * layer,
                OURS: family + sum(_sigma(network, depth) for depth in depths),
            },
            TASKS: {
                WHOLE: n * (stem + task_depth * layer),
                OURS: family + n * (_sigma(network, task_depth) + classes),
            },
        }
        for what, counted in ((LAYER_STEPS, trained), *parameters.items()):
            each = 1 if what == LAYER_STEPS else BYTES_PER_FLOAT32
            for method, count in counted.items():
                key = {"table": "totals", "what": what, "n": n, "method": method}
                rows.append({"key": key, "total": each * count})
    return rows


def _drawn(setting: Setting) -> float:
    """Layers of a drawn depth, on average: L is drawn in proportion to 1 / L."""
    smaller = [depth for depth in setting.trained_depths if depth < setting.network.depth]
    return len(smaller) / sum(1 / depth for depth in smaller)


def spread_depths(deepest: int, n: int) -> list[int]:
    """Depths from the deepest down to a quarter of it."""
    span = deepest - deepest // 4
    return [round(deepest - i * span / max(1, n - 1)) for i in range(n)]


def _sigma(network: NetworkConfig, depth: int) -> int:
    return int(scale_parameters(network, depth, network.rank))


def layer_parameters(network: NetworkConfig) -> int:
    biases = int(scale_parameters(network, 1, 0))
    return int(dense_parameters(network, 1)) + biases


def cases(setting: Setting) -> list[Case]:
    return [*itertools.product(setting.depths, setting.scratch_multiples)]


def measure(lab: Lab, depth: int, multiple: int) -> list[Row]:
    """Row of training from scratch, in one go, in so many times s steps."""
    setting = lab.setting
    key = {"table": "cost", "method": "scratch", "depth": depth, "multiple": multiple, "seed": 0}
    if not lab.rows.has(key):
        rate = choices(lab, "scratch")["B"].further
        steps = multiple * setting.steps_until("B")
        started = time.process_time()
        model = train_all(scratch(lab.ancestors, depth), lab.ancestors, steps, 0, rate)
        seconds = time.process_time() - started
        lab.judged(key, model, seconds=seconds, steps=steps, learning_rate=rate)
    return [lab.rows.get(key, dict)]
