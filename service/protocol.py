"""HTTP/1.1 as uvicorn speaks it, with a limit on what comes before, between and after bodies."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 65_536
PIECE_BYTES = 16_384
"""Bytes that are counted at once: the limit is kept to within as many."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself reads heads and trailers of any length, bounded."""

    _head_bytes = 0
    """Bytes since the last head ended, or the last part of a body."""

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._head_bytes > MOST_HEAD_BYTES:
                self.send_400_response(
                    f"The request line and headers are longer than {MOST_HEAD_BYTES} bytes; "
                    "send fewer or shorter ones."
                )
                return

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)
