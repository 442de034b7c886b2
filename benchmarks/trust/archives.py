"""Archives and pictures, whole and mutated, sent to a service that others use meanwhile.

The senders are processes of their own that yield to the service: they stand for machines elsewhere.
"""

import os
import random
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import httpx

from benchmarks.deployment import Deployment
from benchmarks.parts import Figures, say
from benchmarks.trust.site import FASHION
from benchmarks.trust.uploads import IMAGES_OF_KINDS, PACKS, packed
from service.__main__ import NICENESS

ARCHIVES = 10_000
AT_ONCE = 4
SETTLING_SECONDS, IDLE_SECONDS = 40.0, 20.0
"""After which workers have measured what they do first; nothing is idle before."""
MOST_EDITS = 20
LEFT_EARLY = 0.02
"""Share of uploads whose client leaves before there is an answer."""


def measure(archives: int = ARCHIVES, families: Path = FASHION) -> Figures:
    with Deployment(families, max_tasks=1_000_000, compile="false") as deployment:
        deployment.up()
        (service,) = deployment.pids("-m service")
        time.sleep(SETTLING_SECONDS)
        idle = _others(deployment, IDLE_SECONDS)
        _send(deployment.url, -1, 50)
        before, answers = _resident(service), [0, 0, 0]
        meanwhile: list[float] = []
        ended = threading.Event()
        others = threading.Thread(target=_ask, args=(deployment, meanwhile, ended))
        others.start()
        began = time.perf_counter()
        each = archives // AT_ONCE
        with ProcessPoolExecutor(
            AT_ONCE, get_context("spawn"), initializer=os.nice, initargs=(NICENESS,)
        ) as senders:
            urls, counts = [deployment.url] * AT_ONCE, [each] * AT_ONCE
            for part in senders.map(_send, urls, range(AT_ONCE), counts):
                answers = [a + b for a, b in zip(answers, part, strict=True)]
        seconds = time.perf_counter() - began
        ended.set()
        others.join()
        made, refused, wrong = answers
        return {
            "archives": made + refused + wrong,
            "made": made,
            "refused": refused,
            "wrong": wrong,
            "crashes": int(deployment.pids("-m service") != [service]),
            "resident_growth_bytes": _resident(service) - before,
            "idle_p95_ms": round(idle, 2),
            "others_p95_ms": round(_p95(meanwhile), 2),
            "others_p95_ratio": round(_p95(meanwhile) / idle, 2),
            "archives_per_second": round(archives / seconds, 1),
            "ready_afterwards": deployment.ready(),
        }


def mutated(chance: random.Random) -> bytes:
    """An archive of pictures, some of whose bytes are others, are missing, or come twice."""
    content = bytearray(packed(chance, chance.choice(PACKS), chance.choice(IMAGES_OF_KINDS)))
    for _ in range(chance.randrange(MOST_EDITS)):
        if not content:
            break
        at = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[at] = chance.randrange(256)
            case 1:
                del content[at : at + chance.randrange(64)]
            case 2:
                content[at:at] = content[at : at + chance.randrange(64)]
            case _:
                content[at : at + 4] = chance.randbytes(4)
    return bytes(content)


def _send(url: str, seed: int, count: int) -> list[int]:
    """How many archives became tasks, were refused, and were answered otherwise."""
    answers, chance = [0, 0, 0], random.Random(seed)
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        for number in range(count):
            content, patience = mutated(chance), 300.0
            if chance.random() < LEFT_EARLY:
                patience = 0.01
            try:
                answer = http.post("/tasks", content=content, timeout=patience)
            except httpx.TimeoutException:
                answers[1] += 1
                continue
            kind = {201: 0, 200: 0}.get(answer.status_code, 1 if answer.status_code < 500 else 2)
            answers[kind] += 1
            if kind == 2:
                say("wrong", number=number, status=answer.status_code, text=answer.text[:300])
            if answer.status_code == 201:
                http.delete(answer.headers["location"])
    return answers


def _others(deployment: Deployment, seconds: float) -> float:
    """95th percentile of an honest request, in ms."""
    times: list[float] = []
    ended = threading.Event()
    threading.Timer(seconds, ended.set).start()
    _ask(deployment, times, ended)
    return _p95(times)


def _ask(deployment: Deployment, times: list[float], ended: threading.Event) -> None:
    with httpx.Client(base_url=deployment.url, timeout=60, trust_env=False) as http:
        while not ended.is_set():
            began = time.perf_counter()
            http.post("/plan", json={"max_mem_gb": 0.004}).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(0.05)


def _p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


def _resident(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
