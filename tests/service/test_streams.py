"""Event streams, whose last event ends them."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from registry.keys import Keys, Scope
from registry.settings import Settings
from service import streams
from service.access import Caller
from service.problems import Problem
from service.streams import MOST_OF_KEY, Stream, Streams
from tests.service.conftest import Stack
from tests.support.answers import refused


async def slowly() -> AsyncIterator[int]:
    for number in range(100):
        yield number
        await asyncio.sleep(0.05)


def test_a_key_has_so_many_streams() -> None:
    async def opened() -> None:
        own = Streams()
        with own.place("other"):
            places = [own.place("mine") for _ in range(MOST_OF_KEY)]
            for place in places:
                place.__enter__()
            with pytest.raises(Problem, match="event streams of yours are open"), own.place("mine"):
                pass
            places[0].__exit__(None, None, None)
            with own.place("mine"):
                pass

    asyncio.run(opened())


def test_a_stream_ends_when_the_service_is_asked_to_stop(stack: Stack) -> None:
    async def heard() -> list[int]:
        own = Streams()
        asyncio.get_running_loop().call_later(0.2, own.stopping.set)
        return [number async for number in Stream(own, stack.state, Caller("", None)).of(slowly())]

    assert 1 <= len(asyncio.run(heard())) < 20


def test_a_stream_ends_with_its_key(
    stack: Stack, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.1)
    keys = Keys(settings.resolved_keys_file)
    made, _ = keys.create("owner", [Scope.DEPLOY])

    async def silent() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(30)

    async def heard() -> list[int]:
        stream = Stream(Streams(), stack.state, Caller("owner", made))
        asyncio.get_running_loop().call_later(0.3, keys.revoke, made.id)
        async with asyncio.timeout(10):
            return [number async for number in stream.of(silent())]

    assert asyncio.run(heard()) == [1]


def test_after_the_last_event_there_is_nothing_more(stack: Stack) -> None:
    model = stack.ready_model()
    events = stack.api.get(f"/models/{model}/events").text
    last = [line[3:].strip() for line in events.splitlines() if line.startswith("id:")][-1]

    def after(event: str) -> int:
        headers = {"Last-Event-ID": event}
        return stack.api.get(f"/models/{model}/events", headers=headers).status_code

    assert after(last) == 204
    assert after("1-0") == 200
    future = {"Last-Event-ID": f"{int(last.split('-')[0]) + 10**6}-0"}
    refused(stack.api.get(f"/models/{model}/events", headers=future), 422, "later than every event")
    stack.runtime.repository._redis.delete(f"fineserve:model:{model}:events")
    assert after("0") == 204, "they have expired"
