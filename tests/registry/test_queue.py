import redis

from registry.queue import BUILD_TASK, SAMPLE_TASK, Queue, make_celery, queue_name
from registry.settings import Settings


def test_each_class_of_device_has_queues_of_its_own(client: redis.Redis, valkey_url: str) -> None:
    queue = Queue(make_celery(Settings(redis_url=valkey_url)), client)
    for record_id, device_class in (("m-1", "slow"), ("m-2", "fast"), ("m-3", "fast")):
        queue.enqueue(BUILD_TASK, record_id, device_class)
    queue.enqueue(SAMPLE_TASK, "g-1", "fast")
    assert queue_name("build", "fast") == "build.fast"
    assert client.llen("build.fast") == queue.length("build", "fast") == 2
    assert queue.length("build", "slow") == 1
    assert queue.length("sample", "fast") == 1
    assert queue.length("sample", "slow") == 0
