"""Constants of `learngenes.sizing.profile`, measured on this device by the kernels that serve.

A `ComputeTimes` has the seconds of a family's steps in one dtype of computing; a profile is made
of those of every dtype, and of what a process needs.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from learngenes.config import SHARED_MODES, DType, Mode, Size, executable
from learngenes.data.images import as_picture, encode_png
from learngenes.device import (
    compute_dtype,
    decoded_together,
    device_class,
    native_bfloat16,
    packing_threads,
    with_threads,
)
from learngenes.family.family import Family
from learngenes.measuring.model import memory
from learngenes.measuring.steps import (
    SecondsOf,
    batch_of,
    execution_on,
    own_model,
    seconds_a_step,
    step_seconds,
    worked_seconds_a_step,
)
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import memory_bytes
from learngenes.sizing.profile import DeviceProfile, LayerCost
from learngenes.stepping.batch import Batch
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.weights import ModelWeights, SharedWeights

MAX_ROWS = 64
MOST_RANKS = 4
REQUEST_SECONDS = 0.02
"""Seconds of queue, store and pictures of a request, until some were observed."""
HURRIED_ROWS, FEWEST_ROWS = (2, 8), (1, 2)
HURRIED_LAYERS, FEWEST_LAYERS = 3, 2
"""Depths, of those of a family, from which a hurried measurement takes what a layer costs; the
fewest, of the fewest rows, where two steps of the smallest batch take all of its time."""
SERVED_RATIO = 1.05
"""Ratio of what the steps of a request take to those of rounds, in which nothing comes and goes
(measured by turns on two cores)."""
EXPECTED_RATIO = 0.7
"""Ratio of an estimate to what uncompiled kernels take: compiled ones, which follow in minutes,
take half of it (`make bench-start`), and the estimate is to be true before and after."""
PIXEL_ROUNDS = 3
OnProgress = Callable[[float, str], None]
"""Callback with (share that is done, what is measured now)."""


@dataclass(frozen=True)
class ComputeTimes:
    """Seconds of the steps of a family in one dtype of computing."""

    rows: tuple[int, ...]
    step: tuple[float, ...]
    """Seconds of a step without its blocks, for each of `rows`."""
    written_out: tuple[float, ...]
    """Seconds of a block with its W written out, for each of `rows`."""
    factored: dict[int, tuple[float, ...]]
    """The same by factors, for each rank."""
    image_seconds: float
    """Seconds to decode the latents of one image among several, and to write its file."""
    estimated: bool = False


def measure_times(
    shared: SharedWeights,
    kernels: Kernels,
    max_rows: int = MAX_ROWS,
    max_seconds: float = 10.0,
    seconds_of: SecondsOf = seconds_a_step,
) -> ComputeTimes:
    """Measure steps of the deepest and of the shallowest model, of 1, 2, 4, 8, … rows.

    Rows double until a quarter of the time is used up; everything is timed in rounds.
    """
    rows, began = [1, 2], time.perf_counter()
    deepest = own_model(shared, _ranks(shared)[-1], materialised=True)
    while (more := 2 * rows[-1]) <= max_rows and time.perf_counter() - began < max_seconds / 4:
        batch_of([deepest], more, kernels)
        rows.append(more)
    until = time.perf_counter() + max_seconds
    depths = shared.family.manifest.sizes.depths
    return _times(shared, kernels, rows, _ranks(shared), depths, until, seconds_of)


def estimate_times(shared: SharedWeights, kernels: Kernels, max_seconds: float) -> ComputeTimes:
    """The same of two numbers of rows and two ranks, in a hurry, maybe beside other processes."""
    ranks, until = _ranks(shared), time.perf_counter() + max_seconds
    ends = list(dict.fromkeys((ranks[0], ranks[-1])))
    depths, rows, layers = shared.family.manifest.sizes.depths, HURRIED_ROWS, HURRIED_LAYERS
    shallowest = own_model(shared, ranks[-1], materialised=True, depth=depths[0])
    if 2 * seconds_a_step(batch_of([shallowest], FEWEST_ROWS[0], kernels), 1) > max_seconds:
        rows, layers = FEWEST_ROWS, FEWEST_LAYERS

    def expected(batch: Batch, steps: int) -> float:
        lanes = kernels.lanes
        return EXPECTED_RATIO * worked_seconds_a_step(batch, steps, lanes.count * lanes.threads)

    return _times(shared, kernels, rows, ends, depths[:layers], until, expected, estimated=True)


def _times(
    shared: SharedWeights,
    kernels: Kernels,
    rows: Sequence[int],
    ranks: Sequence[int],
    depths: Sequence[int],
    until: float,
    seconds_of: SecondsOf,
    *,
    estimated: bool = False,
) -> ComputeTimes:
    deepest, shallowest = depths[-1], depths[0]
    models: dict[str | int, ModelWeights] = {
        "deep": own_model(shared, ranks[-1], materialised=True, depth=deepest),
        "shallow": own_model(shared, ranks[-1], materialised=True, depth=shallowest),
        **{rank: own_model(shared, rank, materialised=False, depth=deepest) for rank in ranks},
    }
    batches = {
        (name, n): batch_of([model], n, kernels) for name, model in models.items() for n in rows
    }
    rounds = step_seconds(batches, until, seconds_of)
    seconds = {key: SERVED_RATIO * taken for key, taken in rounds.items()}
    written, step = [], []
    factored: dict[int, list[float]] = {rank: [] for rank in ranks}
    for n in rows:
        deep, shallow = seconds["deep", n], seconds["shallow", n]
        layer = (deep - shallow) / (deepest - shallowest) if deepest > shallowest else math.inf
        written.append(min(max(layer, 0.0), deep / deepest))
        step.append(max(0.0, deep - deepest * written[-1]))  # it may be less by rounding
        for rank in ranks:
            factored[rank].append(max(0.0, seconds[rank, n] - step[-1]) / deepest)
    return ComputeTimes(
        rows=tuple(rows),
        step=tuple(step),
        written_out=tuple(written),
        factored={rank: tuple(by_rows) for rank, by_rows in factored.items()},
        image_seconds=_image_seconds(shared.family, kernels),
        estimated=estimated,
    )


def _ranks(shared: SharedWeights) -> list[int]:
    """Some ranks of the family, with both ends."""
    ranks = shared.family.manifest.sizes.ranks
    count = min(MOST_RANKS, len(ranks))
    return sorted({ranks[round(i * (len(ranks) - 1) / max(1, count - 1))] for i in range(count)})


def _image_seconds(family: Family, kernels: Kernels) -> float:
    """Seconds of one image of as many as are decoded at the same time."""
    network, stem = family.manifest.network, family.stem
    together, lanes = decoded_together(stem.positions.device), kernels.lanes
    picture = (network.in_channels, network.sample_size, network.sample_size)
    x = torch.zeros(together, *picture, device=stem.positions.device)

    def decode() -> None:
        for image in stem.pixels(x):
            encode_png(as_picture(image.cpu().numpy()))

    rounds = []
    with torch.inference_mode():
        for _ in range(PIXEL_ROUNDS):
            began = time.perf_counter()
            lanes.run([decode] * lanes.count)
            rounds.append(time.perf_counter() - began)
    return min(rounds) / (together * lanes.count)


def profile_of(
    family: Family,
    times: Mapping[torch.dtype, ComputeTimes],
    process_base_bytes: int,
    memory_overhead_bytes: int = 0,
    *,
    memory_estimated: bool = False,
) -> DeviceProfile:
    """Profile of this device from the times of every dtype that it computes in."""
    device = family.stem.positions.device
    return DeviceProfile(
        device_class=device_class(device),
        torch_version=torch.__version__,
        family=family.manifest.name,
        family_fingerprint=family.fingerprint,
        measured_at=datetime.now(UTC),
        native_bfloat16=native_bfloat16(device),
        packing_threads=packing_threads(device),
        process_base_bytes=process_base_bytes,
        memory_overhead_bytes=memory_overhead_bytes,
        memory_estimated=memory_estimated,
        request_seconds=REQUEST_SECONDS,
        image_seconds=max(each.image_seconds for each in times.values()),
        layers=layer_costs(family, times),
    )


def layer_costs(family: Family, times: Mapping[torch.dtype, ComputeTimes]) -> tuple[LayerCost, ...]:
    """Costs of every execution that computes in one of these dtypes."""
    modes = [*SHARED_MODES, *([] if family.imported is None else [Mode.DENSE])]
    return tuple(
        _layer_cost(times[compute], mode, dtype)
        for mode, dtype in itertools.product(modes, DType)
        if executable(mode, dtype)
        and (compute := compute_dtype(dtype, family.stem.positions.device)) in times
    )


def with_times(
    profile: DeviceProfile, family: Family, times: Mapping[torch.dtype, ComputeTimes]
) -> DeviceProfile:
    """A profile with these times in place of what it had, and nothing observed beside them."""
    fresh = {(cost.mode, cost.dtype): cost for cost in layer_costs(family, times)}
    return profile.unlearned().model_copy(
        update={
            "layers": tuple(fresh.get((cost.mode, cost.dtype), cost) for cost in profile.layers),
            "image_seconds": max(each.image_seconds for each in times.values()),
            "measured_at": datetime.now(UTC),
        }
    )


def _layer_cost(times: ComputeTimes, mode: Mode, dtype: DType) -> LayerCost:
    by_rank = times.factored
    if mode is Mode.DENSE:
        by_rank = {1: times.written_out}
    elif mode is Mode.MATERIALISED:  # the engine multiplies by factors where that is faster
        by_rank = {
            rank: min(seconds, times.written_out, key=lambda by_rows: by_rows[-1])
            for rank, seconds in times.factored.items()
        }
    return LayerCost(
        mode=mode,
        dtype=dtype,
        rows=times.rows,
        ranks=tuple(sorted(by_rank)),
        step_seconds=times.step,
        seconds=tuple(by_rank[rank] for rank in sorted(by_rank)),
        estimated=times.estimated,
    )


def computes(device: torch.device) -> dict[torch.dtype, DType]:
    """Dtypes that a device computes in, each with one that models are stored in."""
    return {compute_dtype(dtype, device): dtype for dtype in reversed(DType)}


def overhead_bytes(family: Family) -> int:
    """Bytes of the allocator that a long batch or a short one needs beyond the prediction."""
    device, network = family.stem.positions.device, family.manifest.network
    sizes = family.manifest.sizes
    size = Size(depth=sizes.depths[0], rank=sizes.middle.rank)
    scales = family.scales_of(size)
    workloads = [Workload.of(num_inference_steps=2)]
    workloads += [Workload.of(n=n, guidance_scale=1) for n in (1, decoded_together(device))]
    kinds = [each for each in itertools.product(SHARED_MODES, DType) if executable(*each)]
    most = 0
    for mode, dtype in kinds:
        model = family.assemble(scales, mode, dtype)
        execution = execution_on(device, mode, dtype)
        for workload in workloads:
            held = memory(model, family.manifest.diffusion, workload)
            predicted = memory_bytes(network, size.depth, size.rank, execution, workload)
            most = max(most, held - int(predicted))
    return most


def estimate_profile(family: Family, process_base_bytes: int, max_seconds: float) -> DeviceProfile:
    """A profile in a hurry, by uncompiled kernels and a guess of what a process needs."""
    device, times = family.stem.positions.device, {}
    wanted, lanes = computes(device), Lanes.of(device)
    with with_threads(lanes.threads), torch.inference_mode():
        for compute, dtype in wanted.items():
            shared = SharedWeights(family, dtype)
            seconds = max_seconds / len(wanted)
            times[compute] = estimate_times(shared, Kernels(lanes=lanes), seconds)
    lanes.close()
    return profile_of(family, times, process_base_bytes, memory_estimated=True)


def measure_profile(
    family: Family,
    process_base_bytes: int,
    max_seconds: float = 40.0,
    on_progress: OnProgress = lambda *_: None,
    kernels_of: Callable[[DType], Kernels] = lambda _: Kernels(),
    memory_overhead_bytes: int | None = None,
) -> DeviceProfile:
    """Measure a whole profile in this process; by default with uncompiled kernels.

    Of a large network the overhead takes many minutes: it may have been measured already.
    """
    times, wanted = {}, computes(family.stem.positions.device)
    with torch.inference_mode():
        for done, (compute, dtype) in enumerate(wanted.items()):
            on_progress(done / (len(wanted) + 1), f"steps in {dtype}")
            shared = SharedWeights(family, dtype)
            times[compute] = measure_times(
                shared, kernels_of(dtype), MAX_ROWS, max_seconds / len(wanted)
            )
    if memory_overhead_bytes is None:
        on_progress(len(wanted) / (len(wanted) + 1), "memory")
        memory_overhead_bytes = overhead_bytes(family)
    on_progress(1, "done")
    return profile_of(family, times, process_base_bytes, memory_overhead_bytes)
