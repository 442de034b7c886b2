"""Check 5: random families, profiles and constraints against one size after another."""

import math
import random
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks.parts import Figures, say
from learngenes.config import DType, Mode, NetworkConfig, SizeSpace, executable
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.cost import Execution, memory_bytes, shared_bytes
from learngenes.sizing.profile import DeviceProfile, LayerCost
from learngenes.sizing.quality import QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, solve

CASES = 10_000
Size = tuple[float, float, float, float]
"""Quality, median latency, 95th percentile, memory of the scope."""


def measure() -> Figures:
    chance = random.Random(5)
    beaten = feasible = infeasible = impossible = 0
    for _ in range(CASES):
        network, sizes = _family(chance)
        quality, profile = _quality(chance, sizes), _profile(chance, sizes)
        workload = Workload(
            n=chance.choice((1, 2, 4, 16)),
            num_inference_steps=chance.choice((1, 10, 50)),
            guided=chance.random() < 0.5,
        )
        constraints = _constraints(chance, sizes)
        best = brute_force(network, sizes, quality, profile, workload, constraints)
        try:
            plan = solve(
                Candidates.of(network, sizes, quality, profile, workload), constraints
            ).plan
        except Impossible:
            impossible += 1
            beaten += best is not None
            continue
        except Infeasible:
            infeasible += 1
            beaten += best is not None
            continue
        feasible += 1
        assert best is not None
        cost = plan.predicted
        same = math.isclose(plan.quality, best[0], rel_tol=1e-12)
        slower = cost.latency_seconds > best[1] * (1 + 1e-12)
        beaten += plan.quality < best[0] * (1 - 1e-12) or (same and slower)
    figures = {
        "bruteforce_cases": CASES,
        "bruteforce_beaten": beaten,
        "feasible": feasible,
        "infeasible": infeasible,
        "contradictory": impossible,
    }
    say("against brute force:", **figures)
    return figures


def brute_force(
    network: NetworkConfig,
    sizes: SizeSpace,
    quality: QualityTable,
    profile: DeviceProfile,
    workload: Workload,
    constraints: Constraints,
) -> Size | None:
    """The best of all sizes, looked at one by one: quality, then latency."""
    best: Size | None = None
    for execution in profile.executions:
        for depth in sizes.depths:
            for rank in sizes.ranks:
                if _excluded(constraints, execution, depth, rank):
                    continue
                ratio = quality.dtype_loss_ratios.get(execution.dtype)
                if ratio is None:
                    continue
                size = _size(
                    *(network, quality, profile, workload, constraints),
                    *(execution, depth, rank, ratio),
                )
                if _keeps(size, constraints) and (
                    best is None or (size[0], -size[1]) > (best[0], -best[1])
                ):
                    best = size
    return best


def _excluded(constraints: Constraints, execution: Execution, depth: int, rank: int) -> bool:
    fixed = (
        (constraints.depth, depth),
        (constraints.rank, rank),
        (constraints.mode, execution.mode),
        (constraints.dtype, execution.dtype),
    )
    return any(wanted is not None and wanted != value for wanted, value in fixed)


def _size(
    network: NetworkConfig,
    quality: QualityTable,
    profile: DeviceProfile,
    workload: Workload,
    constraints: Constraints,
    execution: Execution,
    depth: int,
    rank: int,
    loss_ratio: float,
) -> Size:
    """Quality by a plain bilinear formula, costs by one call for this size alone."""
    memory = int(memory_bytes(network, depth, rank, execution, workload))
    memory += profile.memory_overhead_bytes
    if constraints.mem_scope == "process":
        shared = int(shared_bytes(network, np.int64(rank), execution))
        memory += memory // 20 + profile.process_base_bytes - shared
    latency = float(profile.latency_seconds(depth, rank, execution, workload))
    loss = _loss(quality, depth, rank) * max(1.0, loss_ratio)
    best = min(min(row) for row in quality.retrained)
    return best / loss, latency, latency * profile.p95_ratio, memory


def _loss(quality: QualityTable, depth: int, rank: int) -> float:
    def cell(i: int, j: int) -> float:
        """The least loss of what is no larger."""
        return min(quality.retrained[a][b] for a in range(i + 1) for b in range(j + 1))

    i, depth_weight = _place(quality.depths, depth, lambda value: value)
    j, rank_weight = _place(quality.ranks, rank, math.log)
    i1, j1 = min(i + 1, len(quality.depths) - 1), min(j + 1, len(quality.ranks) - 1)
    low = cell(i, j) * (1 - rank_weight) + cell(i, j1) * rank_weight
    high = cell(i1, j) * (1 - rank_weight) + cell(i1, j1) * rank_weight
    return low * (1 - depth_weight) + high * depth_weight


