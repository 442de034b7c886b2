"""How long a step of many rows takes on this device, and what it holds: measured, not assumed."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from learngenes.batch import Batch, Kernels, ModelWeights, Part, SharedWeights, Stack, Tables
from learngenes.config import Size
from learngenes.device import peak_bytes, synchronise
from learngenes.schedules import schedule
from learngenes.sigma import interpolated

REPETITIONS = 5
SATURATED = 0.9
"""A batch is full when it makes so much of the most rows a second that any batch makes."""


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
    full = _model(shared, sizes.ranks[-1], materialised=True)
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
        factored = _model(shared, rank, materialised=False)
        ratios[rank] = _seconds(factored, full_rows, kernels) / at_full
    batch = _batch(full, full_rows, kernels)
    held = peak_bytes(batch.step, shared.device)
    return StepCosts(tuple(rows), tuple(seconds), full_rows, -(-held // full_rows), ratios)


def _model(shared: SharedWeights, rank: int, *, materialised: bool) -> ModelWeights:
    depth = shared.family.manifest.sizes.depths[-1]
    model = ModelWeights(shared, interpolated(shared.family.scales, Size(depth=depth, rank=rank)))
    if materialised:
        model.materialise()
    return model


def _seconds(model: ModelWeights, rows: int, kernels: Kernels) -> float:
    """The median of some steps, after one that is not counted."""
    batch = _batch(model, rows, kernels)
    batch.step()
    taken = []
    for _ in range(REPETITIONS):
        synchronise(model.shared.device)
        started = time.perf_counter()
        batch.step()
        synchronise(model.shared.device)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _batch(model: ModelWeights, rows: int, kernels: Kernels) -> Batch:
    """`rows` unguided images of one model."""
    shared = model.shared
    steps = schedule(shared.family.manifest.diffusion, "ddim", REPETITIONS + 2)
    modulations = model.modulations(steps.timesteps.to(shared.device), 0).flatten(0, 1)
    n = shared.network
    x = torch.zeros(rows, n.in_channels, n.sample_size, n.sample_size, device=shared.device)
    part = Part(model, steps, 0, [0] * rows, None, 1.0, x, torch.zeros_like(x))
    tables = Tables(steps.coefficients.to(shared.device), modulations)
    return Batch([part], tables, Stack(shared), kernels)
