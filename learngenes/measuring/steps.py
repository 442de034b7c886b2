"""Measured seconds and bytes of a denoising step of many rows on this device."""

import bisect
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

from learngenes.config import SHARED_MODES, DType, Mode, Scheduler, Size
from learngenes.device import native_bfloat16, packing_threads, synchronise
from learngenes.sizing.cost import Execution, activation_bytes
from learngenes.stepping.batch import Batch, Part, Stack, Tables
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.schedules import schedule
from learngenes.stepping.weights import FactoredWeights, ModelWeights, SharedWeights

ROUNDS = 6
STEPS_A_ROUND = 8
MOST_STEPS = 2 + ROUNDS * STEPS_A_ROUND
"""Steps of one batch: one to compose it, one to see how long it takes, and the rounds."""
SATURATED = 0.97
"""A batch is full when it makes so much of the most rows a second that any batch makes. Rows that
wait must be composed again and again, so what is called full too early costs more than it saves."""


def execution_on(device: torch.device, mode: Mode, dtype: DType) -> Execution:
    return Execution(mode, dtype, native_bfloat16(device), packing_threads(device))


@dataclass(frozen=True)
class StepCosts:
    """Step costs of a family in one dtype."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    """Seconds of one step of a full-size materialised model, for each of `rows`."""
    full_rows: int
    """Rows of a full batch: more of them only make each other wait."""
    row_bytes: int
    """Bytes of a step's activations for each row."""
    factored_ratio: dict[int, float]
    """For each rank: seconds of a full step with half of the rows factored, over those of one that
    is all materialised; both kinds in one batch take twice as many calls."""

    def step_seconds(self, rows: float) -> float:
        """Seconds of one step; beyond the measured rows they grow in proportion."""
        if rows > self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        if rows <= self.rows[0]:
            return self.seconds[0]
        above = bisect.bisect_left(self.rows, rows)  # numpy takes ten times as long for one number
        below = above - 1
        share = (rows - self.rows[below]) / (self.rows[above] - self.rows[below])
        return self.seconds[below] + share * (self.seconds[above] - self.seconds[below])

    def prefers_factored(self, rank: int) -> bool:
        """Whether a model of this rank is faster factor by factor than with W written out."""
        ranks = sorted(self.factored_ratio)
        return float(np.interp(rank, ranks, [self.factored_ratio[r] for r in ranks])) < 1


M = TypeVar("M")


def median_of(measured: Sequence[M]) -> M:
    """Median, field by field, of dataclasses over one grid; the last where their grids differ."""
    last = measured[-1]
    try:
        medians = {
            field.name: _median([getattr(each, field.name) for each in measured])
            for field in fields(last)  # type: ignore[arg-type]
        }
    except (KeyError, ValueError):
        return last
    return replace(last, **medians)  # type: ignore[type-var]


def _median(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_median(each) for each in zip(*values, strict=True))
    return statistics.median(values) if isinstance(first, float) else statistics.median_low(values)


def seconds_a_step(batch: Batch, steps: int) -> float:
    """Seconds of one step, in the mean of `steps`."""
    began = time.perf_counter()
    for _ in range(steps):
        batch.step()
    synchronise(batch.shared.device)
    return (time.perf_counter() - began) / steps


def worked_seconds_a_step(batch: Batch, steps: int, processors: int) -> float:
    """The same as it would be alone, on a CPU: beside other processes a step takes longer than
    its `processors` work at it.
    """
    began = time.process_time()
    seconds = seconds_a_step(batch, steps)
    if batch.shared.device.type != "cpu":
        return seconds
    return min(seconds, (time.process_time() - began) / (processors * steps))


K = TypeVar("K", bound=Hashable)
SecondsOf = Callable[[Batch, int], float]
"""Seconds of one step of a batch, of so many that are run."""


