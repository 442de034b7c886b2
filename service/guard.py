"""Guard around every request: its body, headers for browsers, and the audit log of changes."""

import asyncio
import contextlib
import re
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem, answer_of

log = structlog.get_logger("audit")

MOST_SESSION_BYTES = 4_096
MOST_BODY_BYTES = 16_384
BODY_SECONDS = 15.0
"""Seconds in which a body, but for an upload's, has to be there."""
DRAIN_SECONDS = 5.0
MOST_DRAINED_BYTES = 64_000_000
MOST_LOGGED = 200
"""Characters of a path in the audit log."""
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
        body, path = Body(scope, receive), scope["path"]
        app: ASGIApp = self._app
        refusal = _foreign_host(scope) or _foreign_page(scope)
        if refusal is None and path != UPLOADS:  # which are counted and paced as they come
            try:
                await body.read(MOST_SESSION_BYTES if path == "/session" else MOST_BODY_BYTES, path)
            except Problem as problem:
                refusal = problem
            refusal = refusal or _foreign_format(scope, body)
        if refusal:
            app = answer_of(refusal, path)
        answer: dict[str, Any] = {"status": None, "made": None}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                policy = DOCS_POLICY if path.startswith("/docs") else POLICY
                for name, value in {**HEADERS, "Content-Security-Policy": policy}.items():
                    headers.setdefault(name, value)
                if not body.ended:
                    headers["Connection"] = "close"
                answer.update(status=message["status"], made=headers.get("Location"))
            elif not message.get("more_body") and not body.ended:
                # what is still sent would meet a closed connection, and the answer be lost
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await (_headed if scope["method"] == "HEAD" else _run)(app, scope, body.receive, told)
        finally:
            if scope["method"] not in UNCHANGING and path != DRY_RUN:
                _audit(scope, answer)


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _headed(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer HEAD by the head of the answer to GET (RFC 9110, 9.3.2), of which no more is made."""
    begun = asyncio.Event()

    async def head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})
            begun.set()

    answering = asyncio.ensure_future(app({**scope, "method": "GET"}, receive, head))
    waiting = asyncio.ensure_future(begun.wait())
    try:
        await asyncio.wait({answering, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not begun.is_set():
            await answering
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering


class Body:
    """Body of a request, as it comes."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self.length = int(headers.get("content-length", "0"))
        self._awaited = "100-continue" in headers.get("expect", "").lower()
        """Whether it is not sent before somebody asks for it."""
        self.ended = not self.length and "transfer-encoding" not in headers
        self.content: bytes | None = None

    async def receive(self) -> Message:
        """ASGI's: what has been read, then what comes."""
        if self.content is not None:
            content, self.content = self.content, None
            return {"type": "http.request", "body": content, "more_body": False}
        self._awaited = False
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def read(self, most_bytes: int, path: str) -> None:
        """Read the whole body, before anybody has shown a key. Raises Problem 408 and 413."""
        content = b""
        if self.length > most_bytes:
            raise _too_large(most_bytes, path)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not self.ended:
                    content += (await self.receive()).get("body", b"")
                    if len(content) > most_bytes:
                        raise _too_large(most_bytes, path)
        except TimeoutError:
            raise Problem(
                408,
                "too-slow",
                f"the body was not there within {BODY_SECONDS:.0f} s; send it again",
            ) from None
        self.content = content

    async def drain(self) -> None:
        """Read what is still sent, for a while, and forget it."""
        size = 0
        if self._awaited:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.ended and size < MOST_DRAINED_BYTES:
                    size += len((await self.receive()).get("body", b""))


def _too_large(most_bytes: int, path: str) -> Problem:
    return Problem(
        413,
        "body-too-large",
        f"a request to {path[:200]} may have {most_bytes} bytes: send less; only images, which go "
        f"to {UPLOADS}, may take more",
        limit=most_bytes,
    )


def _foreign_format(scope: Scope, body: Body) -> Problem | None:
    """Refusal of a body that does not say that it is JSON: forms of other sites do not either."""
    sent = Headers(scope=scope).get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if not body.content or kind == "application/json" or kind.endswith("+json"):
        return None
    return Problem(
        415,
        "not-json",
        f"the body has to be JSON, and to say so, this one says {sent[:200]!r}: send it with "
        "`Content-Type: application/json`",
    )


def _audit(scope: Scope, answer: dict[str, Any]) -> None:
    key, client = scope.get("state", {}).get("key"), scope.get("client")
    log.info(
        "audit",
        method=scope["method"],
        path=scope["path"][:MOST_LOGGED],
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
    here = {"", "localhost", "127.0.0.1", "[::1]", settings.host.lower()}
    own = here | settings.allowed_host_names
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
    """Refusal of a change by a page of another site, where nobody shows a key of their own.

    The page could not read the answer, but change things (cross-site request forgery). A session's
    cookie comes by itself, from pages of other ports of this host, too.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin", "")
    if not origin or scope["method"] in UNCHANGING:
        return None
    if _asks_for_keys(scope) and ("authorization" in headers or "cookie" not in headers):
        return None
    netloc = origin.partition("://")[2].lower()
    allowed = scope["app"].state.fineserve.settings.allowed_host_names
    if netloc == headers.get("host", "").lower() or {_name(netloc), "*"} & allowed:
        return None
    return Problem(
        403,
        "foreign-page",
        f"a page of {origin[:200]!r} may not change anything here without an API key of its own: "
        "name its host in FINESERVE_ALLOWED_HOSTS, or send a key of `fineserve keys create`",
    )


def _asks_for_keys(scope: Scope) -> bool:
    return bool(scope["app"].state.fineserve.keys.required)


def _name(host: str) -> str:
    """A host's name, which has no case, without its port."""
    return (host.rpartition(":")[0] if PORT.search(host) else host).lower()