def _place(axis: tuple[int, ...], value: int, scale: Any) -> tuple[int, float]:
    """The grid point at or below, and how far it is to the next."""
    if value <= axis[0]:
        return 0, 0.0
    if value >= axis[-1]:
        return len(axis) - 1, 0.0
    i = max(k for k, point in enumerate(axis) if point <= value)
    return i, (scale(value) - scale(axis[i])) / (scale(axis[i + 1]) - scale(axis[i]))


def _keeps(size: Size, constraints: Constraints) -> bool:
    quality, _, p95, memory = size
    c = constraints
    return (
        (c.max_mem_bytes is None or memory <= c.max_mem_bytes)
        and (c.max_latency_seconds is None or p95 <= c.max_latency_seconds)
        and (c.min_quality is None or quality >= c.min_quality)
    )


def _family(chance: random.Random) -> tuple[NetworkConfig, SizeSpace]:
    heads = chance.choice((2, 4))
    width = 8 * heads * chance.randint(1, 8)
    depths = sorted(chance.sample(range(2, 30), chance.randint(1, 4)))
    ranks = sorted(chance.sample(range(4, 2 * width + 1), chance.randint(1, 4)))
    network = NetworkConfig(
        sample_size=chance.choice((8, 16, 32)),
        in_channels=chance.choice((1, 3, 4)),
        patch_size=2,
        width=width,
        num_attention_heads=heads,
        num_classes=10,
        depth=depths[-1],
        rank=ranks[-1],
    )
    return network, SizeSpace(depths=tuple(depths), ranks=tuple(ranks))


def _quality(chance: random.Random, sizes: SizeSpace) -> QualityTable:
    """Any losses at all, on a grid of some of the sizes."""
    depths = sorted(chance.sample(sizes.depths, chance.randint(1, len(sizes.depths))))
    ranks = sorted(chance.sample(sizes.ranks, chance.randint(1, len(sizes.ranks))))
    losses = tuple(tuple(chance.uniform(0.1, 1) for _ in ranks) for _ in depths)
    ratios = {dtype: chance.uniform(0.99, 1.2) for dtype in DType if chance.random() < 0.9}
    return QualityTable(
        depths=tuple(depths),
        ranks=tuple(ranks),
        unretrained=losses,
        retrained=losses,
        dtype_loss_ratios={**ratios, DType.FLOAT32: 1.0},
        source="random",
    )


def _profile(chance: random.Random, sizes: SizeSpace) -> DeviceProfile:
    rows = (1, 4, 16)
    ranks = tuple(sorted({sizes.ranks[0], sizes.ranks[-1]}))
    native = chance.random() < 0.5

    def seconds() -> tuple[float, ...]:
        return tuple(sorted(chance.uniform(1e-4, 1e-2) for _ in rows))

    return DeviceProfile(
        device_class="random",
        torch_version="0",
        family="random",
        family_fingerprint="0",
        measured_at=datetime.now(UTC),
        native_bfloat16=native,
        packing_threads=chance.choice((0, 2)) if native else 0,
        process_base_bytes=chance.randrange(10**8),
        memory_overhead_bytes=chance.randrange(10**5),
        rows=rows,
        ranks=ranks,
        request_seconds=chance.uniform(0, 1e-3),
        step_seconds=seconds(),
        layers=tuple(
            LayerCost(
                mode=mode,
                dtype=dtype,
                seconds=tuple(seconds() for _ in (ranks if mode is Mode.FACTORED else ranks[:1])),
            )
            for mode in Mode
            for dtype in DType
            if executable(mode, dtype)
        ),
        p95_ratio=chance.uniform(1, 1.5),
    )


def _constraints(chance: random.Random, sizes: SizeSpace) -> Constraints:
    def maybe(value: Any, share: float) -> Any:
        return value if chance.random() < share else None

    return Constraints(
        max_mem_bytes=maybe(int(math.exp(chance.uniform(math.log(3e4), math.log(3e8)))), 0.5),
        mem_scope=chance.choice(("model", "process")),
        max_latency_seconds=maybe(math.exp(chance.uniform(math.log(1e-2), math.log(20))), 0.5),
        min_quality=maybe(chance.uniform(0.2, 1), 0.1),
        depth=maybe(chance.choice(sizes.depths), 0.15),
        rank=maybe(chance.choice(sizes.ranks), 0.15),
        mode=maybe(chance.choice(list(Mode)), 0.15),
        dtype=maybe(chance.choice(list(DType)), 0.15),
    )
