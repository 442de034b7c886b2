"""/session: a browser that has shown an API key, since it sends no header with a picture."""

from typing import Annotated

from fastapi import APIRouter, Cookie, Request, Response
from pydantic import Field

from fineserve.wire import Asked
from service.access import COOKIE, SECURE_COOKIE, authenticate
from service.deps import StateDep
from service.problems import Problem

router = APIRouter(tags=["status"])


class SessionRequest(Asked):
    key: str = Field(max_length=200)


@router.post("/session", status_code=204)
def sign_in(
    request: SessionRequest, connection: Request, response: Response, state: StateDep
) -> None:
    """Let this browser in for some hours, or until the key ends; no script can read its cookie."""
    if not state.keys.required:
        raise Problem(409, "no-keys", "this service has no API keys: everybody is in already")
    connection.state.key = key = authenticate(state, request.key)
    secure = connection.url.scheme == "https"
    response.set_cookie(
        SECURE_COOKIE if secure else COOKIE,
        state.sessions.begin(key),
        max_age=state.settings.session_seconds,
        httponly=True,
        samesite="strict",
        secure=secure,
    )


@router.delete("/session", status_code=204)
def sign_out(
    response: Response,
    state: StateDep,
    plain: Annotated[str | None, Cookie(alias=COOKIE)] = None,
    secure: Annotated[str | None, Cookie(alias=SECURE_COOKIE)] = None,
) -> None:
    """End this browser's session."""
    for name, session in ((COOKIE, plain), (SECURE_COOKIE, secure)):
        if session is not None:
            state.sessions.end(session)
            response.delete_cookie(name, secure=name == SECURE_COOKIE)
