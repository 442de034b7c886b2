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


def measure(model: DiT, diffusion: DiffusionConfig, workload: Workload) -> Measurement:
    """Run some batches as `workload` says, measuring memory and seconds."""
    run(model, diffusion, dataclasses.replace(workload, num_inference_steps=1))
    seconds = [run(model, diffusion, workload)]
    while len(seconds) < MOST_RUNS and sum(seconds) < RUNS_SECONDS:
        seconds.append(run(model, diffusion, workload))
    process_bytes = process_peak_bytes(model.stem.positions.device)  # the profiler takes some, too
    return Measurement(
        Cost(
            memory_bytes=memory(model, diffusion, workload),
            process_memory_bytes=process_bytes,
            latency_seconds=float(np.median(seconds)),
            latency_p95_seconds=float(np.quantile(seconds, 0.95)),
        )
    )
