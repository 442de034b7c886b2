"""A request without knobs, beside what it was at the full size of an earlier commit."""

import itertools
import statistics
import time

import torch

from benchmarks.parts import RESULTS, Figures, say
from benchmarks.sampling import families
from learngenes.config import DType, Mode, Sampling, SamplingRequest, Size
from learngenes.data.images import encode_png, grid
from learngenes.family.family import Family
from learngenes.measuring.device import estimate_profile
from learngenes.sizing.budget import Constraints, Plan, Workload
from learngenes.sizing.solver import Candidates, solve
from learngenes.training.pictures import COUNT, sampled
from worker.sampling.engine import Engine
from worker.sampling.jobs import SampleRequest

BEFORE = Sampling()
ROUNDS = 15
IMAGES = 4
BUDGETS = 5


def fashion() -> Figures:
    figures = _compared("fashion")
    return {**_named("fashion", figures), "default_class_accuracy": figures["class_accuracy"]}


def emoji() -> Figures:
    return _named("emoji", _compared("emoji"))


def _named(name: str, figures: Figures) -> Figures:
    ratios = ("default_fd_excess_over_before", "default_cost_over_before")
    return {**figures, **{f"{name}_{ratio}": figures[ratio] for ratio in ratios}}


def _compared(name: str) -> Figures:
    old, new, judge = families.before(name), families.shipped(name), families.judge(name)
    labels = torch.arange(COUNT) % len(judge.class_names)
    plan = planned(new, Constraints(dtype=DType.FLOAT32))
    by = plan.workload.sampling
    size = Size(depth=plan.depth, rank=plan.rank)
    own = new.scales_of(size)
    fd_before, accuracy_before = judge.judged(sampled(old, old.scales, BEFORE, labels), labels)
    say("before", fd=fd_before, accuracy=accuracy_before)
    fd, accuracy = judge.judged(sampled(new, own, by, labels), labels)
    say("now", fd=fd, accuracy=accuracy, sampling=by)
    seconds_before, seconds, full = _seconds(
        [(old, old.full_size, BEFORE), (new, size, by), (new, new.full_size, by)]
    )
    draw(name)
    return {
        "floor": round(judge.floor, 2),
        "fd_before": round(fd_before, 2),
        "fd": round(fd, 2),
        "fd_predicted": round(plan.distance or 0.0, 2),
        "class_accuracy_before": round(accuracy_before, 4),
        "class_accuracy": round(accuracy, 4),
        "sampling": by.model_dump(mode="json"),
        "size": [plan.depth, plan.rank],
        "seconds_before": round(seconds_before, 4),
        "seconds_now": round(seconds, 4),
        "cost_of_full_size_over_before": round(full / seconds_before, 3),
        "default_fd_excess_over_before": round((fd - judge.floor) / (fd_before - judge.floor), 3),
        "default_cost_over_before": round(seconds / seconds_before, 3),
    }


def planned(family: Family, constraints: Constraints) -> Plan:
    """The plan of a request that leaves everything open."""
    manifest = family.manifest
    assert family.quality is not None
    profile = estimate_profile(family, 0, 1.0)
    workloads = [Workload(IMAGES, s) for s in family.quality.samplings(SamplingRequest())]
    network, sizes = manifest.network, manifest.sizes
    return solve(
        Candidates.of(network, sizes, family.quality, profile, *workloads), constraints
    ).plan


def _seconds(cases: list[tuple[Family, Size, Sampling]]) -> list[float]:
    """Median seconds of IMAGES pictures of each size, by turns in one engine."""
    engine = Engine(list(dict.fromkeys(family for family, _, _ in cases)), 4 * 10**9)
    engine.start()
    requests = [
        SampleRequest(
            family=family,
            model=f"{family.fingerprint}-{size.depth}-{size.rank}",
            artifact="",
            depth=size.depth,
            rank=size.rank,
            mode=Mode.MATERIALISED,
            dtype=DType.FLOAT32,
            load=lambda f=family, size=size: f.scales_of(size),
            load_guide=(lambda f=family, g=s.guide: f.scales_of(g)) if s.guide else None,
            class_labels=list(range(IMAGES)),
            seeds=list(range(IMAGES)),
            sampling=s,
        )
        for family, size, s in cases
    ]
    taken: list[list[float]] = [[] for _ in requests]
    for _, (place, request) in itertools.product(range(ROUNDS + 1), enumerate(requests)):
        began = time.perf_counter()
        engine.submit(request).wait()
        taken[place].append(time.perf_counter() - began)
    engine.stop()
    return [statistics.median(seconds[1:]) for seconds in taken]


def draw(name: str) -> None:
    """The same seeds at BUDGETS memory budgets, as they were and as they are."""
    old, new = families.before(name), families.shipped(name)
    labels = torch.arange(len(new.manifest.class_names))[:12]
    sizes = [
        Size(depth=depth, rank=new.manifest.sizes.ranks[-1])
        for depth in _spread(new.manifest.sizes.depths)
    ]
    rows = []
    for size in sizes:
        plan = planned(new, Constraints(depth=size.depth, rank=size.rank, dtype=DType.FLOAT32))
        by = plan.workload.sampling
        rows.append(sampled(old, old.scales_of(size), BEFORE, labels).numpy())
        rows.append(sampled(new, new.scales_of(size), by, labels).numpy())
    (RESULTS / f"sampling-{name}.png").write_bytes(encode_png(grid(rows)))


def _spread(depths: tuple[int, ...]) -> list[int]:
    last = len(depths) - 1
    return sorted({depths[round(i * last / (BUDGETS - 1))] for i in range(BUDGETS)})
