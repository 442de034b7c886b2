"""How long a step of many rows takes on this device, and what it holds: measured, not assumed."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from learngenes.batch import Batch, Part, Stack, Tables
from learngenes.config import Mode, Size
from learngenes.device import synchronise
from learngenes.kernels import Kernels
from learngenes.profile import execution_on
from learngenes.schedules import schedule
from learngenes.sigma import interpolated
from learngenes.sizing.cost import Workload, activation_bytes
from learngenes.weights import ModelWeights, SharedWeights

REPETITIONS = 5
SATURATED = 0.97
"""A batch is full when it makes so much of the most rows a second that any batch makes. Rows that
wait must be composed again and again, so what is called full too early costs more than it saves."""


@dataclass(frozen=True)
class StepCosts:
    """Of a family in one dtype."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    """One step of a model of full size, materialised, over `rows`."""
    full_rows: int
    """More rows than these only make each other wait."""
    row_bytes: int
    """What a step's activations take for each row."""
    factored_ratio: dict[int, float]
    """By rank: seconds of a factored step over those of a materialised one, in a full batch."""

    def step_seconds(self, rows: int) -> float:
        """Beyond what was measured, in proportion."""
        if rows > self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.seconds))

    def prefers_factored(self, rank: int) -> bool:
        """Whether a model of this rank is faster factor by factor than with W written out."""
        ranks = sorted(self.factored_ratio)
        return float(np.interp(rank, ranks, [self.factored_ratio[r] for r in ranks])) < 1


def measure_step_costs(
    shared: SharedWeights, kernels: Kernels, max_rows: int, max_seconds: float = 5.0
) -> StepCosts:
    """Rows double up to `max_rows`, or until the time is used up."""
    sizes = shared.family.manifest.sizes
    full = full_depth_model(shared, sizes.ranks[-1], materialised=True)
    started = time.perf_counter()
    rows, seconds = [2], [_seconds(full, 2, kernels)]
    while 2 * rows[-1] <= max_rows and time.perf_counter() - started < max_seconds / 2:
        rows.append(2 * rows[-1])
        seconds.append(_seconds(full, rows[-1], kernels))
    speeds = [n / s for n, s in zip(rows, seconds, strict=True)]
    full_rows = next(
        n for n, speed in zip(rows, speeds, strict=True) if speed >= SATURATED * max(speeds)
    )
    at_full = seconds[rows.index(full_rows)]
    ratios: dict[int, float] = {}
    for rank in sizes.ranks:
        if ratios and time.perf_counter() - started > max_seconds:
            break
        factored = full_depth_model(shared, rank, materialised=False)
        ratios[rank] = _seconds(factored, full_rows, kernels) / at_full
    return StepCosts(tuple(rows), tuple(seconds), full_rows, _row_bytes(shared, full_rows), ratios)


def _row_bytes(shared: SharedWeights, rows: int) -> int:
    """By sizing's cost model, of whichever mode needs more."""
    network, device = shared.network, shared.device
    workload = Workload(n=rows, guided=False)
    executions = (execution_on(device, mode, shared.dtype) for mode in Mode)
    held = max(int(activation_bytes(network, network.rank, e, workload)) for e in executions)
    return -(-held // rows)


def full_depth_model(shared: SharedWeights, rank: int, *, materialised: bool) -> ModelWeights:
    """With the family's own Sigma."""
    depth = shared.family.manifest.sizes.depths[-1]
    model = ModelWeights(shared, interpolated(shared.family.scales, Size(depth=depth, rank=rank)))
    if materialised:
        model.materialise()
    return model


def _seconds(model: ModelWeights, rows: int, kernels: Kernels) -> float:
    """The fastest of some steps, after one that is not counted: what else runs only adds time."""
    batch = batch_of(model, rows, REPETITIONS + 1, kernels)
    batch.step()
    taken = []
    for _ in range(REPETITIONS):
        synchronise(model.shared.device)
        started = time.perf_counter()
        batch.step()
        synchronise(model.shared.device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def batch_of(model: ModelWeights, rows: int, steps: int, kernels: Kernels) -> Batch:
    """`rows` unguided images of one model, for as many steps."""
    shared, network = model.shared, model.shared.network
    plan = schedule(shared.family.manifest.diffusion, "ddim", steps)
    modulations = model.modulations(plan.timesteps.to(shared.device), 0).flatten(0, 1)
    picture = (network.in_channels, network.sample_size, network.sample_size)
    x = torch.zeros(rows, *picture, device=shared.device)
    part = Part(model, plan, 0, [0] * rows, None, 1.0, x, torch.zeros_like(x))
    tables = Tables(plan.coefficients.to(shared.device), modulations)
    return Batch([part], tables, Stack(shared), kernels)
