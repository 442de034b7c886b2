"""Ten hostile clients beside honest ones, who should hardly notice.

The hostile run as a process of their own, `python -m benchmarks.trust.hostile URL`, with most of
what they send made beforehand: they stand for machines elsewhere, whose work is not this one's.
What is left of it yields to images, as the API does.
"""

import contextlib
import functools
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import REPOSITORY, Figures, say
from benchmarks.trust.archives import mutated
from benchmarks.trust.site import FASHION
from service.__main__ import NICENESS

SECONDS = 120.0
COMPILING_SECONDS = 600.0
HONEST = 2
BODY = {"n": 2, "num_inference_steps": 10}
JSON = {"content-type": "application/json"}
MUTATIONS = 200
Attack = Callable[[httpx.Client, random.Random], None]


def measure(families: Path = FASHION, seconds: float = SECONDS) -> Figures:
    """95th percentile of honest requests for images, alone and beside the hostile."""
    with Deployment(families, verify_seconds=1) as deployment:
        deployment.up()
        model = deployment.ready_model()
        _honest(deployment, model, 5)
        wait(lambda: _compiled(deployment), COMPILING_SECONDS)  # which would not go on beside them
        alone, lost_alone = _honest(deployment, model, seconds)
        with running(deployment):
            time.sleep(5)
            beside, lost = _honest(deployment, model, seconds)
        again, _ = _honest(deployment, model, seconds / 2)
        before = statistics.mean((_p95(alone), _p95(again)))
        return {
            "hostile_clients": len(ATTACKS),
            "honest_p95_seconds": round(before, 3),
            "honest_p95_beside_seconds": round(_p95(beside), 3),
            "hostile_p95_ratio": round(_p95(beside) / before, 2),
            "honest_requests": len(alone) + len(beside),
            "honest_failures": lost_alone + lost,
            "ended_processes": (deployment.var / "logs" / "supervisord.log")
            .read_text()
            .count(" exited: "),
            "ready_afterwards": deployment.ready(),
        }


def _compiled(deployment: Deployment) -> bool:
    """Whether kernels are compiled: before, an image takes half as long again."""
    gauges = [worker.gauges for worker in deployment.client.status().workers]
    return any(found.get("engine_compiled") == 1 for found in gauges)


def _honest(deployment: Deployment, model: str, seconds: float) -> tuple[list[float], int]:
    """Seconds of each request of HONEST clients, and how many had no images."""
    times: list[float] = []
    failures = 0
    ends = time.monotonic() + seconds

    def ask() -> None:
        nonlocal failures
        with httpx.Client(base_url=deployment.url, timeout=120, trust_env=False) as http:
            while time.monotonic() < ends:
                began = time.perf_counter()
                answer = http.post("/generate", json={"model": model, **BODY})
                times.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    failures += 1
                    say("not served", status=answer.status_code, text=answer.text[:200])
                time.sleep(0.2)

    threads = [threading.Thread(target=ask) for _ in range(HONEST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, failures


@contextlib.contextmanager
def running(deployment: Deployment) -> Iterator[None]:
    """All ATTACKS at once, again and again."""
    attacking = (sys.executable, "-m", "benchmarks.trust.hostile", deployment.url)
    command = ["nice", "-n", str(NICENESS), *attacking]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # all is made
        try:
            yield
        finally:
            process.kill()


def attack(url: str) -> None:
    """All ATTACKS, for ever."""
    for make in (_fields, _bomb, _thin, _mutated):
        make()

    def repeat(number: int, once: Attack) -> None:
        chance = random.Random(number)
        while True:
            try:
                with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                    while True:
                        once(http, chance)
            except (OSError, httpx.HTTPError):
                time.sleep(0.1)  # nobody is there for a while

    for numbered in enumerate(ATTACKS):
        threading.Thread(target=repeat, args=numbered).start()
    say("attacking", clients=len(ATTACKS))


def _connected(http: httpx.Client) -> socket.socket:
    return socket.create_connection((http.base_url.host, http.base_url.port or 80), 20)


def _flood_of_headers(http: httpx.Client, _: random.Random) -> None:
    with _connected(http) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 50_000)
        connection.recv(1000)


def _silent(http: httpx.Client, _: random.Random) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(_connected(http))
        time.sleep(5)


def _trickle(http: httpx.Client, chance: random.Random) -> None:
    head = "POST /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n"
    with contextlib.ExitStack() as opened:
        sent = [opened.enter_context(_connected(http)) for _ in range(6)]
        for connection in sent:
            connection.sendall(head.encode())
        for _ in range(20):
            for connection in sent:
                connection.sendall(chance.randbytes(10))
            time.sleep(0.5)


def _unknown_fields(http: httpx.Client, _: random.Random) -> None:
    for path, count in (("/session", 300), ("/plan", 1_300), ("/plan", 5_000)):
        http.post(path, content=_fields()[count], headers=JSON)


def _large_body(http: httpx.Client, _: random.Random) -> None:
    http.post("/plan", content=b" " * 5_000_000, headers=JSON)


def _scans(http: httpx.Client, _: random.Random) -> None:
    http.post("/tasks", content=_bomb(), timeout=3)


def _thin_pictures(http: httpx.Client, _: random.Random) -> None:
    http.post("/tasks", content=_thin())


def _mutations(http: httpx.Client, chance: random.Random) -> None:
    http.post("/tasks", content=chance.choice(_mutated()))


def _streams(http: httpx.Client, _: random.Random) -> None:
    head = b"GET /status/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            connection = opened.enter_context(_connected(http))
            connection.sendall(head)
        time.sleep(5)


def _made_up_paths(http: httpx.Client, chance: random.Random) -> None:
    for _ in range(50):
        http.get(f"/models/{chance.randbytes(8).hex()}/")
        http.get("/metrics")


@functools.cache
def _fields() -> dict[int, bytes]:
    """Objects of so many fields that nobody asked for."""
    return {n: json.dumps({f"a{i}": 1 for i in range(n)}).encode() for n in (300, 1_300, 5_000)}


@functools.cache
def _bomb() -> bytes:
    """Progressive pictures with many scans of nothing."""
    file = io.BytesIO()
    Image.new("L", (2_000, 2_000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    start = content.rindex(b"\xff\xda")
    bomb = content[:start] + content[start:-2] * 5_000 + content[-2:]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2):
            archive.writestr(f"a/{number}.jpg", bomb)
    return packed.getvalue()


@functools.cache
def _thin() -> bytes:
    packed, file = io.BytesIO(), io.BytesIO()
    Image.new("1", (19_999, 2_000)).save(file, "PNG")
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(2):
            archive.writestr(f"a/{number}.png", file.getvalue())
    return packed.getvalue()


@functools.cache
def _mutated() -> list[bytes]:
    return [mutated(random.Random(number)) for number in range(MUTATIONS)]


ATTACKS: tuple[Attack, ...] = (
    _flood_of_headers,
    _silent,
    _trickle,
    _unknown_fields,
    _large_body,
    _scans,
    _thin_pictures,
    _mutations,
    _streams,
    _made_up_paths,
)


def _p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


if __name__ == "__main__":
    attack(sys.argv[1])
