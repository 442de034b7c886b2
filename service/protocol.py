"""HTTP/1.1 as uvicorn speaks it, with limits on what comes before, between and after bodies."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 65_536
MOST_FIELDS = 200
"""Header fields of a request; browsers send two dozen, Apache takes 100 of them."""
PIECE_BYTES = 16_384
"""Bytes that are counted at once: the limit is kept to within as many."""
REFUSAL_SECONDS = 0.5
"""Pause before a refusal of what no client sends, so that its sender cannot repeat it at once."""
HEAD_SECONDS = 15.0
"""Seconds in which a request's line and headers have to be there."""


class TooManyFields(Exception):
    """A request has more header fields than anybody needs."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits for ever for heads and trailers of any length."""

    _head_bytes = 0
    """Bytes since the last head ended, or the last part of a body."""
    _fields = 0
    """Headers, and trailers, since the last body."""
    _refused = False
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # closing while something is unread would take the answer from its reader
        if self._patience is None and (self.cycle is None or self.cycle.response_complete):
            self._be_patient()
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self._refused or self.transport.is_closing():
                return
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse_head(f"are longer than {MOST_HEAD_BYTES} bytes")
                return

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        if self._fields > MOST_FIELDS:
            raise TooManyFields
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        if self._fields > MOST_FIELDS:
            self._refuse_head(f"have more than {MOST_FIELDS} fields")
        else:
            self._refuse("400 Bad Request", msg)

    def on_message_begin(self) -> None:
        self._fields = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = self._fields = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def _be_patient(self) -> None:
        self._patience = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if not self.transport.is_closing():
            self._refuse(
                "408 Request Timeout",
                f"The request line and headers were not there within {HEAD_SECONDS:.0f} s.",
            )

    def _refuse_head(self, why: str) -> None:
        self._refuse(
            "431 Request Header Fields Too Large",
            f"The request line and headers {why}; send fewer or shorter ones.",
        )

    def _refuse(self, status: str, message: str) -> None:
        """Answer in the server's name, for there is no request, and close the connection."""
        self._refused = True
        self._stop_waiting()
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        head += f"content-length: {len(message)}\r\nconnection: close\r\n\r\n"
        answer = f"{head}{message}".encode()
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(REFUSAL_SECONDS, self._close_with, answer)
        else:
            self._close_with(answer)  # before the request's own

    def _close_with(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
