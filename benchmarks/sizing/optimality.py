"""Check 5: random families, profiles and constraints against one size after another."""

import math
import random
from datetime import UTC, datetime
from typing import Any

from benchmarks.parts import Figures, say
from learngenes.config import SHARED_MODES, DType, Mode, NetworkConfig, SizeSpace, executable
from learngenes.sizing.budget import Constraints, Plan, Workload
from learngenes.sizing.profile import DeviceProfile, LayerCost
from learngenes.sizing.quality import QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, solve

CASES = 10_000
FIXED = ("depth", "rank", "mode", "dtype")


def measure() -> Figures:
    chance = random.Random(5)
    beaten, outcomes = 0, dict.fromkeys(("feasible", "infeasible", "contradictory"), 0)
    for _ in range(CASES):
        network, sizes = _family(chance)
        quality, profile = _quality(chance, sizes), _profile(chance, sizes)
        workload = Workload.of(
            n=chance.choice((1, 2, 4, 16)),
            num_inference_steps=chance.choice((1, 10, 50)),
            guidance_scale=chance.choice((1, 2)),
        )
        constraints = _constraints(chance, sizes)
        candidates = Candidates.of(network, sizes, quality, profile, workload)
        best = brute_force(candidates, quality, constraints)
        try:
            plan = solve(candidates, constraints).plan
        except (Impossible, Infeasible) as refusal:
            outcomes["infeasible" if isinstance(refusal, Infeasible) else "contradictory"] += 1
            beaten += best is not None
            continue
        outcomes["feasible"] += 1
        assert best is not None
        same = math.isclose(plan.quality, best.quality, rel_tol=1e-12)
        seconds, least = plan.predicted.latency_seconds, best.predicted.latency_seconds
        beaten += plan.quality < best.quality * (1 - 1e-12)
        beaten += same and seconds > least * (1 + 1e-12)
    figures = {"bruteforce_cases": CASES, "bruteforce_beaten": beaten, **outcomes}
    say("against brute force:", **figures)
    return figures


def brute_force(
    candidates: Candidates, quality: QualityTable, constraints: Constraints
) -> Plan | None:
    """The best of all sizes, looked at one by one: quality, then latency."""
    plans = candidates.plans([*range(len(candidates.depth))])
    return max(
        (p for p in plans if p.dtype in quality.dtype_loss_ratios and _keeps(p, constraints)),
        key=lambda plan: (plan.quality, -plan.predicted.latency_seconds),
        default=None,
    )


def _keeps(plan: Plan, c: Constraints) -> bool:
    cost = plan.predicted
    memory = cost.process_memory_bytes if c.mem_scope == "process" else cost.memory_bytes
    return (
        all(getattr(c, name) in (None, getattr(plan, name)) for name in FIXED)
        and (c.max_mem_bytes is None or memory <= c.max_mem_bytes)
        and (c.max_latency_seconds is None or cost.latency_p95_seconds <= c.max_latency_seconds)
        and (c.min_quality is None or plan.quality >= c.min_quality)
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

    step_seconds = seconds()
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
        request_seconds=chance.uniform(0, 1e-3),
        layers=tuple(
            LayerCost(
                mode=mode,
                dtype=dtype,
                rows=rows,
                ranks=ranks if mode is Mode.FACTORED else ranks[:1],
                step_seconds=step_seconds,
                seconds=tuple(seconds() for _ in (ranks if mode is Mode.FACTORED else ranks[:1])),
            )
            for mode in SHARED_MODES
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
        mode=maybe(chance.choice(SHARED_MODES), 0.15),
        dtype=maybe(chance.choice(list(DType)), 0.15),
    )
