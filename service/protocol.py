"""HTTP/1.1 as uvicorn speaks it, with limits on what comes before, between and after bodies."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 65_536
PIECE_BYTES = 16_384
"""Bytes that are counted at once: the limit is kept to within as many."""
HEAD_SECONDS = 15.0
"""Seconds in which a request's line and headers have to be there."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits for ever for heads and trailers of any length."""

    _head_bytes = 0
    """Bytes since the last head ended, or the last part of a body."""
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._patience is None and (self.cycle is None or self.cycle.response_complete):
            self._be_patient()
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(
                    "431 Request Header Fields Too Large",
                    f"The request line and headers are longer than {MOST_HEAD_BYTES} bytes; "
                    "send fewer or shorter ones.",
                )
                return

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
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

    def _refuse(self, status: str, message: str) -> None:
        """Answer in the server's name, for there is no request, and close the connection."""
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        head += f"content-length: {len(message)}\r\nconnection: close\r\n\r\n"
        self.transport.write(f"{head}{message}".encode())
        self.transport.close()
