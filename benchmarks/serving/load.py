"""Load on one server of this machine: so many clients at once, or so many requests a second.

It shares the cores with the server that it measures, so it does little: one process, one event
loop, connections kept open, and aiohttp, which takes two fifths of the time that httpx takes.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

MAX_SECONDS = 3600
MAX_REQUESTS = 100_000
REQUEST_SECONDS = 120.0
"""A request that takes longer is a failure."""
PAUSE_SECONDS = 0.2
"""Pause between a failed request and the next, so that a broken server is not flooded."""
PNG = b"\x89PNG\r\n\x1a\n"
PNG_IN_JSON = b'"iVBORw0KGgo'

MakeRequest = Callable[[int], tuple[str, dict[str, Any], dict[str, str]]]
"""Number of the request, from 0 -> (path, JSON body, headers) of a POST that asks for one image."""


@dataclass(frozen=True)
class Result:
    """What one run of `seconds` measured; latencies in seconds, of answered requests."""

    images_per_second: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    requests: int
    failures: int
    first_failure: str
    seconds: float

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


@dataclass
class _Log:
    """What came of the requests that count."""

    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    images: float = 0.0

    def result(self, seconds: float) -> Result:
        p50, p95, p99 = np.percentile(self.latencies or [math.nan], (50, 95, 99)).tolist()
        return Result(
            images_per_second=self.images / seconds,
            latency_p50=p50,
            latency_p95=p95,
            latency_p99=p99,
            requests=len(self.latencies) + len(self.failures),
            failures=len(self.failures),
            first_failure=self.failures[0] if self.failures else "",
            seconds=seconds,
        )


def closed_loop(
    url: str, make_request: MakeRequest, clients: int, seconds: float, warmup_seconds: float
) -> Result:
    """`clients` at once, each sending its next request when the last is answered.

    Answers that arrive in the `seconds` after the warm-up count for latency, and failures at any
    time. An image counts by the share of its time that lies within them: of a server that answers
    sixteen at once, whole images would tell whether one batch more ended in time.
    """
    _check(url, seconds + warmup_seconds)
    return asyncio.run(_closed_loop(url, make_request, clients, seconds, warmup_seconds))


async def _closed_loop(
    url: str, make_request: MakeRequest, clients: int, seconds: float, warmup_seconds: float
) -> Result:
    log = _Log()
    numbers = iter(range(MAX_REQUESTS))
    begin = time.perf_counter() + warmup_seconds
    end = begin + seconds

    async def client(http: aiohttp.ClientSession) -> None:
        while (sent := time.perf_counter()) < end and (number := next(numbers, None)) is not None:
            if failure := await _send(http, make_request, number):
                log.failures.append(failure)
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            answered = time.perf_counter()
            log.images += max(0.0, min(answered, end) - max(sent, begin)) / (answered - sent)
            if begin <= answered < end:
                log.latencies.append(answered - sent)

    async with _http(url) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return log.result(seconds)


def open_loop(
    url: str,
    make_request: MakeRequest,
    rate: float,
    seconds: float,
    seed: int,
    straggler_seconds: float = 60.0,
) -> Result:
    """Requests at random moments (Poisson), `rate` a second on average, whatever is answered.

    Latency counts from the moment at which a request was due, so that a late start of ours is the
    server's too: it was busy on the same cores. Requests that are unanswered `straggler_seconds`
    after the last one was due are failures.
    """
    _check(url, seconds + straggler_seconds)
    return asyncio.run(
        _open_loop(url, make_request, arrivals(rate, seconds, seed), straggler_seconds)
    )


async def _open_loop(
    url: str, make_request: MakeRequest, due_times: Sequence[float], straggler_seconds: float
) -> Result:
    log = _Log()
    begin = time.perf_counter()

    async def one(http: aiohttp.ClientSession, number: int, due: float) -> None:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        if failure := await _send(http, make_request, number):
            log.failures.append(failure)
        else:
            log.latencies.append(time.perf_counter() - begin - due)
            log.images += 1

    async with _http(url) as http:
        tasks = [asyncio.create_task(one(http, i, due)) for i, due in enumerate(due_times)]
        _, pending = await asyncio.wait(tasks, timeout=due_times[-1] + straggler_seconds)
        took = time.perf_counter() - begin
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        log.failures += [f"no answer {straggler_seconds} s after the last request"] * len(pending)
    return log.result(took)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments in [0, `seconds`) of a Poisson process. Raises ValueError when there are none."""
    chance = random.Random(seed)
    gaps = (chance.expovariate(rate) for _ in range(MAX_REQUESTS))
    moments = list(itertools.takewhile(lambda t: t < seconds, itertools.accumulate(gaps)))
    if not moments:
        raise ValueError(f"no request is due in {seconds} s at {rate} a second")
    return moments


def _check(url: str, seconds: float) -> None:
    if urlsplit(url).hostname != "127.0.0.1":
        raise ValueError(f"{url} is not on 127.0.0.1: load is for this machine's own servers")
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{seconds} s is not within (0, {MAX_SECONDS}]")


def _http(url: str) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    return aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


async def _send(http: aiohttp.ClientSession, make_request: MakeRequest, number: int) -> str:
    """Why request `number` has failed; empty when it was answered with an image."""
    path, body, headers = make_request(number)
    try:
        async with http.post(path, json=body, headers=headers) as answer:
            content = await answer.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return repr(error)
    if answer.status != 200:
        return f"{answer.status} {content[:200].decode(errors='replace')}"
    is_image = content.startswith(PNG) or PNG_IN_JSON in content
    return "" if is_image else f"not a PNG: {content[:60]!r}"
