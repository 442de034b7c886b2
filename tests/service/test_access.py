"""Every route against every kind of caller, as the routes themselves declare it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
import redis
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute
from structlog.testing import capture_logs

from registry.keys import Keys, Scope
from registry.repository import Repository
from registry.settings import Settings
from service.access import COOKIE, SECURE_COOKIE, Access
from service.app import make_app
from tests.service.conftest import ASYNC, LOCAL, Stack, bearer
from tests.support.answers import refused
from tests.support.archives import png, zipped

UNSAID = "nobody has said what this route needs"
PUBLIC = {"/", "/docs", "/docs/oauth2-redirect", "/healthz", "/readyz", "/session"}
"""Paths of the page's frame, the documentation, probes, and where a key is handed in."""
BODIES = {
    "/plan": {"max_mem_gb": 4},
    "/models": {"max_mem_gb": 4},
    "/generate": {"n": 1, "num_inference_steps": 2},
    "/v1/images/generations": {"prompt": "star", "num_inference_steps": 2},
    "/session": {"key": "none"},
}
SAMPLING = {"/generate", "/v1/images/generations"}


def _accesses(dependant: Dependant) -> Iterator[Access]:
    for inner in dependant.dependencies:
        if isinstance(inner.call, Access):
            yield inner.call
        yield from _accesses(inner)


