"""The parts of `benchmarks.gpu.check`: `python -m benchmarks.gpu.parts NAME` prints JSON."""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from learngenes import nvml
from learngenes.config import SHARED_MODES, DType, Mode, Sampling, Size, executable
from learngenes.device import (
    capacity_bytes,
    compute_dtype,
    default_device,
    device_class,
    device_id,
    native_bfloat16,
    process_peak_bytes,
    synchronise,
    use_exact_float32,
    with_threads,
)
from learngenes.family.family import Family, load_family
from learngenes.measuring.device import measure_profile
from learngenes.measuring.model import measure
from learngenes.measuring.steps import batch_of, execution_on, own_model, seconds_a_step
from learngenes.model.diffusion import noise_process, step_generator, training_batch
from learngenes.model.sampling import sample
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import memory_bytes
from learngenes.stepping import arithmetic
from learngenes.stepping.kernels import CompiledGraphs, Kernels, graphs
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.weights import SharedWeights, kept
from learngenes.training.network import FactorisedDiT, compiled_parts
from worker.sampling.engine import Engine
from worker.sampling.jobs import SampleRequest

Figures = dict[str, Any]

ROOT = Path(__file__).parent.parent.parent
FAMILIES = tuple(path.parent.name for path in sorted((ROOT / "families").glob("*/family.json")))
GIB = 2**30
ROWS = (2, 8, 32, 64, 256)
COMPOSITIONS = 30
PEAK_TFLOPS = {
    "h200": 989.0,
    "h100": 989.0,
    "a100": 312.0,
    "l40s": 362.0,
    "l4": 121.0,
    "a10g": 70.0,
    "t4": 65.0,
    "4090": 165.0,
    "3090": 71.0,
}
"""Dense bfloat16 (of a T4 float16) TFLOP/s by a part of the card's name, from the data sheets."""
XL = {"width": 1152, "heads": 16, "tokens": 256, "depth": 28}

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
SECONDS = 4.0 if ON_GPU else 0.5


def shipped(name: str = "fashion") -> Family:
    return load_family(ROOT / "families" / name).to(DEVICE)


def environment() -> Figures:
    torch.zeros(1, device=DEVICE)
    figures: Figures = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device_class": device_class(DEVICE),
        "bfloat16": native_bfloat16(DEVICE),
        "capacity_bytes": capacity_bytes(DEVICE),
        "process_bytes": process_peak_bytes(DEVICE),
    }
    if ON_GPU:
        held = nvml.process_bytes(device_id(DEVICE))
        figures |= {
            "nvml_process_bytes": held,
            "nvml_others_bytes": nvml.others_bytes(device_id(DEVICE)),
            "capability": list(torch.cuda.get_device_capability()),
        }
    return figures


def correctness() -> Figures:
    """Pixels beside those of a CPU, and of a mixed batch beside those alone."""
    figures: Figures = {}
    for name in FAMILIES if ON_GPU else ("fashion",):
        here, there = shipped(name), load_family(ROOT / "families" / name)
        size = here.manifest.sizes.middle
        for mode in SHARED_MODES:
            for dtype in DType:
                if not executable(mode, dtype):
                    continue
                ours, theirs = (_pixels(f, size, mode, dtype) for f in (here, there))
                apart = np.abs(ours - theirs)
                figures[f"{name} {mode} {dtype}"] = {
                    "largest": int(apart.max()),
                    "mean": round(float(apart.mean()), 4),
                    "equal_share": round(float((apart == 0).mean()), 4),
                }
    figures["mixed_over_alone"] = _mixed()
    return figures


def _pixels(family: Family, size: Size, mode: Mode, dtype: DType) -> np.ndarray[Any, Any]:
    model = family.assemble(family.own_of(size, mode, dtype), mode, dtype)
    sampled = sample(model, family.manifest.diffusion, [0, 1], [0, 1], **dict(Sampling()))
    return sampled.cpu().numpy().astype(int)


