"""Errors as RFC 9457 problem details, each with a stable `type`."""

from collections.abc import Callable, Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from redis import RedisError, ResponseError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from registry.errors import (
    ArtifactError,
    IdempotencyConflict,
    IllegalTransition,
    KeysError,
    QueueFull,
    RecordNotFound,
    RecordUnreadable,
    StorageFull,
    StoreAway,
    StoreRefuses,
)

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
OPENAI = "/v1/"
THEIR_FIELDS = {"class_labels": "prompt"}
"""Fields of ours, by what OpenAI's clients call them."""
MOST_ERRORS = 20
"""Errors of one invalid request that its sender is told."""


class NoContent(Exception):
    """Answer 204: there is nothing, and never will be."""


class Problem(Exception):
    """A refusal that a route raises; `kind` is the last part of the problem's `type`."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers, self.members = headers, members

    def response(self) -> JSONResponse:
        body = {
            "type": f"urn:fineserve:problem:{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }
        content = jsonable_encoder(body)
        return JSONResponse(content, self.status, headers=self.headers, media_type=MEDIA_TYPE)


def answer_of(problem: Problem, path: str) -> JSONResponse:
    """Answer that tells of a problem, with an `error`, too, where OpenAI's clients expect it."""
    if not path.startswith(OPENAI):
        return problem.response()
    fields = [error["field"] for error in problem.members.get("errors", ())]
    field = problem.members.get("field", fields[0] if fields else None) or None
    param = THEIR_FIELDS.get(str(field), field)
    kind, detail = problem.kind, problem.detail
    error = {"message": detail, "type": kind, "param": param, "code": kind}
    status = 400 if problem.status == 422 else problem.status
    return Problem(status, kind, detail, problem.headers, error=error).response()


def unavailable(detail: str, kind: str = "unavailable", headers: Mapping[str, str] = {}) -> Problem:
    return Problem(503, kind, detail, headers={"Retry-After": "2", **headers})


def storage_full(why: str) -> Problem:
    return Problem(
        507,
        "storage-full",
        f"{why}; retry when there is room: delete models that nobody uses, or tell the operator",
        headers={"Retry-After": "60"},
    )


def _invalid(error: RequestValidationError) -> Problem:
    found = error.errors()
    told = [
        {"field": "", "message": f"no JSON from its byte {e['loc'][-1]} on: {e['ctx']['error']}"}
        if e["type"] == "json_invalid"
        else {
            "field": ".".join(str(part) for part in e["loc"][1:]),
            "message": e["msg"].removeprefix("Value error, "),
        }
        for e in found[:MOST_ERRORS]
    ]
    lines = [f"{e['field'] or 'body'}: {e['message']}" for e in told]
    if len(found) > MOST_ERRORS:
        lines.append(f"and {len(found) - MOST_ERRORS} more")
    return Problem(422, "invalid-request", "; ".join(lines), errors=told)


HTTP = {
    404: ("not-found", "there is no such path; /docs shows those that there are"),
    405: ("method-not-allowed", "this path has other methods; /docs shows them"),
}
"""Kind and detail of what Starlette refuses by itself."""


def _http(error: HTTPException) -> Problem:
    kind, detail = HTTP.get(error.status_code, ("http-error", str(error.detail)))
    headers = dict(error.headers) if error.headers else None
    return Problem(error.status_code, kind, detail, headers)


PROBLEMS: dict[type[Exception], Callable[[Any], Problem]] = {
    Problem: lambda error: error,
    RequestValidationError: _invalid,
    HTTPException: _http,
    # nginx's status for an answer that nobody waits for
    ClientDisconnect: lambda _: Problem(499, "client-left", "the client left"),
    RecordNotFound: lambda error: Problem(404, "not-found", str(error)),
    RecordUnreadable: lambda error: Problem(410, "unreadable", str(error)),
    IllegalTransition: lambda error: Problem(409, "illegal-transition", str(error)),
    IdempotencyConflict: lambda error: Problem(
        422, "idempotency-conflict", f"{error}; use a new key"
    ),
    QueueFull: lambda error: Problem(
        429, "queue-full", str(error), {"Retry-After": str(error.retry_seconds)}
    ),
    StorageFull: lambda error: storage_full(str(error)),
    StoreAway: lambda _: unavailable("the artifact store cannot be reached; retry shortly"),
    StoreRefuses: lambda _: unavailable("the artifact store refuses to work; tell the operator"),
    KeysError: lambda _: unavailable("the API keys cannot be read; tell the operator"),
    ArtifactError: lambda error: Problem(410, "artifact-gone", f"{error}; make the request again"),
    ResponseError: lambda error: unavailable(f"Redis refuses to work: {error}; tell the operator"),
    RedisError: lambda _: unavailable(
        "Redis cannot be reached; retry shortly, with the same Idempotency-Key if the request had "
        "one, and see /readyz and FINESERVE_REDIS_URL if it lasts"
    ),
}
"""Makers of a Problem from each error that a route raises; subclasses go to the nearest."""


def problem_of(error: Exception) -> Problem | None:
    """Problem that an error is; None where the service itself is at fault."""
    if isinstance(error, KeysError | RedisError | StoreAway | StoreRefuses):
        log.error("Redis, the store or the API keys cannot be used", error=str(error))
    made = (PROBLEMS[kind](error) for kind in type(error).__mro__ if kind in PROBLEMS)
    return next(made, None)


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        assert problem is not None
        return answer_of(problem, request.url.path)

    for kind in PROBLEMS:
        app.exception_handler(kind)(known)

    @app.exception_handler(NoContent)
    async def nothing(_: Request, __: Exception) -> Response:
        return Response(status_code=204)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        problem = Problem(500, "internal-error", "an unexpected error; the log has it")
        return answer_of(problem, request.url.path)
