from pathlib import Path

import redis
from fastapi.testclient import TestClient

from registry.lifecycle import MAX_FAILURES
from registry.settings import Settings
from service.app import make_app
from tests.service.conftest import LOCAL, Stack
from tests.support.answers import refused
from tests.support.devices import beat
from worker.runtime import Runtime


def missing(api: TestClient) -> list[str]:
    answer = api.get("/readyz")
    assert answer.status_code == 503
    return answer.json()["missing"]


def test_readiness_says_what_is_missing(api: TestClient) -> None:
    assert api.get("/healthz").json() == {"status": "ok"}
    assert missing(api) == [
        "a worker for the queue 'build'",
        "a worker for the queue 'sample'",
        "a family",
    ]


def test_ready_with_both_workers_and_a_family(stack: Stack) -> None:
    stack.heartbeat(id="another", queue="sample")
    assert stack.told("/readyz") == {"ready": True, "missing": []}


def test_a_family_without_a_device_profile_is_not_ready(stack: Stack, client: redis.Redis) -> None:
    client.flushall()
    stack.runtime.announce_families()
    stack.heartbeat()
    stack.heartbeat(id="another", queue="sample")
    assert missing(stack.api) == ["a device profile for tiny (estimated in seconds)"]


def test_a_family_that_is_not_calibrated_needs_no_profile(stack: Stack) -> None:
    stack.heartbeat(id="another", queue="sample")
    (family,) = stack.runtime.repository.families()
    bare = family.model_copy(update={"name": "bare", "quality": None})
    stack.runtime.repository.announce_family(bare)
    assert stack.api.get("/readyz").status_code == 200


def test_workers_that_come_on_demand_may_be_away(settings: Settings, runtime: Runtime) -> None:
    on_demand = settings.model_copy(update={"workers_on_demand": True})
    runtime.repository.take_back_heartbeat("a-worker")
    worker = Runtime.start(on_demand)
    beat(worker, queue="build")
    worker.announce_families()
    with TestClient(make_app(on_demand), LOCAL) as api:
        assert missing(api) == ["a worker for the queue 'sample'"], "nobody ever saw one"
        beat(worker, id="another", queue="sample")
        for gone in ("a-worker", "another"):
            worker.repository.take_back_heartbeat(gone)
        assert api.get("/readyz").json() == {"ready": True, "missing": []}
        assert api.get("/status").json()["workers"] == []
        made = api.post("/models", json={"max_mem_gb": 4})
        assert made.status_code == 202, made.text
        assert api.get("/status").json()["queues"]["build"] == 1
    with TestClient(make_app(settings), LOCAL) as api:
        assert api.post("/models", json={"max_mem_gb": 4}).status_code == 503


def test_without_redis_nothing_is_accepted(tmp_path: Path) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/none.sock", var_dir=tmp_path)
    with TestClient(make_app(settings), LOCAL, raise_server_exceptions=False) as api:
        assert api.get("/healthz").status_code == 200
        assert "Redis" in missing(api)[0]
        for answer in (
            api.post("/models", json={"max_mem_gb": 4}),
            api.post("/plan", json={"max_mem_gb": 4}),
            api.post("/generate", json={"model": "m-0123456789abcdef"}),
            api.get("/models"),
        ):
            refused(answer, 503, "Redis cannot be reached")


def test_the_status_tells_of_models_queues_failures_and_workers(stack: Stack) -> None:
    stack.heartbeat(id="host:7:1", queue="sample", gauges={"engine_models": 3})
    stack.make_model()
    failed = stack.make_model()
    stack.runtime.repository.models.change(failed, status="failed", error="Broken: in two")
    status = stack.told("/status")
    assert status["missing"] == []
    assert status["families"] == ["tiny"]
    assert status["queues"] == {"build": 2, "sample": 0}
    assert status["active_models"] == 1
    (failure,) = status["failures"]
    assert (failure["kind"], failure["id"], failure["error"]) == ("model", failed, "Broken: in two")
    of = {worker["queue"]: worker for worker in status["workers"]}
    assert of["sample"]["name"] == "host:7"
    assert of["sample"]["gauges"] == {"engine_models": 3}
    assert status["redis_memory_bytes"] > 0


def test_only_the_last_failures_are_kept(stack: Stack) -> None:
    models = stack.runtime.repository.models
    for number in range(MAX_FAILURES + 2):
        models.change(stack.make_model(), status="failed", error=str(number))
    failures = stack.told("/status")["failures"]
    assert [f["error"] for f in failures] == [str(n) for n in range(MAX_FAILURES + 1, 1, -1)]


def test_a_full_redis_takes_nothing_new(stack: Stack, client: redis.Redis) -> None:
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 1000)
    try:
        refused(stack.deploy(), 507, "Redis is full")
    finally:
        client.config_set("maxmemory", 0)


def test_a_stale_profile_is_not_ready(stack: Stack) -> None:
    stack.heartbeat(torch_version="1.0")
    assert missing(stack.api)[-1].startswith("a device profile for tiny")


def test_readiness_says_what_a_write_would_say(stack: Stack, client: redis.Redis) -> None:
    stack.heartbeat(id="another", queue="sample")
    assert stack.api.get("/readyz").status_code == 200
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        assert missing(stack.api)[0].startswith("Redis, which refuses to work (You can't write")
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert stack.api.get("/readyz").status_code == 200


def test_readiness_tells_nobody_where_redis_is(tmp_path: Path) -> None:
    settings = Settings(redis_url="redis://:s3cret@127.0.0.1:1/0", var_dir=tmp_path)
    with TestClient(make_app(settings), LOCAL) as api:
        assert missing(api) == ["Redis, which cannot be reached"]