def measure_step_costs(
    shared: SharedWeights,
    kernels: Kernels,
    max_rows: int,
    max_seconds: float = 5.0,
    seconds_of: SecondsOf = seconds_a_step,
) -> StepCosts:
    """Measure steps of 2, 4, 8, … rows, up to `max_rows` or until the time is used up."""
    ranks = shared.family.manifest.sizes.ranks
    full = own_model(shared, ranks[-1], materialised=True)
    began = time.perf_counter()
    batches = {2: batch_of([full], 2, kernels)}
    while (rows := 2 * max(batches)) <= max_rows and time.perf_counter() - began < max_seconds / 2:
        batches[rows] = batch_of([full], rows, kernels)
    seconds = step_seconds(batches, began + max_seconds / 2, seconds_of)
    speeds = {rows: rows / s for rows, s in seconds.items()}
    most = max(speeds.values())
    full_rows = next(rows for rows, speed in speeds.items() if speed >= SATURATED * most)
    mixed = {0: batch_of([full], full_rows, kernels)}  # of rank 0: nothing is factored
    for rank in dict.fromkeys((ranks[0], ranks[-1], *ranks)):  # between these two the rest must be
        if len(mixed) > 2 and time.perf_counter() - began > max_seconds:
            break
        factored = own_model(shared, rank, materialised=False)
        mixed[rank] = batch_of([full, factored], full_rows // 2, kernels)
    taken = step_seconds(mixed, began + max_seconds, seconds_of)
    materialised = taken.pop(0)
    return StepCosts(
        rows=tuple(seconds),
        seconds=tuple(seconds.values()),
        full_rows=full_rows,
        row_bytes=_row_bytes(shared, full_rows),
        factored_ratio={rank: taken[rank] / materialised for rank in sorted(taken)},
    )


def _row_bytes(shared: SharedWeights, rows: int) -> int:
    """Bytes of a row by sizing's cost model, in the mode that needs more; without decoding."""
    network, device = shared.network.model_copy(update={"autoencoder": None}), shared.device
    executions = (execution_on(device, mode, shared.dtype) for mode in SHARED_MODES)
    held = max(int(activation_bytes(network, network.rank, e, rows, rows)) for e in executions)
    return -(-held // rows)


def own_model(
    shared: SharedWeights, rank: int, *, materialised: bool, depth: int | None = None
) -> ModelWeights:
    """A model with the family's own Sigma, by default of its greatest depth."""
    depth = depth or shared.family.manifest.sizes.depths[-1]
    scales = shared.family.scales_of(Size(depth=depth, rank=rank))
    model = FactoredWeights(shared, scales)
    if materialised:
        model.materialise()
    return model


def step_seconds(batches: Mapping[K, Batch], until: float, seconds_of: SecondsOf) -> dict[K, float]:
    """Seconds of a step of each, medians of rounds: a slow moment of the machine is nobody's alone.

    The fastest round is a tenth less than a request sees. Where one step of each takes longer than
    there is time, it is the whole measurement.
    """
    once = {key: seconds_of(batch, 1) for key, batch in batches.items()}
    if time.perf_counter() > until + max(once.values()):  # else a round more costs little
        return once
    # a few short steps would slip in between what else the machine does, and seem the faster for it
    longest = max(once.values())
    steps = {key: min(STEPS_A_ROUND, round(longest / seconds)) for key, seconds in once.items()}
    rounds: dict[K, list[float]] = {key: [] for key in batches}
    for _ in range(ROUNDS):
        for key, batch in batches.items():
            if rounds[key] and time.perf_counter() > until:
                break
            rounds[key].append(seconds_of(batch, steps[key]))
    return {key: statistics.median(seconds) for key, seconds in rounds.items()}


def batch_of(models: Sequence[ModelWeights], rows: int, kernels: Kernels) -> Batch:
    """A batch of `rows` unguided images of each model, after the first step of MOST_STEPS."""
    shared, network = models[0].shared, models[0].shared.network
    plan = schedule(shared.family.manifest.diffusion, Scheduler.DDIM, MOST_STEPS)
    timesteps = plan.timesteps.to(shared.device)
    picture = (network.in_channels, network.sample_size, network.sample_size)
    parts, modulations, at = [], [], 0
    for model in models:
        modulations.append(model.modulations(timesteps, 0).flatten(0, 1))
        x = torch.zeros(rows, *picture, device=shared.device)
        unguided = range(0), model, list[int](), 1.0
        parts.append(Part(model, plan, 0, [at] * rows, *unguided, x, torch.zeros_like(x)))
        at += len(modulations[-1])
    tables = Tables(plan.coefficients.to(shared.device), torch.cat(modulations))
    batch = Batch(parts, tables, Stack(shared), kernels)
    batch.step()
    return batch
