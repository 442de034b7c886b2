"""Promises on a real service: a crowd, one request at a time, two owners, one recorded trace."""

import contextlib
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.deployment import Deployment, wait
from benchmarks.elastic import finishing
from benchmarks.elastic.arrivals import constant, flash_crowd, poisson
from benchmarks.elastic.asking import Answer, Body, ask
from benchmarks.elastic.peers import peers
from benchmarks.elastic.simulator import Arrival, simulate
from benchmarks.parts import RESULTS, Figures, say
from benchmarks.sampling import families
from benchmarks.serving.load import MakeRequest, closed_loop
from benchmarks.trust.site import FASHION, link_families
from learngenes.config import Sampling
from learngenes.device import native_bfloat16
from registry.keys import Keys, Scope
from worker.sampling.elastic import Choice, Controller, Place

FAMILY = "fashion"
IMAGES = 4
PROMISE_SECONDS = 1.0
MINUTES = 10.0
FIXED_MINUTES = 2.0
CLIENTS = 8
CAPACITY_SECONDS = 30.0
SOLO_REQUESTS = 1000
SOLO_SECONDS = (0.15, 3.0)
MODEST_SECONDS = 120.0
TRACE_SECONDS = 120.0


@contextlib.contextmanager
def deployed(**settings: Any) -> Iterator[Deployment]:
    """The family alone, its kernels compiled and its steps measured."""
    link_families()
    with Deployment(FASHION, **settings) as deployment:
        deployment.up()
        wait(lambda: _settled(deployment), 900)
        yield deployment


def _settled(deployment: Deployment) -> bool:
    log = (deployment.var / "logs" / "sample-worker.log").read_text()
    compiled = (
        '"compiled": true' in log or deployment.environment.get("FINESERVE_COMPILE") == "false"
    )
    return compiled and log.count("steps measured") >= 1


def elastic(number: int, seconds: float = PROMISE_SECONDS, **more: object) -> Body:
    return {"family": FAMILY, "deadline_seconds": seconds, "n": IMAGES, "seed": number, **more}


def fixed(deployment: Deployment, depth: int) -> str:
    """A model of one size, in the dtype that elastic requests are served in."""
    dtype = "bfloat16" if native_bfloat16(torch.device("cpu")) else "float32"
    return deployment.ready_model(max_mem_gb=4, depth=depth, rank=256, dtype=dtype)


