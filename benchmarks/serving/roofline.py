"""Check 2: how much of a full batch's time its matrix products would take at their best.

The best is each product alone, of a lane's shape and dtype, in all lanes at once, repeated. What is
left is the share that everything else costs; a profile says where it goes.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import Figures, say
from benchmarks.serving.engine import compiled_kernels
from benchmarks.serving.subjects import family
from learngenes.config import DType, NetworkConfig, SizeSpace
from learngenes.device import with_threads
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import write_synthetic_family
from learngenes.measuring.steps import batch_of, own_model
from learngenes.stepping import arithmetic
from learngenes.stepping.arithmetic import BLOCK_KINDS
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.weights import SharedWeights

ROWS = 64
REPETITIONS = 20
WIDE = NetworkConfig(
    sample_size=32,
    in_channels=4,
    patch_size=2,
    width=384,
    num_attention_heads=6,
    num_classes=10,
    depth=4,
    rank=384,
)
"""The width and tokens of DiT-S/2 at 256 x 256, four layers of it; random weights."""


_VISIBLE = Kernels(
    torch.compile(arithmetic.embed),
    torch.compile(arithmetic.materialised_block),
    torch.compile(arithmetic.factored_block),
    torch.compile(arithmetic.finish),
)
"""Kernels on one lane, with products that a profile sees."""


def measure() -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        write_synthetic_family(Path(directory), WIDE, SizeSpace(depths=(4,), ranks=(384,)))
        wide = load_family(Path(directory))
    figures = {
        f"{name} {dtype}": _of(loaded, dtype)
        for name, loaded in (("fashion", family()), ("wide", wide))
        for dtype in (DType.BFLOAT16, DType.FLOAT32)
    }
    for name, figure in figures.items():
        say(name, **figure)
    return {"gemm_peak_share": figures["fashion bfloat16"]["gemm_peak_share"], "of": figures}


@torch.inference_mode()
def _of(loaded: Family, dtype: DType) -> Figures:
    shared = SharedWeights(loaded, dtype)
    lanes = Lanes.of(shared.device)
    kernels = compiled_kernels(loaded, dtype, lanes)
    products = _products(shared, ROWS // lanes.count)
    with with_threads(lanes.threads):
        model = own_model(shared, shared.network.rank, materialised=True)
        batch = batch_of([model], ROWS, kernels)
        at_best = [functools.partial(lanes.run, [product] * lanes.count) for product, _ in products]
        step_seconds, *each = _medians([batch.step, *at_best])
        profiled = _profile(batch_of([model], ROWS, _VISIBLE).step)
    depth = loaded.manifest.sizes.depths[-1]
    flops = depth * lanes.count * sum(flops for _, flops in products)
    at_peak_seconds = depth * sum(each)
    return {
        "rows": ROWS,
        "step_seconds": round(step_seconds, 5),
        "achieved_gflops": round(flops / step_seconds / 1e9, 1),
        "peak_gflops_of_these_shapes": round(flops / at_peak_seconds / 1e9, 1),
        "gemm_peak_share": round(at_peak_seconds / step_seconds, 3),
        "profile": profiled,
    }


def _products(shared: SharedWeights, rows: int) -> list[tuple[Callable[[], Tensor], int]]:
    """Matrix products of one layer, of so many rows, and the FLOPs of each."""
    n, dtype = shared.network, shared.compute
    tokens, head = rows * n.tokens, n.width // n.num_attention_heads
    products: list[tuple[Callable[[], Tensor], int]] = []
    for outputs, inputs in (kind.shape(n.width) for kind in BLOCK_KINDS):
        x, w = torch.randn(tokens, inputs, dtype=dtype), torch.randn(inputs, outputs, dtype=dtype)
        products.append((functools.partial(torch.mm, x, w), 2 * tokens * inputs * outputs))
    q = torch.randn(rows * n.num_attention_heads, n.tokens, head, dtype=dtype)
    scores = torch.randn(len(q), n.tokens, n.tokens, dtype=dtype)
    attention_flops = 2 * rows * n.tokens**2 * n.width
    products.append((functools.partial(torch.bmm, q, q.transpose(1, 2)), attention_flops))
    products.append((functools.partial(torch.bmm, scores, q), attention_flops))
    return products


def _medians(works: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each, at once after a run that is not counted, so that caches hold what they can.

    In rounds: the speed of a machine may change within seconds.
    """
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(REPETITIONS):
        for work, seconds in zip(works, taken, strict=True):
            work()
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def _profile(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time: products of tokens and of attention, element-wise kernels, the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            step()
    shares = dict.fromkeys(("products", "attention", "element-wise", "other"), 0.0)
    attention = "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu"
    for event in recorded.key_averages():
        if event.key in attention:
            kind = "attention"
        elif event.key in ("aten::mm", "aten::addmm"):
            kind = "products"
        else:
            kind = "element-wise" if "CompiledFxGraph" in event.key else "other"
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(share / total, 3) for kind, share in shares.items()}
