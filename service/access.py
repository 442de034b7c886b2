"""Callers, and what they may do.

Without API keys everybody may do everything: the service then listens on this host alone. With
keys each route says what it needs by one of the types below, and records of another owner are not
found.
"""

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute

from registry.datasets import Dataset
from registry.errors import RecordNotFound
from registry.keys import ApiKey, Scope
from registry.lifecycle import Room
from registry.records import GenerationRecord, ModelRecord, Record
from service.deps import State, StateDep
from service.problems import Problem

COOKIE, SECURE_COOKIE = "fineserve-session", "__Host-fineserve-session"
"""Names of a session's cookie; the second is of this host alone, which TLS makes sure of."""
MOST_SHARE = 0.25
"""Share of what may be unfinished at once that one owner may have, if their keys say nothing."""

_bearer = HTTPBearer(auto_error=False, description="An API key: `fineserve keys create`")
_cookie = APIKeyCookie(
    name=COOKIE, auto_error=False, description="A session, begun by POST /session for the page"
)
_secure_cookie = APIKeyCookie(name=SECURE_COOKIE, auto_error=False, description="The same, by TLS")


@dataclass(frozen=True)
class Caller:
    owner: str
    key: ApiKey | None
    """API key of the caller; None where there are no keys, and everybody may do everything."""

    def may(self, scope: Scope) -> bool:
        return self.key is None or scope in self.key.scopes or Scope.ADMIN in self.key.scopes

    @property
    def sees(self) -> str | None:
        """Owner whose records the caller sees; None is everybody's."""
        return None if self.may(Scope.ADMIN) else self.owner

    def room(self, most_of_all: int) -> Room:
        if self.key is None:
            return Room(all=most_of_all)
        return Room(most_of_all, self.key.max_active or math.ceil(MOST_SHARE * most_of_all))


async def identify(
    request: Request,
    state: StateDep,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    cookie: Annotated[str | None, Depends(_cookie)],
    secure_cookie: Annotated[str | None, Depends(_secure_cookie)],
) -> Caller:
    """Caller of a request. Raises Problem 401, or 429 when the key's calls are used up."""
    if not state.keys.required:
        sent = request.headers.get("authorization", "")
        return Caller(hashlib.sha256(sent.encode()).hexdigest()[:16] if sent else "", None)
    session = secure_cookie or cookie
    if bearer is None and session is not None:
        key = await run_in_threadpool(_of_session, state, session)
    else:
        key = authenticate(state, bearer.credentials if bearer else None)
    request.state.key = key  # for the audit log
    if key.requests_per_minute is not None:
        await run_in_threadpool(_count, state, key, key.requests_per_minute)
    return Caller(key.owner, key)


def authenticate(state: State, sent: str | None) -> ApiKey:
    """Key that was sent, if it is valid. Raises Problem 401 that says what is wrong."""
    key = state.keys.find(sent) if sent else None
    if key and key.state == "valid":
        return key
    if not sent:
        wrong = "this service needs an API key: send `Authorization: Bearer KEY`"
    elif key is None:
        wrong = "no such API key: check that it was copied whole"
    else:
        wrong = f"the API key {key.id} is {key.state}"
    raise Problem(
        401,
        "unauthenticated",
        f"{wrong}; whoever runs the service makes one with `fineserve keys create`",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _of_session(state: State, session: str) -> ApiKey:
    """Key of a session, if both are valid. Raises Problem 401."""
    sha256 = state.sessions.key_sha256(session)
    key = state.keys.of_sha256(sha256) if sha256 else None
    if key and key.state == "valid":
        return key
    raise Problem(
        401,
        "session-ended",
        "this session has ended, or its key has: sign in again",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _count(state: State, key: ApiKey, per_minute: int) -> None:
    limit = RateLimitItemPerMinute(per_minute)
    if state.limiter.hit(limit, key.id):
        return
    reset = state.limiter.get_window_stats(limit, key.id).reset_time
    seconds = max(1, math.ceil(reset - time.time()))
    raise Problem(
        429,
        "too-many-requests",
        f"the API key {key.id} may make {per_minute} requests a minute; retry in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )


CallerDep = Annotated[Caller, Depends(identify)]


@dataclass(frozen=True)
class Access:
    """Dependency that is the caller, if their key has a scope. Raises Problem 403."""

    scope: Scope | None

    async def __call__(self, caller: CallerDep) -> Caller:
        if self.scope is None or caller.may(self.scope):
            return caller
        assert caller.key is not None
        raise Problem(
            403,
            "forbidden",
            f"this needs a key with the scope {self.scope}; {caller.key.id} has "
            f"{', '.join(caller.key.scopes)}",
        )


Anybody = Annotated[Caller, Depends(Access(None))]
"""A caller with any valid key."""
Sampler = Annotated[Caller, Depends(Access(Scope.GENERATE))]
Deployer = Annotated[Caller, Depends(Access(Scope.DEPLOY))]
Operator = Annotated[Caller, Depends(Access(Scope.ADMIN))]

R = TypeVar("R", bound=Record | Dataset)


def visible(record: R, caller: Caller) -> R:
    """The record. Raises RecordNotFound for another owner's: nobody learns that it is there."""
    if caller.sees not in (None, record.owner):
        raise RecordNotFound(f"no {record.NAME} {record.id!r}")
    return record


def _model(model_id: str, state: StateDep, caller: CallerDep) -> ModelRecord:
    return visible(state.repository.models.get(model_id), caller)


def _generation(generation_id: str, state: StateDep, caller: CallerDep) -> GenerationRecord:
    return visible(state.repository.generations.get(generation_id), caller)


def _dataset(task_id: str, state: StateDep, caller: CallerDep) -> Dataset:
    return visible(state.datasets.get(task_id), caller)


DatasetDep = Annotated[Dataset, Depends(_dataset)]
ModelDep = Annotated[ModelRecord, Depends(_model)]
GenerationDep = Annotated[GenerationRecord, Depends(_generation)]