def _routes(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        yield from _routes(getattr(getattr(route, "original_router", None), "routes", ()))


RULES = [
    (method, route.path, None if route.path in PUBLIC else next(_accesses(route.dependant), UNSAID))
    for route in _routes(make_app(Settings()).routes)
    for method in sorted(route.methods)
]
"""Method, path, and what a route needs: None where it is public."""


def test_every_route_has_a_rule() -> None:
    assert [path for _, path, rule in RULES if rule == UNSAID] == []
    assert set(make_app(Settings()).openapi()["paths"]) <= {path for _, path, _ in RULES}


@dataclass
class Guarded:
    """A service with keys, and somebody's model, generation and task."""

    api: TestClient
    records: Repository
    keys: Keys
    model: str
    generation: str
    task: str

    def key(self, *scopes: Scope, owner: str = "owner", **limits: Any) -> str:
        return self.keys.create(owner, scopes, **limits)[1]

    def revoked_key(self) -> str:
        made, key = self.keys.create("owner", [Scope.ADMIN])
        self.keys.revoke(made.id)
        return key

    def ask(self, method: str, path: str, key: str | None) -> httpx.Response:
        content = BODIES.get(path)
        if path in SAMPLING:
            content = {"model": self.model, **BODIES[path]}
        path = path.format(
            model_id=self.model, generation_id=self.generation, task_id=self.task, name="tiny"
        )
        headers = ASYNC | (bearer(key) if key else {})
        return self.api.request(method, path, json=content, headers=headers)


@pytest.fixture
def guarded(stack: Stack, settings: Settings) -> Guarded:
    keys, api = Keys(settings.resolved_keys_file), stack.api
    headers = ASYNC | bearer(keys.create("owner", [Scope.DEPLOY, Scope.GENERATE])[1])
    model = stack.make_model(headers=headers)
    stack.runtime.repository.models.change(model, status="assembling", revision=0)
    generation = stack.queue(model, headers, n=1)
    pictures = zipped({f"{name}/{i}.png": png() for name in "ab" for i in range(2)}).getvalue()
    task = api.post("/tasks", content=pictures, headers=headers).json()["id"]
    return Guarded(api, stack.runtime.repository, keys, model, generation, task)


CALLERS: dict[str, Callable[[Guarded, Scope], str | None]] = {
    "no key": lambda *_: None,
    "wrong": lambda *_: "fsk-1-2",
    "expired": lambda guarded, _: guarded.key(Scope.ADMIN, valid_for=timedelta(0)),
    "revoked": lambda guarded, _: guarded.revoked_key(),
    "wrong scope": lambda guarded, scope: guarded.key(*{*Scope} - {scope, Scope.ADMIN}),
    "other owner": lambda guarded, scope: guarded.key(scope, owner="other"),
    "right": lambda guarded, scope: guarded.key(scope),
}
"""Keys of callers of a route that needs a scope."""


def expected(caller: str, path: str, rule: Access | None) -> int | None:
    """Status of the refusal; None where there is to be none."""
    if rule is None or caller == "right":
        return None
    if caller in {"no key", "wrong", "expired", "revoked"}:
        return 401
    if caller == "wrong scope":
        return 403 if rule.scope is not None else None
    owned = ("{model_id}", "{generation_id}", "{task_id}")
    return 404 if any(name in path for name in owned) or path in SAMPLING else None


@pytest.mark.parametrize(("method", "path", "rule"), RULES)
def test_a_route_lets_in_whom_its_rule_does(
    guarded: Guarded, settings: Settings, method: str, path: str, rule: Access | None
) -> None:
    if path.endswith("/events"):  # else neither stream ends
        guarded.records.models.change(guarded.model, status="cancelled")
        guarded.records.generations.change(guarded.generation, status="cancelled")
    settings.wait_seconds = 0.1  # nobody samples here
    scope = (rule and rule.scope) or Scope.GENERATE
    for caller, make_key in CALLERS.items():
        status = expected(caller, path, rule)
        if path == "/status/events" and not status:
            continue  # it has no end
        answer = guarded.ask(method, path, make_key(guarded, scope))
        if status:
            assert len(refused(answer, status)["detail"]) > 10, caller
        elif path == "/session":
            assert answer.status_code in {204, 401}, "its body has a wrong key"
        else:
            assert answer.status_code not in {401, 403, 404}, (caller, answer.text)


def test_an_operator_sees_everybodys(guarded: Guarded) -> None:
    admin = guarded.key(Scope.ADMIN, owner="operator")
    other = guarded.key(Scope.DEPLOY, owner="other")
    listed = {
        key: [m["id"] for m in guarded.ask("GET", "/models", key).json()["models"]]
        for key in (admin, other)
    }
    assert listed == {admin: [guarded.model], other: []}
    assert guarded.ask("GET", "/models/{model_id}", admin).status_code == 200


def test_failures_are_told_to_operators(guarded: Guarded) -> None:
    guarded.records.models.change(guarded.model, status="failed", error="secret")
    told = {
        scope: guarded.ask("GET", "/status", guarded.key(scope)).json()["failures"]
        for scope in (Scope.ADMIN, Scope.DEPLOY)
    }
    assert [f["error"] for f in told[Scope.ADMIN]] == ["secret"]
    assert told[Scope.DEPLOY] == []


def test_a_key_may_call_as_often_as_its_limit_says(guarded: Guarded) -> None:
    key = guarded.key(Scope.ADMIN, requests_per_minute=2)
    answers = [guarded.ask("GET", "/models", key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    assert guarded.ask("GET", "/models", guarded.key(Scope.ADMIN)).status_code == 200


def test_an_owner_may_have_as_many_under_way_as_the_keys_limit_says(guarded: Guarded) -> None:
    key = guarded.key(Scope.GENERATE, max_active=2)
    answers = [guarded.ask("POST", "/generate", key) for _ in range(2)]
    assert answers[0].status_code == 202, "its owner has one already"
    refused(answers[1], 429, "2 generations of yours")
    assert int(answers[1].headers["retry-after"]) >= 1


def test_the_page_has_its_key_in_a_cookie(guarded: Guarded) -> None:
    key = guarded.key(Scope.DEPLOY)
    entered = guarded.api.post("/session", json={"key": key})
    assert entered.status_code == 204
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Max-Age=43200" in cookie
    session = guarded.api.cookies[COOKIE]
    assert session not in (key, "")
    status = guarded.api.get("/status").json()
    assert (status["caller"]["owner"], status["caller"]["scopes"]) == ("owner", ["deploy"])
    assert guarded.api.delete("/session").status_code == 204
    assert guarded.api.get("/status").status_code == 401
    kept = {"cookie": f"{COOKIE}={session}"}
    refused(guarded.api.get("/status", headers=kept), 401, kind="session-ended")


def test_a_session_ends_with_its_key(guarded: Guarded) -> None:
    made, key = guarded.keys.create("owner", [Scope.DEPLOY])
    guarded.api.post("/session", json={"key": key})
    assert guarded.api.get("/status").status_code == 200
    guarded.keys.revoke(made.id)
    refused(guarded.api.get("/status"), 401, kind="session-ended")


def test_a_page_of_another_port_changes_nothing_by_the_cookie(guarded: Guarded) -> None:
    guarded.api.post("/session", json={"key": guarded.key(Scope.DEPLOY)})
    path = f"/models/{guarded.model}/cancel"
    other = {"origin": "http://127.0.0.1:3000"}
    refused(guarded.api.post(path, headers=other), 403, kind="foreign-page")
    own = {"origin": "http://127.0.0.1"}
    assert guarded.api.post(path, headers=own).status_code == 200


def test_by_tls_the_cookie_is_of_this_host_alone(guarded: Guarded) -> None:
    guarded.api.base_url = "https://127.0.0.1"
    entered = guarded.api.post("/session", json={"key": guarded.key(Scope.DEPLOY)})
    cookie = entered.headers["set-cookie"]
    assert cookie.startswith(f"{SECURE_COOKIE}=")
    assert "; Path=/;" in cookie
    assert "Secure" in cookie
    assert "Domain" not in cookie


def test_without_a_file_of_keys_nobody_comes_in_where_keys_are_required(
    settings: Settings, client: redis.Redis
) -> None:
    closed = settings.model_copy(update={"require_keys": True})
    with TestClient(make_app(closed), LOCAL) as api:
        refused(api.get("/models"), 401)
        refused(api.get("/models", headers=bearer("any")), 503, "tell the operator")


def test_a_file_of_keys_that_goes_while_nobody_looks_is_missed(
    settings: Settings, client: redis.Redis
) -> None:
    keys = Keys(settings.resolved_keys_file)
    _, key = keys.create("owner", [Scope.ADMIN])
    with TestClient(make_app(settings), LOCAL) as api:
        assert api.get("/models", headers=bearer(key)).status_code == 200
    keys.path.unlink()
    with TestClient(make_app(settings), LOCAL) as api:
        refused(api.get("/models"), 401)


def test_one_owner_has_a_quarter_of_the_places(guarded: Guarded) -> None:
    guarded.api.app.state.fineserve.settings.max_active_generations = 8
    key = guarded.key(Scope.DEPLOY, Scope.GENERATE)
    answers = [guarded.ask("POST", "/generate", key).status_code for _ in range(3)]
    assert answers == [202, 429, 429], "one was there before"


def test_without_keys_there_is_nothing_to_sign_in_to(api: TestClient) -> None:
    refused(api.post("/session", json={"key": "any"}), 409, kind="no-keys")


def test_keys_that_cannot_be_read_let_nobody_in(guarded: Guarded) -> None:
    key = guarded.key(Scope.ADMIN)
    guarded.keys.path.unlink()
    refused(guarded.ask("GET", "/models", key), 503, "tell the operator")


def test_changes_and_refusals_are_audited(guarded: Guarded) -> None:
    made, key = guarded.keys.create("owner", [Scope.DEPLOY])
    with capture_logs() as logs:
        guarded.ask("GET", "/models", key)
        guarded.ask("POST", "/plan", key)
        guarded.ask("DELETE", "/models/{model_id}", key)
        guarded.ask("POST", "/models", None)
        guarded.api.post("/models", content=b" " * 2_000_000)
    told = [log for log in logs if log["event"] == "audit"]
    assert [(log["method"], log["status"], log["key"]) for log in told] == [
        ("DELETE", 204, made.id),
        ("POST", 401, None),
        ("POST", 413, None),
    ]
    assert told[0]["path"] == f"/models/{guarded.model}"
    assert (told[0]["owner"], told[0]["client"]) == ("owner", "testclient")
    assert not any(key in str(log) for log in logs)


def test_browsers_are_told_to_trust_nothing_else(api: TestClient) -> None:
    for path in ("/", "/healthz", "/nothing", "/page/main.js"):
        headers = api.get(path).headers
        assert "script-src" not in headers["content-security-policy"]
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert "'unsafe-inline'" in api.get("/docs").headers["content-security-policy"]
