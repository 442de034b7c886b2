"""Memory and seconds that a model takes on this device."""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
from torch import nn

from learngenes.config import DiffusionConfig, Scheduler
from learngenes.device import peak_bytes, process_peak_bytes, synchronise
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.sampling import sample
from learngenes.sizing.budget import Cost, Workload

LATENCY_RUNS = 100
MIN_LATENCY_RUNS = 5


@dataclass(frozen=True)
class Measurement:
    cost: Cost
    """Memory by the scheduler that needs most; the process's since its start."""
    latency_runs: int


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; those that layers share count once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def run(
    model: DiT | DenseDiT,
    diffusion: DiffusionConfig,
    workload: Workload,
    scheduler: Scheduler = Scheduler.DDIM,
) -> float:
    """Sample one batch as `workload` says; returns the seconds it took."""
    labels = [i % model.config.num_classes for i in range(workload.n)]
    started = time.perf_counter()
    sample(
        model,
        diffusion,
        labels,
        range(workload.n),
        num_inference_steps=workload.num_inference_steps,
        guidance_scale=2.0 if workload.guided else 1.0,
        scheduler=scheduler,
    )
    synchronise(model.stem.positions.device)
    return time.perf_counter() - started


def memory(model: DiT | DenseDiT, diffusion: DiffusionConfig, workload: Workload) -> int:
    """Bytes of weights and peak activations of one batch."""
    short = dataclasses.replace(workload, num_inference_steps=2)
    device = model.stem.positions.device
    activations = max(
        peak_bytes(lambda name=name: run(model, diffusion, short, name), device)  # type: ignore[misc]
        for name in Scheduler
    )
    return parameter_bytes(model) + activations


def measure(
    model: DiT,
    diffusion: DiffusionConfig,
    workload: Workload,
    max_seconds: float = 30.0,
    least_runs: int = MIN_LATENCY_RUNS,
) -> Measurement:
    """Sample batches as `workload` says, measuring memory and seconds.

    After `max_seconds` no batch beyond the `least_runs` first ones is timed.
    """
    run(model, diffusion, dataclasses.replace(workload, num_inference_steps=1))
    seconds: list[float] = []
    while len(seconds) < LATENCY_RUNS and (len(seconds) < least_runs or sum(seconds) < max_seconds):
        seconds.append(run(model, diffusion, workload))
    process_bytes = process_peak_bytes(model.stem.positions.device)  # the profiler takes some, too
    return Measurement(
        Cost(
            memory_bytes=memory(model, diffusion, workload),
            process_memory_bytes=process_bytes,
            latency_seconds=float(np.median(seconds)),
            latency_p95_seconds=float(np.quantile(seconds, 0.95)),
        ),
        latency_runs=len(seconds),
    )
