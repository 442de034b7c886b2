"""Check 2: a model sized with `mem_scope: process` in a process that the kernel caps at the budget.

By a memory control group (version 1 or 2) where this user may make one, else by RLIMIT_DATA,
which counts private memory only.
"""

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.parts import Figures, say
from benchmarks.sizing.subjects import Subject, describe, dit_xl, fashion
from learngenes.config import DType, Mode
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.solver import Candidates, Infeasible, solve
from worker.build.verify import Specimen

GROUPS = Path("/sys/fs/cgroup")
WORKLOAD = Workload.of(n=1, num_inference_steps=2)
SIZES = (
    (fashion, Constraints(depth=2, rank=32, mode=Mode.FACTORED, dtype=DType.INT8)),
    (fashion, Constraints(depth=8, rank=256, mode=Mode.MATERIALISED, dtype=DType.FLOAT32)),
    (dit_xl, Constraints(depth=28, rank=72, mode=Mode.FACTORED, dtype=DType.INT8)),
    (dit_xl, Constraints(depth=12, rank=1152, mode=Mode.FACTORED, dtype=DType.BFLOAT16)),
    (dit_xl, Constraints(depth=28, rank=1152, mode=Mode.MATERIALISED, dtype=DType.BFLOAT16)),
)
"""Each with the budget that it just keeps."""


def measure() -> Figures:
    rows = [_one(make(), size) for make, size in SIZES]
    return {
        "process_budgets": len(rows),
        "ran_at_the_budget": sum(row["ran_at_the_budget"] for row in rows),
        "refused_by_the_plan_at_nine_tenths": sum(row["refused_at_nine_tenths"] for row in rows),
        "killed_at_half": sum(row["killed_at_half"] for row in rows),
        "rows": rows,
    }


def _one(subject: Subject, size: Constraints) -> Figures:
    candidates = subject.candidates(WORKLOAD)
    plan = solve(candidates, size).plan
    budget = plan.predicted.process_memory_bytes
    specimen = subject.specimen(plan, WORKLOAD)
    started = time.perf_counter()
    peak = _run(specimen, budget)
    row = {
        "family": subject.name,
        "size": describe(plan),
        "budget_bytes": budget,
        "measured_process_bytes": peak,
        "ran_at_the_budget": peak is not None and peak <= budget,
        "refused_at_nine_tenths": _refused(candidates, size, round(0.9 * budget)),
        "killed_at_half": _run(specimen, budget // 2) is None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    say("capped:", **row)
    return row


def _refused(candidates: Candidates, size: Constraints, budget: int) -> bool:
    tighter = {"max_mem_bytes": budget, "mem_scope": "process"}
    try:
        solve(candidates, size.model_copy(update=tighter))
    except Infeasible:
        return True
    return False


def _run(specimen: Specimen, limit_bytes: int) -> int | None:
    """Peak bytes of the process under a limit; None when it did not live to tell."""
    with limited(limit_bytes) as enter:
        done = subprocess.run(
            [sys.executable, "-m", "worker", "verify"],
            input=specimen.model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=enter,
        )
    if done.returncode:
        return None
    return int(json.loads(done.stdout)["cost"]["process_memory_bytes"])


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """Something to call in a process that shall be held to so many bytes."""
    for root, file in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        group = root / f"fineserve-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
        if (group / file).exists():
            (group / file).write_text(str(limit_bytes))
            yield functools.partial(_enter, group)
            group.rmdir()
            return
    yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
