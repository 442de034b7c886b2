import pytest
from celery import Celery
from kombu.utils.imports import symbol_by_name

from registry.settings import Settings
from worker.app import make_app
from worker.consumer import LastingConsumer


class Lost:
    """A connection as kombu leaves it when the server dies while a message is not acknowledged."""

    connection_errors: tuple[type[Exception], ...] = (ConnectionError,)
    channel_errors: tuple[type[Exception], ...] = ()

    def __init__(self, error: Exception) -> None:
        self._error = error

    def collect(self, **_: object) -> None:
        raise self._error

    close = collect


def consumer(app: Celery, error: Exception) -> LastingConsumer:
    alone = LastingConsumer.__new__(LastingConsumer)
    alone.app, alone.connection = app, Lost(error)
    return alone


@pytest.fixture
def app(settings: Settings) -> Celery:
    return make_app(settings)


def test_a_connection_that_cannot_be_closed_is_given_up(app: Celery) -> None:
    lost = consumer(app, AttributeError("no hostname"))
    lost.on_connection_error_after_connected(ConnectionError("closed by server"))
    assert lost.connection is None


def test_other_errors_end_the_worker(app: Celery) -> None:
    with pytest.raises(MemoryError):
        consumer(app, MemoryError()).on_connection_error_after_connected(ConnectionError())


def test_workers_use_it(app: Celery) -> None:
    assert symbol_by_name(app.conf.worker_consumer) is LastingConsumer
