"""Table 2: what training from scratch needs to be as good as FINE after s steps."""

import itertools
import time

from benchmarks.paper.depth import learning_rates
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import scratch, train_all
from benchmarks.paper.rows import Row
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


def storage_bytes(setting: Setting, sizes: int) -> dict[str, int]:
    """Of models of so many depths from 3 on, in float32: each whole, or Sigma and one family."""
    network = setting.network
    depths = range(3, 3 + sizes)
    stem = stem_parameters(network)
    whole = sum(stem + int(dense_layer_parameters(network)) * depth for depth in depths)
    own = sum(int(scale_parameters(network, depth, network.rank)) for depth in depths)
    family = stem + int(learngene_parameters(network, network.rank))
    family += int(scale_parameters(network, network.depth, network.rank))
    return {"scratch": whole * BYTES_PER_FLOAT32, "fine": (family + own) * BYTES_PER_FLOAT32}


def dense_layer_parameters(network: NetworkConfig) -> int:
    biases = int(scale_parameters(network, 1, 0))
    return int(dense_parameters(network, 1)) + biases


def cases(setting: Setting) -> list[Case]:
    return [*itertools.product(setting.depths, setting.scratch_multiples)]


def measure(lab: Lab, depth: int, multiple: int) -> list[Row]:
    """From scratch, in one go, in so many times s steps."""
    setting = lab.setting
    key = {"table": "cost", "method": "scratch", "depth": depth, "multiple": multiple, "seed": 0}
    if not lab.rows.has(key):
        rate, _ = learning_rates(lab, "scratch")
        steps = multiple * (setting.sigma_steps + setting.further_steps)
        started = time.process_time()
        model = train_all(scratch(lab.ancestors, depth), lab.ancestors, steps, 0, rate)
        seconds = time.process_time() - started
        lab.judged(key, model, seconds=seconds, steps=steps, learning_rate=rate)
    return [lab.rows.get(key, dict)]
