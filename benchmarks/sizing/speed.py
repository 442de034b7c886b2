"""Check 4: the solver alone, and POST /plan on a running deployment."""

import asyncio
import contextlib
import random
import time

import httpx
import numpy as np

from benchmarks.deployment import Deployment
from benchmarks.parts import RESULTS, Figures, say
from benchmarks.sizing.subjects import dit_xl, fashion
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.solver import Infeasible, solve

SOLVES = 10_000
REQUESTS_PER_SECOND = 50
REQUESTS = 3_000
PICTURE = "plan --max-mem-gb 0.01 --max-latency-ms 800"
"""The README's example."""


def measure() -> Figures:
    figures = solving() | http()
    say("speed:", **figures)
    return figures


def solving() -> Figures:
    """All of a request's work: every size of DiT-XL/2 or `fashion` costed, the best, the front."""
    chance = random.Random(4)
    seconds = []
    sizes = 0
    for i in range(SOLVES):
        subject = dit_xl() if i % 2 else fashion()
        constraints = Constraints(
            max_mem_bytes=int(10 ** chance.uniform(6.5, 9.5)),
            max_latency_seconds=10 ** chance.uniform(-1, 2),
        )
        workload = Workload.of(n=chance.randint(1, 8), num_inference_steps=chance.randint(1, 50))
        started = time.perf_counter()
        candidates = subject.candidates(workload)
        with contextlib.suppress(Infeasible):
            solve(candidates, constraints)
        seconds.append(time.perf_counter() - started)
        sizes = max(sizes, len(candidates.depth))
    return {
        "solves": SOLVES,
        "most_sizes": sizes,
        "solve_p50_seconds": float(np.median(seconds)),
        "solve_p99_seconds": float(np.quantile(seconds, 0.99)),
    }


def http() -> Figures:
    """Open loop: a request is sent when it is due, whether the last was answered or not."""
    with Deployment() as deployment:
        deployment.up()
        seconds = asyncio.run(_requests(deployment.url))
        picture = str(RESULTS / "front.png")
        deployment.run(*PICTURE.split(), "--plot", picture).check_returncode()
    return {
        "plan_http_requests": len(seconds),
        "plan_http_requests_per_second": REQUESTS_PER_SECOND,
        "plan_http_p50_seconds": float(np.median(seconds)),
        "plan_http_p99_seconds": float(np.quantile(seconds, 0.99)),
    }


async def _requests(url: str) -> list[float]:
    """Seconds from when each was due to its answer."""
    chance = random.Random(4)
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:

        async def one(due: float, body: dict[str, float]) -> float:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            answer = await client.post("/plan", json=body)
            assert answer.status_code in (200, 422), answer.text
            return time.perf_counter() - due

        await one(time.perf_counter(), {"max_mem_gb": 4})
        start = time.perf_counter() + 0.1
        bodies = [
            {
                "max_mem_gb": 10 ** chance.uniform(-2.8, -1.5),
                "max_latency_ms": 10 ** chance.uniform(2, 4),
            }
            for _ in range(REQUESTS)
        ]
        return await asyncio.gather(
            *(one(start + i / REQUESTS_PER_SECOND, body) for i, body in enumerate(bodies))
        )
