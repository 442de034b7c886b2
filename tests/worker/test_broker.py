"""What a worker's connection leaves behind as it is closed, with its broker or without."""

from collections.abc import Iterator

import kombu
import pytest
import redis

import worker.app  # noqa: F401  (installs the transport)
from registry.settings import Settings
from worker import broker


@pytest.fixture
def message(client: redis.Redis, settings: Settings) -> Iterator[kombu.Message]:
    """One that was taken, and has not been acknowledged."""
    with kombu.Connection(settings.redis_address.for_kombu) as connection:
        queue = kombu.Queue("work", channel=connection.channel())
        queue.declare()
        kombu.Producer(queue.channel).publish("a task", routing_key="work")
        message = queue.get()
        assert (client.llen("work"), client.hlen("unacked")) == (0, 1)
        yield message


def test_a_channel_gives_back_what_is_not_done(client: redis.Redis, message: kombu.Message) -> None:
    assert isinstance(message.channel, broker.Channel)
    message.channel.close()
    assert (client.llen("work"), client.hlen("unacked")) == (1, 0)


@pytest.mark.parametrize("end", ["ack", "close"])
def test_without_its_connection_a_channel_raises_what_celery_expects(
    end: str, client: redis.Redis, message: kombu.Message
) -> None:
    channel = message.channel
    errors = channel.connection.client.connection_errors
    channel.connection.client = None  # as a connection leaves it whose broker has died
    channel._disconnect_pools()
    with pytest.raises(errors, match="has gone"):
        message.ack() if end == "ack" else channel.close()
    assert (client.llen("work"), client.hlen("unacked")) == (0, 1)
