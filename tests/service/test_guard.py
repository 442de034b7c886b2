import asyncio

import pytest
import redis
from fastapi.testclient import TestClient
from starlette.types import Message
from structlog.testing import capture_logs

from registry.keys import Keys, Scope
from registry.settings import Settings
from service import guard
from service.app import make_app
from service.problems import Problem
from tests.service.conftest import LOCAL, Stack
from tests.support.answers import refused

CANCEL = "/models/m-0123456789abcdef/cancel"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_without_keys_a_site_elsewhere_cannot_reach_the_service_by_its_own_name(
    api: TestClient, settings: Settings, host: str
) -> None:
    refused(api.get("/families", headers={"host": host}), 421, kind="foreign-host")
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
def test_without_keys_the_service_answers_by_the_names_that_it_is_told(
    settings: Settings, client: redis.Redis, allowed: str, host: str, status: int
) -> None:
    told = settings.model_copy(update={"trusted_network": True, "allowed_hosts": allowed})
    with TestClient(make_app(told), LOCAL) as api:
        assert api.get("/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null"])
def test_without_keys_the_page_of_another_site_changes_nothing(
    api: TestClient, settings: Settings, origin: str
) -> None:
    refused(api.post(CANCEL, headers={"origin": origin}), 403, kind="foreign-page")
    assert api.get("/families", headers={"origin": origin}).status_code == 200
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert api.post(CANCEL, headers=own).status_code == 404
    Keys(settings.resolved_keys_file).create("owner", [Scope.ADMIN])
    assert api.post(CANCEL, headers={"origin": origin}).status_code == 401


def test_the_page_of_a_named_host_changes_things(settings: Settings, client: redis.Redis) -> None:
    told = settings.model_copy(update={"allowed_hosts": "fine.example"})
    with TestClient(make_app(told), LOCAL) as api:
        for origin, status in (("https://fine.example", 404), ("https://evil.example", 403)):
            assert api.post(CANCEL, headers={"origin": origin}).status_code == status


def test_a_body_larger_than_any_request_is_not_read(api: TestClient) -> None:
    for content in (b" " * 2_000_000, iter([b" " * 2_000_000])):
        refused(api.post("/plan", content=content), 413)


def test_a_body_that_does_not_come_is_not_waited_for(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)

    async def silent() -> Message:
        await asyncio.sleep(10)
        raise AssertionError

    scope = {"headers": [(b"content-length", b"5")], "path": "/plan"}
    with pytest.raises(Problem, match="was not there within 0 s"):
        asyncio.run(guard.Body(scope, silent).read(100, "/plan"))


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_says_that_it_is_json(api: TestClient, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = api.post("/plan", content=b'{"max_mem_gb": 1}', headers=headers)
    refused(answer, 415, "Content-Type: application/json")


@pytest.mark.parametrize("path", ["/healthz", "/", "/models", "/v1/models", "/openapi.json"])
def test_head_is_answered_as_get_is_without_the_body(api: TestClient, path: str) -> None:
    head, got = api.head(path), api.get(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    for name in ("content-type", "content-length", "x-frame-options"):
        assert head.headers[name] == got.headers[name]


def test_head_of_a_stream_ends(stack: Stack) -> None:
    model = stack.make_model()
    head = stack.api.head(f"/models/{model}/events")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")


def test_names_of_hosts_have_no_case(api: TestClient) -> None:
    for host in ("LOCALHOST:8000", "Localhost", "127.0.0.1"):
        assert api.get("/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_empty_body_in_chunks_is_no_body(api: TestClient, method: str) -> None:
    answer = api.request(method, "/models/m-0123456789abcdef", content=iter([]))
    refused(answer, 404)


def test_a_long_path_is_cut_in_the_log(api: TestClient) -> None:
    with capture_logs() as logs:
        api.post("/" + "a" * 10_000)
    (line,) = [line for line in logs if line["event"] == "audit"]
    assert len(line["path"]) == guard.MOST_LOGGED
