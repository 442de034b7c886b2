"""Memory and seconds that a model takes on this device."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from learngenes.config import DiffusionConfig, Scheduler
from learngenes.device import peak_bytes, process_peak_bytes, synchronise
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.sampling import sample
from learngenes.sizing.budget import Cost, Workload

MOST_RUNS = 5
RUNS_SECONDS = 1.0
"""Seconds after which no further batch is run."""


@dataclass(frozen=True)
class Measurement:
    cost: Cost
    """Memory by the scheduler that needs most; the process's since its start. Latency is that of
    uncompiled batches in this process."""
    overhead_bytes: int = 0
    """Bytes that batches of the family need beyond the prediction."""


def parameter_bytes(*models: nn.Module) -> int:
    """Bytes of parameters and buffers; those that layers or models share count once."""
    together = nn.ModuleList(models)
    tensors = (*together.parameters(), *together.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def run(
    model: DiT | DenseDiT,
    diffusion: DiffusionConfig,
    workload: Workload,
    guide: DiT | DenseDiT | None = None,
) -> float:
    """Sample one batch as `workload` says; returns the seconds it took."""
    labels = [i % model.config.num_classes for i in range(workload.n)]
    how = {**dict(workload.sampling), "guide": guide}
    started = time.perf_counter()
    sample(model, diffusion, labels, range(workload.n), **how)
    synchronise(model.stem.positions.device)
    return time.perf_counter() - started


def memory(
    model: DiT | DenseDiT,
    diffusion: DiffusionConfig,
    workload: Workload,
    guide: DiT | DenseDiT | None = None,
) -> int:
    """Bytes of weights and peak activations of one batch, by the scheduler that needs most."""
    device = model.stem.positions.device
    briefly: dict[str, object] = {"num_inference_steps": 2}
    briefly |= {"guidance_start": 0.0, "guidance_stop": 1.0}
    if not workload.guided_steps:
        briefly["guidance_scale"] = 1.0

    def batch(scheduler: Scheduler) -> Callable[[], float]:
        sampling = workload.sampling.model_copy(update={**briefly, "scheduler": scheduler})
        short = dataclasses.replace(workload, sampling=sampling)
        return lambda: run(model, diffusion, short, guide)

    activations = max(peak_bytes(batch(scheduler), device) for scheduler in Scheduler)
    return parameter_bytes(model, *([] if guide is None else [guide])) + activations


def measure(
    model: DiT, diffusion: DiffusionConfig, workload: Workload, guide: DiT | None = None
) -> Measurement:
    """Run some batches as `workload` says, measuring memory and seconds."""
    once = workload.sampling.model_copy(update={"num_inference_steps": 1})
    run(model, diffusion, dataclasses.replace(workload, sampling=once), guide)
    seconds = [run(model, diffusion, workload, guide)]
    while len(seconds) < MOST_RUNS and sum(seconds) < RUNS_SECONDS:
        seconds.append(run(model, diffusion, workload, guide))
    process_bytes = process_peak_bytes(model.stem.positions.device)  # the profiler takes some, too
    return Measurement(
        Cost(
            memory_bytes=memory(model, diffusion, workload, guide),
            process_memory_bytes=process_bytes,
            latency_seconds=float(np.median(seconds)),
            latency_p95_seconds=float(np.quantile(seconds, 0.95)),
        )
    )
