"""Celery's consumer, but it outlives its broker."""

import structlog
from celery.worker.consumer import Consumer

log = structlog.get_logger()


class LastingConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """kombu 5.7 fails to close what is lost, with an AttributeError that would end this worker,
        and with it all that its engine has begun, where a new connection is all that is needed."""
        try:
            super().on_connection_error_after_connected(exc)
        except AttributeError as error:
            log.warning("the lost connection could not be closed", reason=str(error))