def _requests(family: Family, count: int, steps: int = 10) -> list[SampleRequest]:
    """Requests for sizes and classes by chance, some guided."""
    chance, sizes = random.Random(0), family.manifest.sizes
    asked = []
    for number in range(count):
        size = Size(depth=chance.choice(sizes.depths), rank=chance.choice(sizes.ranks))
        mode = chance.choice(SHARED_MODES)
        dtype = chance.choice((DType.FLOAT32, DType.BFLOAT16))
        own = family.own_of(size, mode, dtype)
        asked.append(
            SampleRequest(
                family=family,
                model=str(number),
                artifact="",
                depth=size.depth,
                rank=size.rank,
                mode=mode,
                dtype=dtype,
                load=lambda own=own, mode=mode, dtype=dtype: kept(own, family, mode, dtype),  # type: ignore[misc]
                class_labels=[number % family.manifest.network.num_classes] * 2,
                seeds=[number, number + 1],
                sampling=Sampling(num_inference_steps=steps, guidance_scale=1 + number % 2),
            )
        )
    return asked


@contextlib.contextmanager
def _engine(family: Family, budget_bytes: int | None = None) -> Any:
    engine = Engine([family], budget_bytes or capacity_bytes(DEVICE))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _images(engine: Engine, requests: Sequence[SampleRequest]) -> list[np.ndarray[Any, Any]]:
    jobs = [engine.submit(request) for request in requests]
    for job in jobs:
        job.wait()
    return [np.stack(job.images()).astype(int) for job in jobs]


def _mixed() -> Figures:
    requests = _requests(shipped(), 12 if ON_GPU else 4)
    with _engine(requests[0].family) as engine:
        alone = [_images(engine, [request])[0] for request in requests]
        together = _images(engine, requests)
    apart = [np.abs(a - b) for a, b in zip(alone, together, strict=True)]
    return {
        "requests": len(requests),
        "equal": sum(int(a.max() == 0) for a in apart),
        "largest": int(max(a.max() for a in apart)),
    }


def memory() -> Figures:
    """What models are predicted and measured to take, alone and beside one that holds 4 GiB."""
    family = shipped()
    alone = _measured_memory(family)
    if not ON_GPU:
        return {"alone": alone}
    hold = f"import torch, time; x = torch.empty({4 * GIB}, dtype=torch.uint8, device='cuda'); "
    code = hold + "print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holding:
        assert holding.stdout is not None
        holding.stdout.readline()
        beside = _measured_memory(family)
        others = nvml.others_bytes(device_id(DEVICE))
        holding.kill()
    return {"alone": alone, "beside_4_gib": beside, "nvml_others_bytes": others}


def _measured_memory(family: Family) -> Figures:
    figures: Figures = {}
    network, workload = family.manifest.network, Workload.of(n=4)
    for size in (family.manifest.sizes.smallest, family.full_size):
        for mode in SHARED_MODES:
            dtype = DType.BFLOAT16
            model = family.assemble(family.own_of(size, mode, dtype), mode, dtype)
            cost = measure(model, family.manifest.diffusion, workload).cost
            execution = execution_on(DEVICE, mode, dtype)
            predicted = int(memory_bytes(network, size.depth, size.rank, execution, workload))
            figures[f"{size} {mode}"] = {
                "predicted_bytes": predicted,
                "measured_bytes": cost.memory_bytes,
                "process_bytes": cost.process_memory_bytes,
            }
    return figures


def step() -> Figures:
    """Steps uncompiled, compiled, and each of them captured whole."""
    family = shipped()
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        compiled = _compiled(family, Path(directory))
        compile_seconds = round(time.monotonic() - began, 1)
        figures: Figures = {"compile_seconds": compile_seconds}
        ways = {"uncompiled": Kernels(lanes=Lanes.of(DEVICE)), "compiled": compiled}
        for name, kernels in ways.items():
            if isinstance(kernels, str):
                figures[name] = {"error": kernels}
                continue
            for whole in (False, True) if ON_GPU else (False,):
                os.environ["FINESERVE_CUDA_GRAPHS"] = str(whole).lower()
                told = f"{name}, captured" if whole else name
                figures[told] = _stepped(family, kernels)
    return figures


