"""What a bucket costs beside a directory, and what a second host is worth."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import RESULTS, Figures, say
from benchmarks.scale.site import Host, Site, site
from benchmarks.serving.load import MakeRequest, Result, closed_loop
from benchmarks.trust.site import FASHION
from registry.repository import Repository

CLIENTS = 16
TURNS, TURN_SECONDS, WARMUP_SECONDS = 6, 20.0, 4.0
RUN_SECONDS = 60.0
LISTED, LOOKS = 500, 20
STEPS = 10
SETTINGS: dict[str, object] = {"profile_seconds": 10, "verify_seconds": 2, "compile": "false"}


def asking(model: str) -> MakeRequest:
    """Requests for one image in STEPS steps, unguided."""

    def request(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        body = {
            "model": model,
            "class_labels": [number % 10],
            "seed": number,
            "num_inference_steps": STEPS,
            "guidance_scale": 1,
        }
        return "/generate", body, {}

    return request


def bucket_over_directory() -> Figures:
    """The 16-client figure, in turns, of a host whose artifacts are in a bucket, and of one whose
    are on its disk; and the time to a first image."""
    with (
        site() as shared,
        Deployment(FASHION, **SETTINGS) as directory,
        Host(FASHION, shared.redis, shared.bucket, **SETTINGS) as bucket,
    ):
        del bucket.environment["OMP_NUM_THREADS"]
        kinds = {"directory": directory, "bucket": bucket}
        models = {}
        for name, host in kinds.items():
            host.up()
            models[name] = host.ready_model()
        first = {name: _first_image_seconds(host) for name, host in kinds.items()}
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(TURNS):
            for name in sorted(kinds, reverse=bool(turn % 2)):
                result = _load(kinds[name], models[name], CLIENTS, TURN_SECONDS)
                rates[name].append(result.images_per_second)
                say(f"turn {turn + 1}, {name}", images_per_second=rates[name][-1])
    ratios = [b / d for b, d in zip(rates["bucket"], rates["directory"], strict=True)]
    return {
        "clients": CLIENTS,
        "images_per_second": rates,
        "ratios": ratios,
        "s3_over_directory": round(statistics.median(ratios), 3),
        "first_image_seconds": first,
        "first_image_seconds_more": round(first["bucket"] - first["directory"], 2),
    }


def _first_image_seconds(host: Deployment) -> float:
    """Median seconds from POST /models to its first image, at revision 0."""
    took = []
    for _ in range(5):
        begun = time.monotonic()
        model = host.client.create_model(max_mem_gb=4).id
        asked = {"model": model, "num_inference_steps": STEPS}
        wait(lambda body=asked: host.http.post("/generate", json=body).is_success)
        took.append(time.monotonic() - begun)
        host.client.wait(model)
    return round(statistics.median(took), 2)


def _load(host: Deployment, model: str, clients: int, seconds: float) -> Result:
    result = closed_loop(host.url, asking(model), clients, seconds, WARMUP_SECONDS)
    if result.failures:
        raise RuntimeError(f"{result.failures} failed: {result.first_failure}")
    return result


def constants() -> Figures:
    """What a simulation has to know, of one host that has one core."""
    with site() as shared, _host(shared, 0) as one:
        model = one.ready_model()
        steps = _step_costs(one)
        alone = _load(one, model, 1, TURN_SECONDS)
        before = _used_seconds(one, shared), _commands(one)
        result = _load(one, model, 2 * CLIENTS, RUN_SECONDS)
        after = _used_seconds(one, shared), _commands(one)
        with one.redis() as client:
            load_seconds = _load_seconds(one)
            listed = _seconds_a_listed_worker(client)
    done = result.requests * (RUN_SECONDS + WARMUP_SECONDS) / RUN_SECONDS
    return {
        "steps": STEPS,
        "clients": 2 * CLIENTS,
        "images_per_second": result.images_per_second,
        "latency_p50": result.latency_p50,
        "latency_p95": result.latency_p95,
        "alone_seconds": alone.latency_p50,
        "step_rows": steps["rows"],
        "step_seconds": steps["seconds"],
        "full_rows": steps["full_rows"],
        "cpu_seconds_a_request": {
            name: (after[0][name] - before[0][name]) / done for name in after[0]
        },
        "redis_commands_a_request": (after[1] - before[1]) / done,
        "cold_load_seconds": load_seconds,
        "listed_worker_seconds": listed,
    }


def two_over_one() -> Figures:
    """Images per second of two hosts, each with one core, over those of one of them."""
    known = json.loads((RESULTS / "scale.json").read_text())["parts"]
    predicted = known["prediction"]
    with site() as shared, _host(shared, 0) as one:
        model = one.ready_model()
        alone = _load(one, model, 2 * CLIENTS, RUN_SECONDS)
        say("one host", images_per_second=alone.images_per_second)
        with _host(shared, 1) as other:
            both = _at_once((one, other), model, 2 * CLIENTS, RUN_SECONDS)
    rate = sum(result.images_per_second for result in both)
    p95 = statistics.mean(result.latency_p95 for result in both)
    say("two hosts", images_per_second=rate)
    errors = {
        "images_per_second": predicted["images_per_second"] / rate - 1,
        "latency_p95": predicted["latency_p95"] / p95 - 1,
    }
    return {
        "one": alone.as_dict(),
        "two": [result.as_dict() for result in both],
        "images_per_second": rate,
        "latency_p95": p95,
        "two_hosts_over_one": round(rate / alone.images_per_second, 2),
        "errors": errors,
        "simulation_error": round(max(map(abs, errors.values())), 3),
    }


def _at_once(hosts: Sequence[Deployment], model: str, clients: int, seconds: float) -> list[Result]:
    with ThreadPoolExecutor(len(hosts)) as pool:
        return [*pool.map(lambda host: _load(host, model, clients, seconds), hosts)]


@contextlib.contextmanager
def _host(shared: Site, core: int) -> Iterator[Host]:
    with Host(FASHION, shared.redis, shared.bucket, core, **SETTINGS) as host:
        host.up()
        yield host


def _step_costs(host: Deployment) -> Mapping[str, Any]:
    """Steps as the engine has measured them, once it has."""

    def kept() -> Mapping[str, Any] | None:
        with host.redis() as client:
            for key in client.scan_iter("fineserve:step-costs:*"):
                for name, content in client.hgetall(key).items():
                    if "float32" in name:
                        costs: Mapping[str, Any] = json.loads(content)["costs"]
                        return costs
        return None

    return wait(kept, 300)


def _seconds_a_listed_worker(client: "redis.Redis") -> dict[str, float]:
    """Seconds of Redis, and of who reads, for each worker that a request has to look at."""
    repository = Repository(client, 60)
    told, *_ = repository.workers()
    for number in range(LISTED):
        repository.heartbeat(told.model_copy(update={"id": f"made-up-{number}"}), 60)
    before, begun = _redis_seconds(client), time.process_time()
    for _ in range(LOOKS):
        repository.workers()
    reader = time.process_time() - begun
    server = _redis_seconds(client) - before
    return {"redis": server / LOOKS / LISTED, "api": reader / LOOKS / LISTED}


def _redis_seconds(client: "redis.Redis") -> float:
    used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def _load_seconds(host: Deployment) -> float:
    """Median seconds by which a model's first image takes longer than its second."""
    more = []
    for _ in range(5):
        made = host.client.create_model(max_mem_gb=4).id
        host.client.wait(made)
        took = []
        for _ in range(2):
            begun = time.monotonic()
            body = {"model": made, "num_inference_steps": STEPS, "guidance_scale": 1}
            host.http.post("/generate", json=body).raise_for_status()
            took.append(time.monotonic() - begun)
        more.append(max(0.0, took[0] - took[1]))
    return round(statistics.median(more), 4)


def _commands(host: Deployment) -> int:
    with host.redis() as client:
        return int(client.info("stats")["total_commands_processed"])


def _used_seconds(host: Deployment, shared: Site) -> dict[str, float]:
    """Seconds of processors that each kind of process has used."""
    api, sample = host.pids("-m service"), host.pids("-m worker sample")
    return {
        "api": sum(map(_cpu_seconds, api)),
        "worker": sum(map(_cpu_seconds, sample)),
        "redis": sum(map(_cpu_seconds, _family(shared.redis.process.pid))),
        "bucket": _cpu_seconds(shared.bucket.process.pid),
        "clients": time.process_time(),
    }


def _family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
