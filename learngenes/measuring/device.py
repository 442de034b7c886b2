"""Measure the constants of `learngenes.sizing.profile` on this device, in under a minute."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import torch
from torch import nn

from learngenes.config import SHARED_MODES, DType, Mode, Size, executable
from learngenes.device import (
    decoded_together,
    device_class,
    native_bfloat16,
    packing_threads,
    synchronise,
)
from learngenes.family.family import Family
from learngenes.measuring.model import memory, run
from learngenes.model.dit import DiT
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import Execution, memory_bytes
from learngenes.sizing.profile import DeviceProfile, LayerCost

MAX_ROWS = 64
LAYERS_SECONDS = 0.02
"""About how long the layers that are timed together take."""
ROUNDS = 5
WHOLE_BATCHES = 12
LEAST_WHOLE_BATCHES = 4
WHOLE_BATCH_SECONDS = 0.4
LEAST_P95_RATIO = 1.25
MOST_P95_RATIO = 1.5
MOST_CORRECTION = 2.0
"""Largest correction that is taken for a property of the device, not a disturbance."""
OnProgress = Callable[[float, str], None]
"""Callback with (share that is done, what is measured now)."""


def execution_on(device: torch.device, mode: Mode, dtype: DType) -> Execution:
    return Execution(mode, dtype, native_bfloat16(device), packing_threads(device))


@dataclass
class _Point:
    """Layers of one execution and rank, and the seconds of one beside the stem, by rows."""

    execution: Execution
    model: DiT
    seconds: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class _Batch:
    """A batch as it is served, and the seconds that each run took."""

    execution: Execution
    depth: int
    workload: Workload
    model: DiT
    seconds: list[float] = field(default_factory=list)


def measure_profile(
    family: Family,
    process_base_bytes: int,
    max_seconds: float = 40.0,
    on_progress: OnProgress = lambda *_: None,
) -> DeviceProfile:
    """Time layers of every execution over ranks and rows, steps without layers, whole batches.

    Rows double until the time is used up; everything is timed in rounds, so that a
    disturbance meets all points alike, and medians count.
    """
    return _Profiling(family, max_seconds, on_progress).run(process_base_bytes)


class _Profiling:
    def __init__(self, family: Family, max_seconds: float, on_progress: OnProgress) -> None:
        self.family, self.max_seconds, self.on_progress = family, max_seconds, on_progress
        self.network, self.sizes = family.manifest.network, family.manifest.sizes
        self.device = family.stem.positions.device
        self.ranks = tuple(sorted({self.sizes.ranks[0], self.sizes.ranks[-1]}))
        self.started = time.perf_counter()

    @property
    def elapsed_share(self) -> float:
        return (time.perf_counter() - self.started) / self.max_seconds

    def run(self, process_base_bytes: int) -> DeviceProfile:
        points = self._points()
        rows = [1]
        last_share = self._time_layers(points, 1)
        while rows[-1] < MAX_ROWS and self.elapsed_share + 2 * last_share < 0.7:
            rows.append(2 * rows[-1])
            last_share = self._time_layers(points, rows[-1])
        request, image, steps = self._time_steps(points[0].model, rows)
        profile = DeviceProfile(
            device_class=device_class(self.device),
            torch_version=torch.__version__,
            family=self.family.manifest.name,
            family_fingerprint=self.family.fingerprint,
            measured_at=datetime.now(UTC),
            native_bfloat16=native_bfloat16(self.device),
            packing_threads=packing_threads(self.device),
            process_base_bytes=process_base_bytes,
            rows=tuple(rows),
            ranks=self.ranks,
            request_seconds=request,
            image_seconds=image,
            step_seconds=steps,
            layers=self._layer_costs(points, rows),
            p95_ratio=LEAST_P95_RATIO,
        )
        return self._with_whole_batches(profile)

    def _points(self) -> list[_Point]:
        """Layers of each execution, at some ranks when it depends on the rank."""
        points = []
        for mode, dtype in itertools.product(SHARED_MODES, DType):
            if executable(mode, dtype):
                for rank in self.ranks if mode is Mode.FACTORED else self.ranks[-1:]:
                    model = self._model(self._layers_at_once(mode, dtype, rank), rank, mode, dtype)
                    points.append(_Point(execution_on(self.device, mode, dtype), model))
        return points

    def _model(self, depth: int, rank: int, mode: Mode, dtype: DType) -> DiT:
        scales = self.family.scales_of(Size(depth=depth, rank=rank))
        return self.family.assemble(scales, mode, dtype)

    def _layers_at_once(self, mode: Mode, dtype: DType, rank: int) -> int:
        """Number of layers that take LAYERS_SECONDS; overhead and noise are divided by it."""
        model = self._model(1, rank, mode, dtype)
        self._forward(model, 1)
        seconds = self._forward(model, 1)
        return min(self.network.depth, max(1, round(LAYERS_SECONDS / seconds)))

    def _forward(self, model: DiT, rows: int) -> float:
        c = self.network
        x = torch.zeros(rows, c.in_channels, c.sample_size, c.sample_size, device=self.device)
        zeros = torch.zeros(rows, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            started = time.perf_counter()
            model(x, zeros, zeros)
            synchronise(self.device)
            return time.perf_counter() - started

    def _time_layers(self, points: list[_Point], rows: int) -> float:
        """Time all layers with `rows` rows; returns the share of the allowed time that it took."""
        before = self.elapsed_share
        self.on_progress(min(before, 1), f"layers, {rows} rows")
        for point in points:
            self._forward(point.model, rows)
        for _ in range(ROUNDS):
            for point in points:
                whole = self._forward(point.model, rows)
                layers, point.model.layers = point.model.layers, nn.ModuleList()
                stem = self._forward(point.model, rows)
                point.model.layers = layers
                layer = max(0.0, whole - stem) / len(layers)
                point.seconds.setdefault(rows, []).append(layer)
        return self.elapsed_share - before

    def _time_steps(self, model: DiT, rows: list[int]) -> tuple[float, float, tuple[float, ...]]:
        """Seconds of a request without steps, of an image, and of a step of `rows` in the stem."""
        diffusion = self.family.manifest.diffusion
        layers, model.layers = model.layers, nn.ModuleList()
        few, many = 2, 10
        steps, requests = [], []
        for n in rows:
            workloads = (Workload(n, count, guided=False) for count in (few, many))
            short, long = (
                float(np.median([run(model, diffusion, workload) for _ in range(2 * ROUNDS)]))
                for workload in workloads
            )
            steps.append(max(0.0, long - short) / (many - few))
            requests.append(max(0.0, short - few * steps[-1]))
        model.layers = layers
        if self.network.autoencoder is None:
            return float(np.median(requests)), 0.0, tuple(steps)
        image = max(0.0, requests[-1] - requests[0]) / max(1, rows[-1] - rows[0])
        return max(0.0, requests[0] - image), image, tuple(steps)

    def _layer_costs(self, points: list[_Point], rows: list[int]) -> tuple[LayerCost, ...]:
        costs: dict[Execution, list[tuple[float, ...]]] = {}
        for point in points:
            medians = tuple(float(np.median(point.seconds[n])) for n in rows)
            costs.setdefault(point.execution, []).append(medians)
        return tuple(
            LayerCost(mode=execution.mode, dtype=execution.dtype, seconds=tuple(by_rank))
            for execution, by_rank in costs.items()
        )

    def _with_whole_batches(self, profile: DeviceProfile) -> DeviceProfile:
        """`profile` corrected by whole batches: what the parts' sum misses, the tail, memory."""
        rank = self.sizes.middle.rank
        batches = [self._whole_batch(profile, e, rank) for e in profile.executions]
        self._time_batches(batches)
        self.on_progress(1, "memory")
        layers, tails = [], []
        for cost, batch in zip(profile.layers, batches, strict=True):
            median = float(np.median(batch.seconds))
            predicted = profile.latency_seconds(batch.depth, rank, batch.execution, batch.workload)
            correction = float(np.clip(median / predicted, 1 / MOST_CORRECTION, MOST_CORRECTION))
            layers.append(cost.model_copy(update={"correction": correction}))
            tails += [seconds / median for seconds in batch.seconds]
        tail = min(max(float(np.quantile(tails, 0.95)), LEAST_P95_RATIO), MOST_P95_RATIO)
        extra = max(self._overhead_bytes(batch, rank) for batch in batches)
        self.on_progress(1, "done")
        if self.family.imported is not None:  # executed as what is written out
            written = [cost for cost in layers if cost.mode is Mode.MATERIALISED]
            layers += [cost.model_copy(update={"mode": Mode.DENSE}) for cost in written]
        changes = {"layers": tuple(layers), "p95_ratio": tail, "memory_overhead_bytes": extra}
        return profile.model_copy(update=changes)

    def _time_batches(self, batches: list[_Batch]) -> None:
        """Time all batches in rounds: the tail is that of the whole time, not of a moment."""
        diffusion = self.family.manifest.diffusion
        for batch in batches:
            run(batch.model, diffusion, batch.workload)
        for done in range(WHOLE_BATCHES):
            self.on_progress(min(self.elapsed_share, 1), "whole batches")
            if done >= LEAST_WHOLE_BATCHES and self.elapsed_share > 1:
                return
            for batch in batches:
                batch.seconds.append(run(batch.model, diffusion, batch.workload))

    def _overhead_bytes(self, batch: _Batch, rank: int) -> int:
        """Bytes that a long batch or a short one needed beyond the prediction."""
        short = [Workload(n=n, guided=False) for n in (1, decoded_together(self.device))]
        missed = (
            memory(batch.model, self.family.manifest.diffusion, workload)
            - int(memory_bytes(self.network, batch.depth, rank, batch.execution, workload))
            for workload in (batch.workload, *short)
        )
        return max(0, *missed)

    def _whole_batch(self, profile: DeviceProfile, execution: Execution, rank: int) -> _Batch:
        """The deepest model, and longest batch, that take about WHOLE_BATCH_SECONDS."""
        deepest, middle = self.sizes.depths[-1], self.sizes.middle.depth
        for depth, n, steps in (
            (deepest, 4, 20),
            (deepest, 4, 10),
            (deepest, 4, 5),
            (middle, 1, 2),
        ):
            workload = Workload(n=n, num_inference_steps=steps)
            if profile.latency_seconds(depth, rank, execution, workload) < WHOLE_BATCH_SECONDS:
                break
        else:
            depth, workload = self.sizes.depths[0], Workload(n=1, num_inference_steps=1)
        model = self._model(depth, rank, execution.mode, execution.dtype)
        return _Batch(execution, depth, workload, model)
