import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient

from fineserve.wire import Snapshot
from registry.keys import Keys, Scope
from registry.repository import MAX_FAILURES
from registry.settings import Settings
from registry.store import PREVIEWS_FILE, family_name
from service.__main__ import check_host
from service.access import Caller
from service.app import make_app
from service.routes.status import status_events
from tests.service.conftest import LOCAL, Stack


def test_readiness_says_what_is_missing(api: TestClient) -> None:
    assert api.get("/healthz").json() == {"status": "ok"}
    answer = api.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["missing"] == [
        "a worker for the queue 'build'",
        "a worker for the queue 'sample'",
        "a family",
    ]


def test_ready_with_both_workers_and_a_family(stack: Stack) -> None:
    stack.heartbeat(id="another", queue="sample")
    assert stack.api.get("/readyz").json() == {"ready": True, "missing": []}


def test_a_family_without_a_device_profile_is_not_ready(stack: Stack, client: redis.Redis) -> None:
    client.flushall()
    stack.runtime.announce_families()
    stack.heartbeat()
    stack.heartbeat(id="another", queue="sample")
    answer = stack.api.get("/readyz")
    assert answer.status_code == 503
    missing = answer.json()["missing"]
    assert missing == ["a device profile for tiny (measured in under a minute)"]


def test_a_family_that_is_not_calibrated_needs_no_profile(stack: Stack) -> None:
    stack.heartbeat(id="another", queue="sample")
    (family,) = stack.runtime.repository.families()
    bare = family.model_copy(update={"name": "bare", "quality": None})
    stack.runtime.repository.announce_family(bare)
    assert stack.api.get("/readyz").status_code == 200


def test_families(stack: Stack) -> None:
    (family,) = stack.api.get("/families").json()["families"]
    assert family["class_names"][3] == "star"
    assert family["quality"]["source"] == "made up"
    assert stack.api.get("/families/tiny").json() == family
    assert stack.api.get("/families/huge").status_code == 404


def test_without_redis_nothing_is_accepted(tmp_path: Path) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/none.sock", var_dir=tmp_path)
    with TestClient(make_app(settings), LOCAL, raise_server_exceptions=False) as api:
        assert api.get("/healthz").status_code == 200
        readiness = api.get("/readyz")
        assert readiness.status_code == 503
        assert "Redis" in readiness.json()["missing"][0]
        for answer in (
            api.post("/models", json={"max_mem_gb": 4}),
            api.post("/plan", json={"max_mem_gb": 4}),
            api.post("/generate", json={"model": "m-0123456789abcdef"}),
            api.get("/models"),
        ):
            assert answer.status_code == 503
            assert "Redis cannot be reached" in answer.json()["detail"]
            assert answer.headers["retry-after"]


def test_the_page_and_the_documentation_need_no_host_elsewhere(api: TestClient) -> None:
    for page in (api.get("/"), api.get("/docs")):
        assert page.status_code == 200
        linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(linked) >= 3
        for path in linked:
            assert "//" not in path
            assert api.get(f"/{path.lstrip('/')}").status_code == 200
    assert api.put("/models").json()["type"] == "urn:fineserve:problem:method-not-allowed"


def test_every_module_of_the_page_is_there(api: TestClient) -> None:
    seen, modules = set(), ["main.js"]
    while modules:
        name = modules.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = api.get(f"/page/{name}")
        assert answer.status_code == 200, name
        assert "javascript" in answer.headers["content-type"]
        modules += re.findall(r'from "\./([^"]+)"', answer.text)
    assert {"budgets.js", "models.js", "playground.js", "health.js", "vendor/uplot.js"} <= seen


def test_the_status_at_a_glance(stack: Stack) -> None:
    stack.heartbeat(id="host:7:1", queue="sample", gauges={"engine_models": 3})
    stack.make_model()
    failed = stack.make_model()
    stack.runtime.repository.models.change(failed, status="failed", error="Broken: in two")
    status = stack.api.get("/status").json()
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
    failures = stack.api.get("/status").json()["failures"]
    assert [f["error"] for f in failures] == [str(n) for n in range(MAX_FAILURES + 1, 1, -1)]


def test_snapshots_come_when_something_has_changed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.status.SNAPSHOT_SECONDS", 0.01)

    async def two() -> list[Snapshot]:
        told: list[Snapshot] = []
        async for event in status_events(stack.api.app.state.fineserve, Caller("", None)):
            told.append(Snapshot.model_validate_json(event.raw_data))
            if len(told) == 2:
                break
            await asyncio.to_thread(stack.make_model)
        return told

    before, after = asyncio.run(two())
    assert [len(snapshot.models) for snapshot in (before, after)] == [0, 1]
    assert after.status is not None
    assert after.status.active_models == 1


