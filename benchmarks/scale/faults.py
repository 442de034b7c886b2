"""SIGKILL to the processes of two hosts, and to a whole host, under load."""

import contextlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import obstore

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import Figures, say
from benchmarks.scale.site import Host, Site, site
from benchmarks.trust.faults import RECOVERY_SECONDS
from benchmarks.trust.faults import SETTINGS as KILLED
from benchmarks.trust.site import FASHION, Account, Load, settle
from registry.store import MANIFEST
from registry.store.objects import ObjectStore

KILLS, FAILOVERS = 100, 3
PROGRAMS = {
    "api": "-m service",
    "build-worker": "-m worker build",
    "sample-worker": "-m worker sample",
}
WHOLE_HOST_EVERY = 10
"""Each so many-th kill takes a host's three programs at once."""


def kills(number: int = KILLS) -> Figures:
    """One program of either host at random, or all three of one, when all are well again."""
    chance, account = random.Random(0), Account()
    killed: dict[str, int] = {}
    recoveries = []
    with (
        site() as shared,
        Host(FASHION, shared.redis, shared.bucket, **KILLED) as first,
        Host(FASHION, shared.redis, shared.bucket, **KILLED) as second,
    ):
        hosts = {"first": first, "second": second}
        for host in hosts.values():
            host.up()
        with Load(first, [first.ready_model()], account).running():
            for i in range(number):
                time.sleep(chance.uniform(0, 4))
                name = chance.choice([*hosts])
                whole = i % WHOLE_HOST_EVERY == WHOLE_HOST_EVERY - 1
                victims = [*PROGRAMS] if whole else [chance.choice([*PROGRAMS])]
                for victim in victims:
                    _kill(hosts[name], victim)
                what = "a whole host" if whole else victims[0]
                killed[what] = killed.get(what, 0) + 1
                recoveries.append(_recovery_seconds(first, second))
                say(f"{i + 1}: {what} of the {name}, well after {recoveries[-1]:.1f} s")
        figures = settle(first, account, lambda: corrupt(shared))
    return {
        "kills": number,
        "killed": killed,
        "longest_recovery_seconds": round(max(recoveries), 1),
        "doubled": figures.pop("duplicated"),
        **figures,
    }


def _kill(host: Deployment, victim: str) -> None:
    for pid in host.pids(PROGRAMS[victim]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def failover() -> Figures:
    """Seconds from the loss of the host that makes images until the other has begun them."""
    with (
        site() as shared,
        Host(FASHION, shared.redis, shared.bucket, compile="false", **KILLED) as first,
        Host(FASHION, shared.redis, shared.bucket, compile="false", **KILLED) as second,
    ):
        first.up()
        second.up()
        model = first.ready_model()
        took = []
        for _ in range(FAILOVERS):
            first.control("stop", "sample-worker")
            body = {"model": model, "n": 16, "num_inference_steps": 250, "guidance_scale": 1}
            asked = first.http.post("/generate", json=body, headers={"Prefer": "respond-async"})
            place = asked.raise_for_status().headers["location"]
            wait(lambda at=place: first.http.get(at).json()["status"] == "running", 60)
            first.control("start", "sample-worker")
            wait(lambda: len(_sampling(first)) == 2, 60)
            assert first.http.get(place).json()["status"] == "running", "it is done too soon"
            record = place.rpartition("/")[2]
            attempts, begun = _attempts(first, record), time.monotonic()
            second.lose()
            wait(lambda of=record, n=attempts: _attempts(first, of) > n, 300)
            took.append(time.monotonic() - begun)
            first.http.post(f"{place}/cancel")  # the rest is known; it may be done by now
            second.up()
            wait(lambda: len(_sampling(first)) == 2, 60)
    return {"failovers_seconds": took, "failover_seconds": round(statistics.median(took), 1)}


def _attempts(host: Deployment, generation: str) -> int:
    with host.redis() as client:
        return int(json.loads(str(client.get(f"fineserve:generation:{generation}")))["attempts"])


def _sampling(host: Deployment) -> list[str]:
    try:
        workers = host.http.get("/status").json()["workers"]
    except httpx.HTTPError:
        return []
    return [worker["name"] for worker in workers if worker["queue"] == "sample"]


def _recovery_seconds(*hosts: Host) -> float:
    """Seconds until everything runs, is ready, and says so itself. Raises TimeoutError."""
    begun = time.monotonic()

    def well() -> bool:
        alive = {name for host in hosts for name in host.workers()}
        for host in hosts:
            states = [line.split()[1] for line in host.control("status").splitlines()]
            if states != ["RUNNING"] * len(PROGRAMS) or not host.ready():
                return False
        beating = [name for name in _sampling(hosts[0]) if name in alive]
        return len(beating) == len(hosts)

    wait(well, RECOVERY_SECONDS)
    return time.monotonic() - begun


def corrupt(shared: Site) -> list[str]:
    """Artifacts of the bucket that are visible and not whole."""
    os.environ |= shared.bucket.environment  # which its client reads
    bucket = obstore.store.from_url(shared.bucket.url)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        store = ObjectStore(bucket, Path(folder), cache_bytes=10**9)
        for chunk in obstore.list(bucket):
            for each in chunk:
                name, _, file = each["path"].rpartition("/")
                if file != MANIFEST:
                    continue
                try:
                    store.read_all(name, [*store.describe(name)["sha256"]])
                except Exception as error:
                    bad.append(f"{name}: {error}")
    return bad
