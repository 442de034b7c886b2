"""Ten hostile clients beside honest ones, who should hardly notice."""

import contextlib
import io
import random
import socket
import statistics
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.deployment import Deployment
from benchmarks.parts import Figures, say
from benchmarks.trust.archives import mutated
from benchmarks.trust.site import FASHION

SECONDS = 120.0
HONEST = 2
BODY = {"n": 2, "num_inference_steps": 10}
Attack = Callable[[Deployment, random.Random], None]


def measure(families: Path = FASHION, seconds: float = SECONDS) -> Figures:
    """95th percentile of honest requests for images, alone and beside the hostile."""
    with Deployment(families, verify_seconds=1) as deployment:
        deployment.up()
        model = deployment.ready_model()
        _honest(deployment, model, 5)
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
    ended = threading.Event()

    def attack(number: int, once: Attack) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            try:
                once(deployment, chance)
            except (OSError, httpx.HTTPError):
                ended.wait(0.1)  # nobody is there for a while

    threads = [
        threading.Thread(target=attack, args=(number, once), daemon=True)
        for number, once in enumerate(ATTACKS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)


def _connected(deployment: Deployment) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(deployment.url.rpartition(":")[2])), 20)


def _flood_of_headers(deployment: Deployment, _: random.Random) -> None:
    with _connected(deployment) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 50_000)
        connection.recv(1000)


def _silent(deployment: Deployment, _: random.Random) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(_connected(deployment))
        time.sleep(5)


def _trickle(deployment: Deployment, chance: random.Random) -> None:
    head = "POST /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n"
    with contextlib.ExitStack() as opened:
        sent = [opened.enter_context(_connected(deployment)) for _ in range(6)]
        for connection in sent:
            connection.sendall(head.encode())
        for _ in range(20):
            for connection in sent:
                connection.sendall(chance.randbytes(10))
            time.sleep(0.5)


def _unknown_fields(deployment: Deployment, _: random.Random) -> None:
    fields = {f"a{number}": 1 for number in range(5_000)}
    httpx.post(f"{deployment.url}/session", json=fields, timeout=60, trust_env=False)
    httpx.post(f"{deployment.url}/plan", json=fields, timeout=60, trust_env=False)


def _large_body(deployment: Deployment, _: random.Random) -> None:
    headers = {"content-type": "application/json"}
    content = b" " * 5_000_000
    httpx.post(
        f"{deployment.url}/plan", content=content, headers=headers, timeout=60, trust_env=False
    )


def _scans(deployment: Deployment, _: random.Random) -> None:
    """Progressive pictures with many scans of nothing, whose client leaves."""
    file = io.BytesIO()
    Image.new("L", (2_000, 2_000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    start = content.rindex(b"\xff\xda")
    bomb = content[:start] + content[start:-2] * 5_000 + content[-2:]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2):
            archive.writestr(f"a/{number}.jpg", bomb)
    httpx.post(f"{deployment.url}/tasks", content=packed.getvalue(), timeout=3, trust_env=False)


def _thin_pictures(deployment: Deployment, _: random.Random) -> None:
    packed, file = io.BytesIO(), io.BytesIO()
    Image.new("1", (19_999, 2_000)).save(file, "PNG")
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(2):
            archive.writestr(f"a/{number}.png", file.getvalue())
    httpx.post(f"{deployment.url}/tasks", content=packed.getvalue(), timeout=60, trust_env=False)


def _mutations(deployment: Deployment, chance: random.Random) -> None:
    httpx.post(f"{deployment.url}/tasks", content=mutated(chance), timeout=60, trust_env=False)


def _streams(deployment: Deployment, _: random.Random) -> None:
    head = b"GET /status/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            connection = opened.enter_context(_connected(deployment))
            connection.sendall(head)
        time.sleep(5)


def _made_up_paths(deployment: Deployment, chance: random.Random) -> None:
    with httpx.Client(base_url=deployment.url, timeout=60, trust_env=False) as http:
        for _ in range(50):
            http.get(f"/models/{chance.randbytes(8).hex()}/")
            http.get("/metrics")


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
