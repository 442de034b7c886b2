"""Errors as RFC 9457 problem details, each with a stable `type`."""

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis import RedisError, ResponseError
from starlette.exceptions import HTTPException

from registry.errors import (
    ArtifactError,
    IdempotencyConflict,
    IllegalTransition,
    KeysError,
    QueueFull,
    RecordNotFound,
    StorageFull,
)

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = "2"


class Problem(Exception):
    """Raised by a route; `kind` is the last part of the problem's `type`."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        headers: dict[str, str] | None = None,
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
        return JSONResponse(
            jsonable_encoder(body),
            self.status,
            headers=self.headers,
            media_type=MEDIA_TYPE,
        )


def unavailable(detail: str, kind: str = "unavailable") -> Problem:
    return Problem(503, kind, detail, headers={"Retry-After": RETRY_SECONDS})


def storage_full(why: str) -> Problem:
    return Problem(
        507,
        "storage-full",
        f"{why}; retry when there is room: delete models that nobody uses, or tell the operator",
        headers={"Retry-After": "60"},
    )


def no_family(name: str) -> Problem:
    return unavailable(
        f"no worker has the family {name} now; start one, or wait for it", "no-family"
    )


def install(app: FastAPI) -> None:
    """Turn every error into a problem document."""

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            {"field": ".".join(str(part) for part in e["loc"][1:]), "message": e["msg"]}
            for e in error.errors()
        ]
        detail = "; ".join(f"{e['field'] or 'body'}: {e['message']}" for e in errors)
        return Problem(422, "invalid-request", detail, errors=errors).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
        headers = dict(error.headers) if error.headers else None
        return Problem(error.status_code, kind, str(error.detail), headers).response()

    @app.exception_handler(RecordNotFound)
    async def missing(_: Request, error: RecordNotFound) -> JSONResponse:
        return Problem(404, "not-found", str(error)).response()

    @app.exception_handler(IllegalTransition)
    async def illegal(_: Request, error: IllegalTransition) -> JSONResponse:
        return Problem(409, "illegal-transition", str(error)).response()

    @app.exception_handler(IdempotencyConflict)
    async def conflict(_: Request, error: IdempotencyConflict) -> JSONResponse:
        return Problem(422, "idempotency-conflict", f"{error}; use a new key").response()

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_seconds)}
        return Problem(429, "queue-full", str(error), headers).response()

    @app.exception_handler(StorageFull)
    async def no_room(_: Request, error: StorageFull) -> JSONResponse:
        return storage_full(str(error)).response()

    @app.exception_handler(KeysError)
    async def no_keys(_: Request, error: KeysError) -> JSONResponse:
        log.error("API keys cannot be read", error=str(error))
        return unavailable("the API keys cannot be read; tell the operator").response()

    @app.exception_handler(ArtifactError)
    async def artifact(_: Request, error: ArtifactError) -> JSONResponse:
        return Problem(410, "artifact-gone", f"{error}; make the request again").response()

    @app.exception_handler(ResponseError)
    async def refused(_: Request, error: ResponseError) -> JSONResponse:
        log.error("Redis refused a command", error=str(error))
        return unavailable(f"Redis refuses to work: {error}; tell the operator").response()

    @app.exception_handler(RedisError)
    async def broker(_: Request, error: Exception) -> JSONResponse:
        log.warning("Redis cannot be reached", error=str(error))
        return unavailable(
            "Redis cannot be reached; retry shortly, with the same Idempotency-Key if the "
            "request had one, and see /readyz and FINESERVE_REDIS_URL if it lasts"
        ).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        return Problem(500, "internal-error", "an unexpected error; the log has it").response()
