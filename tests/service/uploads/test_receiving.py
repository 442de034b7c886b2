"""Uploads on their way, whatever their pace."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator

import pytest

from service.problems import Problem
from service.uploads import receiving
from service.uploads.receiving import MOST_OF_ALL, MOST_OF_OWNER, Receiving, received


class Sent:
    """A request whose body comes in parts, with pauses before each."""

    def __init__(self, *parts: bytes, pause: float = 0) -> None:
        self._parts, self._pause = parts, pause

    async def stream(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            await asyncio.sleep(self._pause)
            yield part


def test_an_owner_has_so_many_places() -> None:
    uploads = Receiving()

    def place(owner: str) -> contextlib.AbstractContextManager[None]:
        return uploads.place(owner, 0, 10**9)

    with contextlib.ExitStack() as others, contextlib.ExitStack() as mine:
        for _ in range(MOST_OF_OWNER):
            mine.enter_context(place("mine"))
        with pytest.raises(Problem, match=f"{MOST_OF_OWNER} uploads of yours"), place("mine"):
            pass
        for number in range(MOST_OF_ALL - MOST_OF_OWNER):
            others.enter_context(place(str(number)))
        with pytest.raises(Problem, match=f"{MOST_OF_ALL} uploads are"), place("another"):
            pass
        mine.close()
        with place("mine"):
            pass


def test_what_is_announced_needs_room() -> None:
    uploads = Receiving()
    with uploads.place("one", 600, 1000):
        with pytest.raises(Problem, match="no room for an upload"), uploads.place("two", 600, 1000):
            pass
        with uploads.place("two", 400, 1000):
            pass
    with uploads.place("two", 600, 1000):
        pass


def test_an_upload_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(Problem, match="more slowly than 20 kB a second"):
        asyncio.run(received(Sent(*[b"a"] * 100, pause=0.05), io.BytesIO(), 10**6))
    fast, file = Sent(*[bytes(10_000)] * 10, pause=0.05), io.BytesIO()
    assert len(asyncio.run(received(fast, file, 10**6))) == 64
    assert len(file.getvalue()) == 100_000


def test_an_upload_is_as_large_as_it_may_be() -> None:
    with pytest.raises(Problem, match="the upload has more than"):
        asyncio.run(received(Sent(bytes(60), bytes(60)), io.BytesIO(), 100))
