import pytest
import redis
from fastapi.testclient import TestClient

from registry.keys import Keys, Scope
from registry.settings import Settings
from service.app import make_app
from tests.service.conftest import LOCAL
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
