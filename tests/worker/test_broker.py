"""What a worker's connection leaves behind as it is closed, with its broker or without."""

from collections.abc import Iterator

import kombu
import pytest
import redis

import worker.app  # noqa: F401  (installs the transport)
from registry.settings import Settings
from worker import broker


@pytest.fixture
def channel(client: redis.Redis, settings: Settings) -> Iterator[kombu.transport.virtual.Channel]:
    """One that was given a message, and has not acknowledged it."""
    with kombu.Connection(settings.broker_url) as connection:
        channel = connection.channel()
        queue = kombu.Queue("work", channel=channel)
        queue.declare()
        kombu.Producer(channel).publish("a task", routing_key="work")
        assert queue.get().payload == "a task"
        assert (client.llen("work"), client.hlen("unacked")) == (0, 1)
        yield channel


def test_a_channel_gives_back_what_is_not_done(
    client: redis.Redis, channel: kombu.transport.virtual.Channel
) -> None:
    assert isinstance(channel, broker.Channel)
    channel.close()
    assert (client.llen("work"), client.hlen("unacked")) == (1, 0)


def test_a_channel_can_be_closed_when_its_connection_has_gone(
    client: redis.Redis, channel: kombu.transport.virtual.Channel
) -> None:
    transport = channel.connection
    transport.client = None  # as a connection leaves it whose broker has died
    channel.close()
    assert channel not in transport.channels
    assert (client.llen("work"), client.hlen("unacked")) == (0, 1)
