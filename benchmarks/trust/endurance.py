"""Too much at once, for long, and after Redis has lost everything."""

import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from httpx_retries import Retry

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import Figures, say
from benchmarks.serving.load import MakeRequest, Result, closed_loop, open_loop
from benchmarks.trust import hostile
from benchmarks.trust.faults import VICTIMS
from benchmarks.trust.site import FASHION, Account, Load, settle
from fineserve.client import Client, FineserveError, GeneratedImage

CAPACITY_SECONDS = 60.0
CLIENTS = 16
OVERLOAD_SECONDS = 300.0
OVERLOAD = 10
MOST_ACTIVE = 16
"""Generations at once, as capacity is measured with; 2,000 by default, for patient clients."""
SOAK_MINUTES = 60
SETTLED_MINUTES = 10
"""Growth counts from then on: by then everything has been used."""
SAMPLE_SECONDS = 10.0
SOAK_TTL_SECONDS = 120
"""Life of images, so that an hour sees as many go as come."""
SOAK_MODEL_SECONDS = 300.0
SETTINGS: dict[str, object] = {"profile_seconds": 5, "verify_seconds": 2}
STORED_MODELS = 5


@dataclass
class Usage:
    """Resident bytes and open files of each process over time, and Redis's keys."""

    resident_bytes: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)

    def look(self, deployment: Deployment) -> None:
        for program, text in VICTIMS.items():
            for pid in deployment.pids(text)[:1]:
                with suppress(OSError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
                    self.resident_bytes.setdefault(program, []).append(resident)
                    files = len([*Path(f"/proc/{pid}/fd").iterdir()])
                    self.files.setdefault(program, []).append(files)
        with deployment.redis() as client:
            self.keys.append(int(client.dbsize()))

    def growth(self, settled_share: float) -> Figures:
        """Growth from the median of the first tenth after settling to that of the last tenth."""

        def grown(values: list[int]) -> int:
            values = values[int(len(values) * settled_share) :]
            tenth = max(1, len(values) // 10)
            return round(statistics.median(values[-tenth:]) - statistics.median(values[:tenth]))

        return {
            "rss_growth_bytes": {p: grown(v) for p, v in self.resident_bytes.items()},
            "file_growth": {p: grown(v) for p, v in self.files.items()},
            "redis_key_growth": grown(self.keys),
            "rss_bytes": {p: v[-1] for p, v in self.resident_bytes.items()},
            "files": {p: v[-1] for p, v in self.files.items()},
            "redis_keys": self.keys[-1],
        }

    def by_minute(self) -> Figures:
        """Course of the growth: to a level that it keeps, or ever higher."""
        step = round(60 / SAMPLE_SECONDS)
        return {
            "rss_bytes_by_minute": {p: v[::step] for p, v in self.resident_bytes.items()},
            "files_by_minute": {p: v[::step] for p, v in self.files.items()},
            "redis_keys_by_minute": self.keys[::step],
        }


@contextmanager
def _watched(deployment: Deployment) -> Iterator[Usage]:
    usage, ending = Usage(), threading.Event()

    def watch() -> None:
        while not ending.wait(SAMPLE_SECONDS):
            usage.look(deployment)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        ending.set()
        thread.join()


def overload(families: Path = FASHION, seconds: float = OVERLOAD_SECONDS) -> Figures:
    """What the service can do, and what it does when ten times as much is asked for.

    Clients do not heed Retry-After: what is refused is gone, and others come. What it can do is
    measured before and after, since a machine with neighbours is not as fast at all times.
    """
    with Deployment(families, max_active_generations=MOST_ACTIVE, **SETTINGS) as deployment:
        deployment.up()
        request = _request(deployment.ready_model())

        def alone() -> Result:
            done = closed_loop(deployment.url, request, CLIENTS, CAPACITY_SECONDS, 15.0)
            say(f"{done.images_per_second:.2f} requests a second can be done")
            return done

        before = alone()
        with _watched(deployment) as usage:
            asked = OVERLOAD * before.images_per_second
            crowd = open_loop(deployment.url, request, asked, seconds, seed=0)
        ready = deployment.ready()
        after = alone()
    capacity = (before.images_per_second + after.images_per_second) / 2
    return {
        "capacity_requests_per_second": round(capacity, 2),
        "capacity_before_and_after": [
            round(before.images_per_second, 2),
            round(after.images_per_second, 2),
        ],
        "capacity_p95_seconds": round(max(before.latency_p95, after.latency_p95), 2),
        "asked_requests_per_second": round(asked, 2),
        "overload_seconds": round(crowd.seconds),
        "max_active_generations": MOST_ACTIVE,
        "overload_requests": crowd.requests,
        "overload_refused": crowd.failures,
        "first_refusal": crowd.first_failure,
        "overload_goodput_share": round(crowd.images_per_second / capacity, 3),
        "overload_accepted_p50_seconds": round(crowd.latency_p50, 2),
        "overload_accepted_p95_seconds": round(crowd.latency_p95, 2),
        "ready_afterwards": ready,
        **usage.growth(0.1),
        **usage.by_minute(),
    }


def _request(model: str) -> MakeRequest:
    """Requests that are answered with a picture, or with why not."""
    body = {"model": model, "n": 4, "num_inference_steps": 20}

    def make(number: int) -> tuple[str, dict[str, object], dict[str, str]]:
        return "/generate", {**body, "seed": number}, {"accept": "image/png"}

    return make


def soak(families: Path = FASHION, minutes: float = SOAK_MINUTES) -> Figures:
    """Images that are waited for and that are not, plans, and now and then a model, beside hostile
    clients.
    """
    account = Account()
    with Deployment(families, image_ttl_seconds=SOAK_TTL_SECONDS, **SETTINGS) as deployment:
        deployment.up()
        load = Load(deployment, [deployment.ready_model()], account)
        asked = load.running(model_seconds=SOAK_MODEL_SECONDS)
        with _watched(deployment) as usage, asked, hostile.running(deployment):
            time.sleep(minutes * 60)
        made = len(account.finished_at)
        account.generations.clear()  # most of their images have gone, as they should
        figures = settle(deployment, account)
    growth = usage.growth(SETTLED_MINUTES / minutes if minutes > SETTLED_MINUTES else 0.1)
    return {
        "soak_minutes": minutes,
        "hostile_clients": len(hostile.ATTACKS),
        "soak_rss_growth_bytes": sum(growth["rss_growth_bytes"].values()),
        "generations_waited_for": made,
        **growth,
        **usage.by_minute(),
        **{name: figures[name] for name in ("accepted_models", "lost", "answers", "corrupt")},
    }


def lost_registry(families: Path = FASHION) -> Figures:
    """Everything that Redis holds is deleted; how long until every ready model samples again."""
    with (
        Deployment(families, **SETTINGS) as deployment,
        Client(deployment.url, retry=Retry(total=0)) as client,  # a pause would be counted
    ):
        deployment.up()
        models = [
            deployment.ready_model(max_mem_gb=4, depth=2 * i, rank=32 * i)
            for i in range(1, STORED_MODELS + 1)
        ]
        before = {model: _images(client, model) for model in models}
        deployment.run("down")
        shutil.rmtree(deployment.var / "valkey")
        begun = time.monotonic()
        deployment.up()
        up_seconds = time.monotonic() - begun
        wait(lambda: all(_images(client, model) == before[model] for model in models), 300)
        seconds = time.monotonic() - begun
        names = {model.id for model in client.models()}
    return {
        "registry_models": len(models),
        "registry_models_back": len(names & set(models)),
        "up_seconds": round(up_seconds, 1),
        "registry_rebuild_seconds": round(seconds, 1),
    }


def _images(client: Client, model: str) -> list[GeneratedImage] | None:
    with suppress(FineserveError):
        return client.generate(model, n=2, num_inference_steps=5, seed=1)
    return None
