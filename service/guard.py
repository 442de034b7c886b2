"""Around every request: headers that browsers heed, and the audit log of what was changed."""

from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger("audit")

UNCHANGING = {"GET", "HEAD", "OPTIONS"}
DRY_RUN = "/plan"
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'; object-src 'none'"
)
DOCS_POLICY = f"{POLICY}; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
"""The documentation's page, which is FastAPI's, begins with a script of its own."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI, and not a route's: refusals are told of, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer: dict[str, Any] = {}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                docs = scope["path"].startswith("/docs")
                headers.setdefault("Content-Security-Policy", DOCS_POLICY if docs else POLICY)
                answer.update(status=message["status"], made=headers.get("Location"))
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            if scope["method"] not in UNCHANGING and scope["path"] != DRY_RUN:
                self._audit(scope, answer)

    def _audit(self, scope: Scope, answer: dict[str, Any]) -> None:
        key, client = scope.get("state", {}).get("key"), scope.get("client")
        log.info(
            "audit",
            method=scope["method"],
            path=scope["path"],
            status=answer.get("status"),
            made=answer.get("made"),
            key=key and key.id,
            owner=key and key.owner,
            client=client and client[0],
        )
