"""/session: an API key in a cookie, since a browser sends no header with a picture."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.access import COOKIE, authenticate
from service.deps import StateDep
from service.problems import Problem

router = APIRouter(tags=["status"])


class SessionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str = Field(max_length=200)


@router.post("/session", status_code=204)
def sign_in(
    request: SessionRequest, connection: Request, response: Response, state: StateDep
) -> None:
    """Keep a key in this browser, where no script can read it and no other site can use it."""
    if not state.keys.required:
        raise Problem(409, "no-keys", "this service has no API keys: everybody is in already")
    connection.state.key = authenticate(state, request.key)
    secure = connection.url.scheme == "https"
    response.set_cookie(COOKIE, request.key, httponly=True, samesite="strict", secure=secure)


@router.delete("/session", status_code=204)
def sign_out(response: Response) -> None:
    response.delete_cookie(COOKIE)