def test_a_revoked_key_hears_no_more(
    stack: Stack, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.status.SNAPSHOT_SECONDS", 0.01)
    state = stack.api.app.state.fineserve  # type: ignore[attr-defined]
    keys = Keys(settings.resolved_keys_file)
    key, _ = keys.create("owner", [Scope.GENERATE])

    async def heard() -> int:
        told = 0
        async for _ in status_events(state, Caller("owner", key)):
            told += 1
            await asyncio.to_thread(keys.revoke, key.id)
        return told

    assert asyncio.run(heard()) == 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_without_keys_a_site_elsewhere_cannot_reach_it_by_its_own_name(
    api: TestClient, settings: Settings, host: str
) -> None:
    answer = api.get("/families", headers={"host": host})
    assert answer.status_code == 421
    assert answer.json()["type"] == "urn:fineserve:problem:foreign-host"
    for own in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert api.get("/healthz", headers={"host": own}).status_code == 200
    Keys(settings.resolved_keys_file).create("owner", [Scope.ADMIN])
    assert api.get("/families", headers={"host": host}).status_code == 401


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ("service, fine.example", "service:8000", 200),
        ("service, fine.example", "fine.example", 200),
        ("service, fine.example", "evil.example", 421),
        ("*", "evil.example", 200),
    ],
)
def test_without_keys_it_answers_by_the_names_that_it_is_told(
    settings: Settings, client: redis.Redis, allowed: str, host: str, status: int
) -> None:
    told = settings.model_copy(update={"trusted_network": True, "allowed_hosts": allowed})
    with TestClient(make_app(told), LOCAL) as api:
        assert api.get("/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null"])
def test_without_keys_the_page_of_another_site_changes_nothing(
    api: TestClient, settings: Settings, origin: str
) -> None:
    cancel = "/models/m-0123456789abcdef/cancel"
    refused = api.post(cancel, headers={"origin": origin})
    assert refused.status_code == 403
    assert refused.json()["type"] == "urn:fineserve:problem:foreign-page"
    assert api.get("/families", headers={"origin": origin}).status_code == 200
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert api.post(cancel, headers=own).status_code == 404
    Keys(settings.resolved_keys_file).create("owner", [Scope.ADMIN])
    assert api.post(cancel, headers={"origin": origin}).status_code == 401


def test_the_page_of_a_host_that_is_named_may_change_things(
    settings: Settings, client: redis.Redis
) -> None:
    told = settings.model_copy(update={"allowed_hosts": "fine.example"})
    with TestClient(make_app(told), LOCAL) as api:
        for origin, status in (("https://fine.example", 404), ("https://evil.example", 403)):
            cancel = "/models/m-0123456789abcdef/cancel"
            assert api.post(cancel, headers={"origin": origin}).status_code == status


def test_a_body_larger_than_any_request_is_not_read(api: TestClient) -> None:
    chunks = iter([b" " * 2_000_000])
    for content, status in ((b" " * 2_000_000, 413), (chunks, 411)):
        answer = api.post("/plan", content=content)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_full_redis_takes_nothing_new(stack: Stack, client: redis.Redis) -> None:
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 1000)
    try:
        answer = stack.api.post("/models", json={"max_mem_gb": 4})
    finally:
        client.config_set("maxmemory", 0)
    assert answer.status_code == 507
    assert "Redis is full" in answer.json()["detail"]


def test_images_are_counted_for_each_model_until_it_is_deleted(stack: Stack) -> None:
    repository = stack.runtime.repository
    model, other = stack.ready_model(), stack.ready_model()
    for n in (2, 3):
        headers = {"prefer": "respond-async"}
        answer = stack.api.post("/generate", json={"model": model, "n": n}, headers=headers)
        stack.sampler.generate(answer.json()["id"])
    assert repository.images_made() == {model: 5}
    repository.models.change(other, status="deleted")
    repository.models.change(model, status="deleted")
    assert repository.images_made() == {}


def test_previews_of_a_family(stack: Stack) -> None:
    assert stack.api.get("/families/tiny/previews.png").status_code == 410
    (family,) = stack.runtime.repository.families()
    stack.runtime.store.put(family_name(family.fingerprint), {PREVIEWS_FILE: b"a sheet"}, {})
    answer = stack.api.get("/families/tiny/previews.png")
    assert (answer.content, answer.headers["content-type"]) == (b"a sheet", "image/png")
    assert stack.api.get("/families/huge/previews.png").status_code == 404


def test_an_unexpected_error_is_a_problem_without_details(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.models.solve_budget", lambda *_: 1 / 0)
    api = TestClient(stack.api.app, LOCAL, raise_server_exceptions=False)
    answer = api.post("/models", json={"max_mem_gb": 4})
    assert answer.status_code == 500
    assert "division" not in answer.text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org"])
def test_off_loopback_it_refuses_to_start(host: str) -> None:
    with pytest.raises(SystemExit, match="would let anybody in"):
        check_host(Settings(host=host))


def test_a_network_that_the_operator_trusts_is_fine() -> None:
    check_host(Settings(host="0.0.0.0", trusted_network=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_fine(host: str) -> None:
    check_host(Settings(host=host))


def test_the_service_runs_where_there_is_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'accelerate', 'torchao'):\n"
        "    sys.modules[name] = None\n"
        "import service.__main__\n"
        "service.__main__.make_app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_profile_is_not_ready(stack: Stack) -> None:
    stack.heartbeat(torch_version="1.0")
    assert stack.api.get("/readyz").json()["missing"][-1].startswith("a device profile for tiny")
