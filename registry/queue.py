"""The Celery application that both sides configure alike, and the names of its tasks."""

import redis
from celery import Celery

from registry.settings import Settings

BUILD_QUEUE = "build"
SAMPLE_QUEUE = "sample"
BUILD_TASK = "fineserve.build"
EXPORT_TASK = "fineserve.export"
SAMPLE_TASK = "fineserve.sample"
QUEUES = {BUILD_TASK: BUILD_QUEUE, EXPORT_TASK: SAMPLE_QUEUE, SAMPLE_TASK: SAMPLE_QUEUE}
"""Queue of each task: an export is waited for, so it runs beside the sampling, not after builds."""


def queue_name(queue: str, device_class: str) -> str:
    """Queue of one class of device, since a plan holds only there."""
    return f"{queue}.{device_class}"


def make_celery(settings: Settings) -> Celery:
    """A Celery application; beside each setting stands what goes wrong without it."""
    address = settings.redis_address
    app = Celery("fineserve", broker=address.for_kombu, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],  # else a message can carry a pickle
        task_ignore_result=True,  # records are the truth; results would pile up in Redis
        task_acks_late=True,  # else a task is lost with the process that runs it
        task_reject_on_worker_lost=True,  # else a killed child's task is acknowledged
        worker_prefetch_multiplier=1,  # else a busy worker holds tasks that others could run
        broker_connection_retry_on_startup=True,  # else a worker that starts first gives up
        broker_connection_max_retries=None,  # else after a hundred tries, in some minutes
        broker_transport_options={
            # shorter than a task and the broker delivers it twice at once
            "visibility_timeout": settings.visibility_timeout_seconds,
            "socket_timeout": 10,
            "socket_connect_timeout": 3,
            **address.kombu_options,
        },
        broker_connection_timeout=3,
        worker_hijack_root_logger=False,  # else Celery replaces the JSON log format
        worker_cancel_long_running_tasks_on_connection_loss=False,
        enable_utc=True,
    )
    return app


class Queue:
    """Queues of work, where a message names a record. `client` and broker have the same server."""

    def __init__(self, app: Celery, client: redis.Redis) -> None:
        self._app, self._redis = app, client

    def enqueue(self, task: str, record_id: str, device_class: str, *more: str) -> None:
        """Queue a task with the arguments `record_id` and `more`. Raises OperationalError."""
        queue = queue_name(QUEUES[task], device_class)
        self._app.send_task(task, args=[record_id, *more], queue=queue, retry=False)

    def length(self, queue: str, device_class: str) -> int:
        """Number of messages that no worker has taken."""
        return int(self._redis.llen(queue_name(queue, device_class)))
