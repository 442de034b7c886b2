import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient

from registry.settings import Settings
from service.__main__ import check_host
from service.app import make_app
from tests.service.conftest import Stack


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
    with TestClient(make_app(settings), raise_server_exceptions=False) as api:
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


def test_the_page_for_people_is_the_documentation(api: TestClient) -> None:
    page = api.get("/")
    assert page.url.path == "/docs"
    scripts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(scripts) >= 3
    for path in scripts:
        assert path.startswith("/"), "the page needs a host elsewhere"
        assert api.get(path).status_code == 200
    assert api.put("/models").json()["type"] == "urn:fineserve:problem:method-not-allowed"


def test_an_unexpected_error_is_a_problem_without_details(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.models.solve_budget", lambda *_: 1 / 0)
    api = TestClient(stack.api.app, raise_server_exceptions=False)
    answer = api.post("/models", json={"max_mem_gb": 4})
    assert answer.status_code == 500
    assert "division" not in answer.text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org"])
def test_off_loopback_it_refuses_to_start(host: str) -> None:
    with pytest.raises(SystemExit, match="would let anybody in"):
        check_host(Settings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_fine(host: str) -> None:
    check_host(Settings(host=host))


def test_the_service_runs_where_there_is_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'accelerate', 'safetensors', 'torchao'):\n"
        "    sys.modules[name] = None\n"
        "import service.__main__\n"
        "service.__main__.make_app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_profile_is_not_ready(stack: Stack) -> None:
    stack.heartbeat(torch_version="1.0")
    assert stack.api.get("/readyz").json()["missing"][-1].startswith("a device profile for tiny")
