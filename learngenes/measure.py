"""What a model really needs on this device."""

import time
from dataclasses import dataclass

from learngenes.config import DiffusionConfig
from learngenes.device import peak_bytes, synchronise
from learngenes.dit import DiT
from learngenes.sampling import OnStep, sample

LATENCY_RUNS = 5
LATENCY_SECONDS = 30.0


@dataclass(frozen=True)
class Measurement:
    memory_bytes: int
    """Weights and peak activations of one batch."""
    latency_p95_seconds: float
    """Of one batch; with so few runs, the slowest."""


def parameter_bytes(model: DiT) -> int:
    """Parameters and buffers; what layers share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def measure(
    model: DiT,
    diffusion: DiffusionConfig,
    *,
    n: int,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: OnStep | None = None,
) -> Measurement:
    """Sample batches of `n` images and watch memory and clock; `on_step` may raise to stop.

    No further batch is timed once LATENCY_SECONDS are over.
    """
    device = model.stem.positions.device
    labels = [i % model.config.num_classes for i in range(n)]

    def run(steps: int) -> None:
        sample(
            model,
            diffusion,
            labels,
            range(n),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
        synchronise(device)

    activations = peak_bytes(lambda: run(3), device)
    seconds = []
    for _ in range(LATENCY_RUNS):
        started = time.perf_counter()
        run(num_inference_steps)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > LATENCY_SECONDS:
            break
    return Measurement(parameter_bytes(model) + activations, max(seconds))