def capacity(deployment: Deployment, model: str) -> float:
    """Requests a second that a model of one size can serve."""

    def make(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        return "/generate", {"model": model, "n": IMAGES, "seed": number}, {"accept": "image/png"}

    request: MakeRequest = make
    done = closed_loop(deployment.url, request, CLIENTS, CAPACITY_SECONDS, 5.0)
    return done.images_per_second


def calm() -> Figures:
    """At half of what the full size sustains, and at all of it, ten minutes each."""
    with deployed() as deployment:
        figures = _at_loads(deployment, capacity(deployment, fixed(deployment, 12)), (0.5, 1))
    return {
        **figures,
        "promises_kept_1x": figures["1x"]["kept"],
        "quality_0_5x": figures["0.5x"]["quality"],
    }


def crowd() -> Figures:
    """At twice and four times of what the full size sustains; and fixed sizes beside it."""
    with deployed() as deployment:
        full, small = (fixed(deployment, depth) for depth in (12, 2))
        sustained = capacity(deployment, full)
        figures = _at_loads(deployment, sustained, (2, 4))
        for name, model in (("full", full), ("small", small)):
            moments = poisson(constant(4 * sustained), 4 * sustained, FIXED_MINUTES * 60, seed=9)
            answers = ask(deployment.url, moments, lambda n, m=model: _fixed(m, n))
            kept = sum(answer.kept(PROMISE_SECONDS) for answer in answers)
            figures[f"fixed_{name}_4x"] = {
                "kept": round(kept / len(answers), 4),
                "good_per_second": round(kept / (FIXED_MINUTES * 60), 2),
            }
            say(f"fixed {name}", **figures[f"fixed_{name}_4x"])
    full_good = figures["fixed_full_4x"]["good_per_second"]
    return {
        **figures,
        **{f"promises_kept_{load}x": figures[f"{load}x"]["kept"] for load in (2, 4)},
        "refused_2x": figures["2x"]["refused"],
        "goodput_ratio_4x": round(figures["4x"]["good_per_second"] / max(full_good, 1e-9), 2),
    }


def of_peers() -> Figures:
    """The same crowd at other servers, beside what was measured last of ours."""
    ours = json.loads((RESULTS / "elastic.json").read_text())["parts"]["crowd"]
    rate = 4 * ours["sustained_requests_per_second"]
    theirs = peers(FAMILY, rate, IMAGES, FIXED_MINUTES * 60, PROMISE_SECONDS)
    best = max(theirs["best_peer_good_per_second"], 1e-9)
    return {**theirs, "goodput_over_best_peer_4x": round(ours["4x"]["good_per_second"] / best, 2)}


def _at_loads(deployment: Deployment, sustained: float, loads: Sequence[float]) -> Figures:
    """What came of promises at so many times what the full size sustains."""
    say("sustained", requests_per_second=round(sustained, 2))
    figures: Figures = {"sustained_requests_per_second": round(sustained, 2)}
    for load in loads:
        answers = asked_for(deployment, load * sustained, MINUTES * 60)
        figures[name := f"{load:g}x"] = of_promises(answers, MINUTES * 60)
        say(name, **{k: v for k, v in figures[name].items() if k != "depths"})
    return figures


def _fixed(model: str, number: int) -> Body:
    return {"model": model, "n": IMAGES, "seed": number, "deadline_seconds": PROMISE_SECONDS}


def asked_for(deployment: Deployment, rate: float, seconds: float, seed: int = 0) -> list[Answer]:
    return ask(deployment.url, poisson(constant(rate), rate, seconds, seed), elastic)


def of_promises(answers: Sequence[Answer], seconds: float) -> Figures:
    """What came of requests with a promise."""
    accepted = [answer for answer in answers if answer.status == 200]
    kept = [answer for answer in accepted if answer.kept(PROMISE_SECONDS)]
    served = [answer.elastic for answer in accepted if answer.elastic]
    depths = [each["size"]["depth"] for each in served]
    return {
        "requests": len(answers),
        "kept": round(len(kept) / max(1, len(accepted)), 4),
        "refused": round(sum(answer.status == 429 for answer in answers) / len(answers), 4),
        "failed": sum(answer.status not in (200, 429) for answer in answers),
        "quality": round(statistics.mean(each["quality"] for each in served), 4),
        "quality_of_best": round(statistics.mean(each["best_quality"] for each in served), 4),
        "good_per_second": round(len(kept) / seconds, 2),
        "p99_seconds": round(float(np.quantile([a.seconds for a in accepted], 0.99)), 3),
        "depths": {depth: depths.count(depth) for depth in sorted(set(depths))},
    }


def solo() -> Figures:
    """One request after the other, with promises of any length."""
    chance = random.Random(0)
    kept, errors, refused = [], [], 0
    with deployed() as deployment:
        for number in range(SOLO_REQUESTS):
            seconds = round(chance.uniform(*SOLO_SECONDS), 3)
            began = time.perf_counter()
            answer = deployment.http.post("/generate", json=elastic(number, seconds))
            took = time.perf_counter() - began
            if answer.status_code != 200:
                refused += 1
                continue
            told = answer.json()["elastic"]
            kept.append(took <= seconds)
            errors.append(abs(told["foreseen_seconds"] / told["took_seconds"] - 1))
    return {
        "requests": SOLO_REQUESTS,
        "solo_kept": round(statistics.mean(kept), 4),
        "solo_refused": round(refused / SOLO_REQUESTS, 4),
        "prediction_error_median": round(statistics.median(errors), 3),
    }


def fairness() -> Figures:
    """A greedy elastic owner beside a modest one whose model has one size."""
    with deployed() as deployment:
        keys = Keys(deployment.var / "keys.json")
        secrets = {}
        for owner in ("greedy", "modest"):
            _, secrets[owner] = keys.create(owner, [Scope.ADMIN])
        deployment.run("down")
        deployment.up()
        headers = {owner: {"authorization": f"Bearer {key}"} for owner, key in secrets.items()}
        deployment.http.headers.update(headers["modest"])
        deployment.client = type(deployment.client)(deployment.url, secrets["modest"])
        model = fixed(deployment, 12)

        def modest() -> list[float]:
            seconds, ends = [], time.monotonic() + MODEST_SECONDS
            chance = random.Random(1)
            for number in itertools.count():
                if time.monotonic() > ends:
                    return seconds
                began = time.perf_counter()
                body = {"model": model, "n": IMAGES, "seed": number}
                deployment.http.post("/generate", json=body).raise_for_status()
                seconds.append(time.perf_counter() - began)
                time.sleep(chance.expovariate(1.0))
            raise AssertionError("there are always more numbers")

        alone = modest()
        with _beside(deployment, headers["greedy"], 2 / statistics.median(alone)):
            beside = modest()
    p95 = {name: float(np.quantile(s, 0.95)) for name, s in (("alone", alone), ("beside", beside))}
    return {
        "modest_p95_alone_seconds": round(p95["alone"], 3),
        "modest_p95_beside_seconds": round(p95["beside"], 3),
        "modest_p95_ratio": round(p95["beside"] / p95["alone"], 3),
    }


@contextlib.contextmanager
def _beside(deployment: Deployment, headers: dict[str, str], rate: float) -> Iterator[None]:
    """A greedy owner's elastic requests, from another process."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_greedy, args=(deployment.url, headers, rate), daemon=True)
    process.start()
    time.sleep(10)
    yield
    process.kill()
    process.join()


def _greedy(url: str, headers: dict[str, str], rate: float) -> None:
    import asyncio

    import aiohttp

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, headers=headers, connector=connector) as http:

            async def one(number: int) -> None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.post("/generate", json=elastic(number)) as answer:
                        await answer.read()

            tasks = set()
            chance = random.Random(2)
            for number in itertools.count():
                task = asyncio.create_task(one(number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(chance.expovariate(rate))

    asyncio.run(run())


def trace() -> Figures:
    """A flash crowd on the real service: elastic, of a fixed size, and in the simulator."""
    with deployed() as deployment:
        full = fixed(deployment, 12)
        sustained = capacity(deployment, full)
        rate = flash_crowd(0.3 * sustained, 10, 30, 60)
        moments = poisson(rate, 3 * sustained, TRACE_SECONDS, seed=4)
        with slowdowns(deployment) as seen:
            answers = ask(deployment.url, moments, elastic)
        of_one_size = ask(deployment.url, moments, lambda number: _fixed(full, number))
        log = (deployment.var / "logs" / "sample-worker.log").read_text().splitlines()
    draw_crowd({"elastic": answers, "full size": of_one_size}, RESULTS / "elastic-crowd.png")
    events = [json.loads(line) for line in log if '"steps measured"' in line]
    measured = events[-1]
    rows = [row for row, _ in measured["rows_per_second"]]
    seconds = [row / speed for row, speed in measured["rows_per_second"]]
    real = of_promises(answers, TRACE_SECONDS)
    place = Place(FAMILY, 12, measured["full_rows"], lambda n: float(np.interp(n, rows, seconds)))
    choices = [
        Choice(rung.quality, rung.size.depth, s.num_inference_steps, s.guided, _guide(s))
        for rung in finishing.rungs(families.shipped(FAMILY))
        for s in [rung.sampling]
    ]
    arrivals = [
        Arrival(due, images=IMAGES, deadline_seconds=PROMISE_SECONDS, choices=choices)
        for due in moments
    ]
    at, slower = zip(*seen, strict=True)
    simulated = simulate(
        arrivals, place, Controller(), slower=lambda now: float(np.interp(now, at, slower))
    )
    return {
        **{f"real_{name}": value for name, value in real.items()},
        "fixed_kept": round(
            sum(a.kept(PROMISE_SECONDS) for a in of_one_size) / len(of_one_size), 4
        ),
        "simulated_kept": round(simulated.share_kept(), 4),
        "simulated_refused": round(simulated.share_refused(), 4),
        "simulated_quality": round(simulated.quality(), 4),
        "simulator_gap": round(abs(simulated.share_kept() - real["kept"]), 4),
    }


@contextlib.contextmanager
def slowdowns(deployment: Deployment) -> Iterator[list[tuple[float, float]]]:
    """Once a second, how many times what was measured the engine takes for its steps."""
    seen: list[tuple[float, float]] = []
    began, over = time.monotonic(), threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            told = deployment.client.status().workers
            ratios = [w.gauges.get("engine_slowdown_ratio") for w in told]
            seen.extend((time.monotonic() - began, r) for r in ratios if r is not None)

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield seen
    finally:
        over.set()
        watching.join()


def _guide(sampling: Sampling) -> int:
    return sampling.guide.depth if sampling.guide and sampling.guided else 0


def draw_crowd(answers: dict[str, list[Answer]], file: Path) -> None:
    """What came each second, what of it was kept, refused and late; and by which depths."""
    figure, axes = plt.subplots(
        len(answers), 1, figsize=(9, 3 * len(answers)), sharex=True, layout="constrained"
    )
    bins = np.arange(0, TRACE_SECONDS + 2, 2)
    for axis, (name, told) in zip(axes, answers.items(), strict=True):
        kept = [a.due for a in told if a.kept(PROMISE_SECONDS)]
        refused = [a.due for a in told if a.status == 429]
        late = [a.due for a in told if a.status != 429 and not a.kept(PROMISE_SECONDS)]
        per_second = [np.histogram(each, bins)[0] / 2 for each in (kept, refused, late)]
        axis.stackplot(
            bins[:-1],
            *per_second,
            step="post",
            labels=("within 1 s", "refused at once", "late or failed"),
            colors=("#3b7dd8", "#bbbbbb", "#d0453b"),
        )
        axis.set(title=name, ylabel="requests a second")
        sizes = [(a.due, a.elastic["size"]["depth"]) for a in told if a.elastic]
        if sizes:
            depths = axis.twinx()
            depths.plot(*zip(*sizes, strict=True), ".", color="black", markersize=3)
            depths.set(ylabel="depth served (dots)", ylim=(0, 13))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[-1].set(xlabel="seconds")
    figure.savefig(file, dpi=110)
    plt.close(figure)
