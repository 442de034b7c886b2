"""Guard around every request: headers for browsers, and the audit log of changes."""

import re
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem

log = structlog.get_logger("audit")

MOST_SESSION_BYTES = 4_096
MOST_BODY_BYTES = 65_536
UPLOADS = "/tasks"
PORT = re.compile(r":\d+$")
UNCHANGING = {"GET", "HEAD", "OPTIONS"}
DRY_RUN = "/plan"
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'; object-src 'none'"
)
DOCS_POLICY = f"{POLICY}; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
"""Policy of the documentation's page, which is FastAPI's and begins with a script of its own."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware, so that the log tells of refusals, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _foreign_host(scope) or _foreign_page(scope) or _unfit_body(scope)
        app = refusal.response() if refusal else self._app
        answer: dict[str, Any] = {"status": None, "made": None}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                docs = scope["path"].startswith("/docs")
                policy = {"Content-Security-Policy": DOCS_POLICY if docs else POLICY}
                for name, value in {**HEADERS, **policy}.items():
                    headers.setdefault(name, value)
                answer.update(status=message["status"], made=headers.get("Location"))
            await send(message)

        try:
            await app(scope, receive, told)
        finally:
            if scope["method"] not in UNCHANGING and scope["path"] != DRY_RUN:
                _audit(scope, answer)


def _audit(scope: Scope, answer: dict[str, Any]) -> None:
    key, client = scope.get("state", {}).get("key"), scope.get("client")
    log.info(
        "audit",
        method=scope["method"],
        path=scope["path"],
        **answer,
        key=key and key.id,
        owner=key and key.owner,
        client=client and client[0],
    )


def _foreign_host(scope: Scope) -> Problem | None:
    """Refusal of a host that is not this one's, while nobody has to show a key.

    Another site can point a name of its own at this host (DNS rebinding).
    """
    host = Headers(scope=scope).get("host", "")
    settings = scope["app"].state.fineserve.settings
    own = {"", "localhost", "127.0.0.1", "[::1]", settings.host, *settings.allowed_host_names}
    if _asks_for_keys(scope) or own & {_name(host), "*"}:
        return None
    return Problem(
        421,
        "foreign-host",
        f"this service does not answer for the host {host[:200]!r} while there are no API keys: "
        "call it by 127.0.0.1, name the host in FINESERVE_ALLOWED_HOSTS, or make a key with "
        "`fineserve keys create`",
    )


def _foreign_page(scope: Scope) -> Problem | None:
    """Refusal of a change by a page of another site, while nobody has to show a key.

    The page could not read the answer, but change things (cross-site request forgery).
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin", "")
    if not origin or scope["method"] in UNCHANGING or _asks_for_keys(scope):
        return None
    netloc = origin.partition("://")[2]
    allowed = scope["app"].state.fineserve.settings.allowed_host_names
    if netloc == headers.get("host") or {_name(netloc), "*"} & allowed:
        return None
    return Problem(
        403,
        "foreign-page",
        f"a page of {origin[:200]!r} may not change anything here while there are no API keys: "
        "name its host in FINESERVE_ALLOWED_HOSTS, or make a key with `fineserve keys create`",
    )


def _asks_for_keys(scope: Scope) -> bool:
    return bool(scope["app"].state.fineserve.keys.required)


def _name(host: str) -> str:
    """A host without its port."""
    return host.rpartition(":")[0] if PORT.search(host) else host


def _unfit_body(scope: Scope) -> Problem | None:
    """Refusal of a body before it is read: nobody has shown a key yet."""
    headers, path = Headers(scope=scope), scope["path"]
    if path == UPLOADS:  # counts what comes
        return None
    if "transfer-encoding" in headers:
        return Problem(411, "length-required", "send the body with a Content-Length, not in chunks")
    most = MOST_SESSION_BYTES if path == "/session" else MOST_BODY_BYTES
    if int(headers.get("content-length", "0")) <= most:
        return None
    return Problem(
        413,
        "body-too-large",
        f"a request to {path[:200]} may have {most} bytes: send less; only images, which go to "
        f"{UPLOADS}, may take more",
        limit=most,
    )