def _compiled(family: Family, directory: Path) -> Kernels | str:
    """Kernels, or why there are none."""
    made = CompiledGraphs(directory)
    os.environ.update(made.environment)
    wanted = graphs(family.manifest.network, DType.BFLOAT16)
    try:
        for graph in wanted:
            made.compile(graph)
        return made.load(wanted, Lanes.of(DEVICE))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[-500:]


@torch.inference_mode()
def _stepped(family: Family, kernels: Kernels) -> Figures:
    shared = SharedWeights(family, DType.BFLOAT16)
    full = own_model(shared, family.full_size.rank, materialised=True)
    speeds = {}
    for rows in ROWS if ON_GPU else ROWS[:2]:
        batch = batch_of([full], rows, kernels)
        seconds_a_step(batch, 5)
        speeds[rows] = round(rows / seconds_a_step(batch, 20))
    chance, sizes = random.Random(1), family.manifest.sizes
    first, later = [], []
    for _ in range(COMPOSITIONS if ON_GPU else 3):
        models = [
            own_model(
                shared,
                chance.choice(sizes.ranks),
                materialised=chance.random() < 0.5,
                depth=chance.choice(sizes.depths),
            )
            for _ in range(chance.randint(1, 6))
        ]
        began = time.perf_counter()
        batch = batch_of(models, chance.randint(1, 4), kernels)
        synchronise(DEVICE)
        first.append(time.perf_counter() - began)
        later += [seconds_a_step(batch, 1) for _ in range(8)]
    return {
        "rows_per_second": speeds,
        "composed_ms": _spread(first),
        "step_ms": _spread(later),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def failures() -> Figures:
    """Too much for the memory there is, and an error after which nothing works."""
    family = shipped()
    requests = _requests(family, 40 if ON_GPU else 6, steps=4)
    with _engine(family, 200_000_000) as engine:
        images = _images(engine, requests)
        survived = all(len(each) == 2 for each in images)
    figures: Figures = {"overload_survived": survived}
    if ON_GPU:
        code = (
            "import torch; from learngenes.device import require_usable\n"
            "x = torch.zeros(4, device='cuda')\n"
            "try:\n    x[torch.tensor([9], device='cuda')].sum().item()\n"
            "except RuntimeError: pass\n"
            "require_usable(x.device)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        figures["device_assert_ends_the_child"] = done.returncode != 0
        torch.zeros(1, device=DEVICE).add_(1)
        figures["and_not_the_parent"] = True
    return figures


def promises() -> Figures:
    """Latency predicted by a profile, and served by the engine, of six sizes."""
    family = shipped()
    lanes = Lanes.of(DEVICE)
    with with_threads(lanes.threads):  # as the engine steps
        profile = measure_profile(
            family, 0, 20 if ON_GPU else 2, kernels_of=lambda _: Kernels(lanes=lanes)
        )
    sizes, workload = family.manifest.sizes, Workload.of(n=4)
    figures: Figures = {}
    ratios = []
    with _engine(family) as engine:
        for depth in (sizes.depths[0], sizes.middle.depth, sizes.depths[-1]):
            for rank in (sizes.ranks[0], sizes.ranks[-1]):
                size = Size(depth=depth, rank=rank)
                execution = next(
                    e
                    for e in profile.executions
                    if (e.mode, e.dtype) == (Mode.MATERIALISED, DType.BFLOAT16)
                )
                predicted = float(profile.latency_seconds(depth, rank, execution, workload))
                served = _served(engine, family, size, workload)
                ratios.append(served / predicted)
                figures[str(size)] = {
                    "predicted_ms": round(1000 * predicted, 2),
                    "served_ms": round(1000 * served, 2),
                }
    error = statistics.median(abs(ratio - 1) for ratio in ratios)
    return {"sizes": figures, "median_error": round(error, 3)}


def _served(engine: Engine, family: Family, size: Size, workload: Workload) -> float:
    request = SampleRequest(
        family=family,
        model=str(size),
        artifact="",
        depth=size.depth,
        rank=size.rank,
        mode=Mode.MATERIALISED,
        dtype=DType.BFLOAT16,
        load=lambda: family.own_of(size, Mode.MATERIALISED, DType.BFLOAT16),
        class_labels=list(range(workload.n)),
        seeds=list(range(workload.n)),
        sampling=workload.sampling,
    )
    seconds = []
    for _ in range(6 if ON_GPU else 2):
        began = time.perf_counter()
        job = engine.submit(request)
        job.wait()
        job.images()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def dit_xl() -> Figures:
    """A block of DiT-XL/2's shapes with random weights: rows a second of all its blocks."""
    d, tokens, depth = XL["width"], XL["tokens"], XL["depth"]
    dtype = compute_dtype(DType.BFLOAT16, DEVICE)
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    weights = tuple(0.02 * torch.randn(1, n, m, device=DEVICE, dtype=dtype) for m, n in shapes)
    bias = torch.zeros(1, 9 * d, device=DEVICE, dtype=dtype)
    products = sum(2 * m * n for m, n in shapes) * tokens + 4 * tokens * tokens * d
    figures: Figures = {}
    for rows in ROWS if ON_GPU else (2,):
        h = torch.randn(1, rows, tokens, d, device=DEVICE, dtype=dtype)
        modulation = torch.zeros(1, rows, 6 * d, device=DEVICE, dtype=dtype)
        seconds = _timed(
            lambda h=h, m=modulation: arithmetic.materialised_block(  # type: ignore[misc]
                h, m, weights, bias, XL["heads"]
            )
        )
        tflops = products * rows / seconds / 1e12
        figures[str(rows)] = {
            "rows_per_second": round(rows / (seconds * depth), 2),
            "tflops": round(tflops, 2),
            "share_of_the_data_sheet": _share(tflops),
        }
    return figures


def _share(tflops: float) -> float | None:
    name = device_class(DEVICE)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if peak is None else round(tflops / peak, 3)


def _timed(work: Callable[[], object]) -> float:
    """Seconds of a call, in the median of as many as fit."""
    for _ in range(3):
        work()
    synchronise(DEVICE)
    seconds, until = list[float](), time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(seconds) < 3:
        began = time.perf_counter()
        work()
        synchronise(DEVICE)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def training() -> Figures:
    """Images a second of steps of the full size, with made-up images."""
    manifest = shipped().manifest
    network, batch = manifest.network, 128 if ON_GPU else 16
    model = FactorisedDiT(network, manifest.sizes.depths).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    process = noise_process(manifest.diffusion)
    images = torch.rand(batch, network.in_channels, network.sample_size, network.sample_size)
    labels = torch.arange(batch, device=DEVICE) % network.num_classes
    model.parts = compiled_parts() if ON_GPU else model.parts
    generator = step_generator(0, 0)

    def one() -> None:
        noisy, timesteps, target = training_batch(process, images.to(DEVICE), generator)
        enabled = native_bfloat16(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            prediction = model(noisy, timesteps, labels, network.depth)
        F.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"images_per_second": round(batch / _timed(one), 1), "batch": batch}


PARTS: dict[str, Callable[[], Figures]] = {
    "environment": environment,
    "correctness": correctness,
    "memory": memory,
    "step": step,
    "failures": failures,
    "promises": promises,
    "dit_xl": dit_xl,
    "training": training,
}

if __name__ == "__main__":
    use_exact_float32()
    sys.stdout.write(json.dumps(PARTS[sys.argv[1]]()) + "\n")
