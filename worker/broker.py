"""kombu's transport of Redis, without what ends a worker whose broker has died."""

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis


class QoS(redis.QoS):  # type: ignore[misc]
    def restore_unacked(self, client: Any = None) -> None:
        """Give unfinished messages back, where there still is a connection.

        A channel that could not be closed as its broker died is closed again when its connection
        has gone. kombu raises AttributeError then (celery/kombu#582), which Celery does not take
        for a lost connection. The broker still has these messages, and their records are queued
        again by who looks after them.
        """
        if self.channel.connection.client is None:
            self._delivered.clear()
        else:
            super().restore_unacked(client)


class Channel(redis.Channel):  # type: ignore[misc]
    QoS = QoS


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel


def install() -> None:
    """For every connection of this process."""
    here = f"{Transport.__module__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update({"redis": here, "rediss": here})
