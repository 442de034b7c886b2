"""The engine of this process, with models made on the spot: no server, no broker."""

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from benchmarks.parts import REPOSITORY
from benchmarks.serving.subjects import STEPS
from benchmarks.serving.subjects import family as fashion
from learngenes.config import DType, Mode, Sampling, Scheduler, Size
from learngenes.device import compute_dtype, with_threads
from learngenes.family.family import Family
from learngenes.stepping.kernels import CompiledGraphs, Kernels, graphs
from learngenes.stepping.lanes import Lanes
from worker.sampling.engine import Engine
from worker.sampling.jobs import SampleRequest

BUDGET_BYTES = 4 * 10**9


def compiled_kernels(loaded: Family, dtype: DType, lanes: Lanes) -> Kernels:
    """Kernels of a family, compiled in this process where no worker did before."""
    compiled = CompiledGraphs(REPOSITORY / "var" / "kernels")
    os.environ.update(compiled.environment)
    wanted = graphs(loaded.manifest.network, dtype)
    for graph in wanted:
        compiled.compile(graph)
    return compiled.load(wanted, lanes)


@contextmanager
def engine(
    budget_bytes: int = BUDGET_BYTES, family: Family | None = None
) -> Iterator[tuple[Engine, Family]]:
    """An engine that serves a family, `fashion` by default."""
    with with_threads(1):
        loaded = family or fashion()
    started = Engine([loaded], budget_bytes)
    started.start()
    for dtype in (DType.BFLOAT16, DType.FLOAT32):
        compute = compute_dtype(dtype, loaded.stem.positions.device)
        started.use(loaded, compute, compiled_kernels(loaded, dtype, started.lanes))
    try:
        yield started, loaded
    finally:
        started.stop()


def request(
    loaded: Family,
    size: Size,
    number: int,
    *,
    mode: Mode = Mode.MATERIALISED,
    dtype: DType = DType.BFLOAT16,
    labels: Sequence[int] = (0,),
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    guidance_scale: float = 2.0,
    scheduler: Scheduler = Scheduler.DDIM,
) -> SampleRequest:
    """Request to the model `number` of a size: its Sigma is a copy of the family's."""
    return SampleRequest(
        family=loaded,
        model=f"L{size.depth} r{size.rank} {mode} {dtype} {number}",
        artifact="",
        depth=size.depth,
        rank=size.rank,
        mode=mode,
        dtype=dtype,
        load=lambda: loaded.scales_of(size),
        class_labels=labels,
        seeds=seeds,
        sampling=Sampling(
            num_inference_steps=steps, guidance_scale=guidance_scale, scheduler=scheduler
        ),
    )


def images_per_second(
    started: Engine, requests: Sequence[SampleRequest], clients: int, seconds: float
) -> float:
    """Speed for `clients` threads that send one request after the other, after a second."""
    begin = time.perf_counter() + 1
    end = begin + seconds
    answered: list[float] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.perf_counter() < end:
            ticket = started.submit(chance.choice(requests))
            ticket.wait()
            ticket.images()
            answered.append(time.perf_counter())

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(np.sum([begin <= moment < end for moment in answered])) / seconds
