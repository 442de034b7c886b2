"""kombu's Redis transport, mended so that a worker survives its broker."""

from collections.abc import Callable
from typing import Any

import kombu.transport.redis as kombu_redis
import redis
from kombu.transport import TRANSPORT_ALIASES


class QoS(kombu_redis.QoS):  # type: ignore[misc]
    room: Callable[[int], bool] = staticmethod(lambda _: True)
    """Whether this process has room for a message beside so many that are not acknowledged."""

    def can_consume(self) -> bool:
        return super().can_consume() and self.room(len(self._delivered) - len(self._dirty))


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    QoS = QoS

    def _connparams(self, asynchronous: bool = False) -> Any:
        """Connection parameters. Raises redis.ConnectionError once the channel's own is gone.

        A task that ends then is still acknowledged, and a channel may be closed again. kombu
        raises AttributeError (celery/kombu#582), which Celery does not take for a lost
        connection. The broker still has the messages, and whoever looks after their records
        queues those again.
        """
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("the connection of this channel has gone")
        return super()._connparams(asynchronous)


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """The same, to the server that Sentinels name."""


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    Channel = Channel

    connection_errors = (*kombu_redis.Transport.connection_errors, redis.ResponseError)
    """Errors after which Celery connects again: what Redis refuses while it is loaded, fails over
    or is full passes, or somebody mends it there, and nothing is mended by ending."""


class SentinelTransport(Transport):
    Channel = SentinelChannel
    default_port = 26379


def install() -> None:
    """Use the mended transports for every connection of this process."""
    ours = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}
    for name, transport in ours.items():
        TRANSPORT_ALIASES[name] = f"{transport.__module__}:{transport.__name__}"
