import io
import tarfile
import threading
import time

import pytest
import redis
from kombu.exceptions import OperationalError

from fineserve.wire import ExportFormat
from registry.errors import StorageFull
from tests.service.conftest import Stack
from tests.support.builds import build
from tests.support.records import revision_name
from worker.export.export import export
from worker.leases import Stopping


def test_a_model_is_exported_when_it_is_asked_for(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = stack.ready_model()
    asked = []

    def enqueue(_: object, task: str, record_id: str, device_class: str, form: str) -> None:
        asked.append((task, record_id, device_class, form))
        threading.Timer(0.3, export, (stack.runtime, record_id, ExportFormat(form))).start()

    monkeypatch.setattr("registry.queue.Queue.enqueue", enqueue)
    answers = [stack.api.get(f"/models/{model_id}/export") for _ in range(2)]
    assert asked == [("fineserve.export", model_id, stack.runtime.device_class, "diffusers")]
    assert answers[0].headers["content-type"] == "application/x-tar"
    assert f'{model_id}.tar"' in answers[0].headers["content-disposition"]
    assert answers[0].content == answers[1].content
    with tarfile.open(fileobj=io.BytesIO(answers[0].content)) as tar:
        assert f"{model_id}/transformer/config.json" in tar.getnames()
    adapter = stack.api.get(f"/models/{model_id}/export?format=adapter")
    with tarfile.open(fileobj=io.BytesIO(adapter.content)) as tar:
        assert f"{model_id}/own.safetensors" in tar.getnames()
    refused = stack.api.get(f"/models/{model_id}/export?format=pickle")
    assert (refused.status_code, "'native'" in refused.text) == (422, True)
    stack.api.delete(f"/models/{model_id}")
    assert stack.api.get(f"/models/{model_id}/export").status_code == 410
    assert not (stack.runtime.store.root / "exports" / model_id).exists()


def test_an_export_is_asked_for_again_when_another_revision_is_served(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = stack.ready_model()
    models = stack.runtime.repository.models
    unretrained = revision_name(stack.runtime.store, model_id, 0).rpartition("/")[2]
    revisions: list[int | None] = []

    def enqueue(_: object, task: str, record_id: str, device_class: str, form: str) -> None:
        revisions.append(models.get(record_id).revision)
        if len(revisions) == 1:
            models.change(record_id, revision=0, artifact=unretrained)
        else:
            export(stack.runtime, record_id, ExportFormat(form))

    monkeypatch.setattr("registry.queue.Queue.enqueue", enqueue)
    assert stack.api.get(f"/models/{model_id}/export?format=adapter").status_code == 200
    assert revisions == [1, 0]


@pytest.mark.parametrize("interruption", [Stopping, redis.ConnectionError])
def test_an_export_that_was_interrupted_is_asked_for_again(
    stack: Stack,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    interruption: type[Exception],
) -> None:
    runtime, model_id = stack.runtime, stack.ready_model()
    asked: list[str] = []

    def interrupted(*_: object) -> None:
        raise redis.ConnectionError("away")

    def enqueue(_: object, task: str, record_id: str, device_class: str, form: str) -> None:
        asked.append(record_id)
        if len(asked) > 1:
            export(runtime, record_id, ExportFormat(form))
            return
        with monkeypatch.context() as patch:
            if interruption is Stopping:
                assert runtime.repository.lock("export", 60).acquire()
                runtime.stopping.set()
            else:
                patch.setattr("worker.export.export.load_own", interrupted)
            with pytest.raises(interruption):
                export(runtime, record_id, ExportFormat(form))
        runtime.stopping.clear()
        client.delete("fineserve:lock:export")

    monkeypatch.setattr("registry.queue.Queue.enqueue", enqueue)
    monkeypatch.setattr("service.exports.ASK_AGAIN_SECONDS", 0.1)
    assert stack.api.get(f"/models/{model_id}/export?format=adapter").status_code == 200
    assert asked == [model_id, model_id]


def test_an_export_that_no_worker_makes_is_not_waited_for_for_ever(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = stack.make_model()
    assert stack.api.get(f"/models/{model_id}/export").status_code == 409
    build(stack.runtime, model_id)
    monkeypatch.setattr(stack.runtime.settings, "wait_seconds", 0.2)
    late = stack.api.get(f"/models/{model_id}/export")
    assert (late.status_code, late.json()["type"]) == (503, "urn:fineserve:problem:not-exported")
    assert late.headers["retry-after"] == "2"

    def away(*_: object) -> None:
        raise OperationalError("gone")

    monkeypatch.setattr("registry.queue.Queue.enqueue", away)
    assert stack.api.get(f"/models/{model_id}/export").status_code == 503


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("too many classes"), 500, "ValueError: too many classes"),
        (StorageFull("no room"), 507, "no room to export"),
    ],
)
def test_an_export_that_fails_says_why_and_can_be_tried_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, told: str
) -> None:
    model_id = stack.ready_model()

    def enqueue(_: object, task: str, record_id: str, device_class: str, form: str) -> None:
        given = stack.runtime, record_id, ExportFormat(form)
        threading.Thread(target=export, args=given).start()

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("registry.queue.Queue.enqueue", enqueue)
    monkeypatch.setattr("worker.export.export.FAILURE_SECONDS", 0.3)
    with monkeypatch.context() as changed:
        changed.setattr("worker.export.export.export_model", broken)
        failed = stack.api.get(f"/models/{model_id}/export")
    assert failed.status_code == status
    assert told in failed.json()["detail"]
    time.sleep(0.4)
    assert stack.api.get(f"/models/{model_id}/export").status_code == 200


def test_what_can_never_be_exported_is_not_waited_for(stack: Stack, client: redis.Redis) -> None:
    model_id = stack.ready_model()
    stack.runtime.announced[0] = stack.runtime.announced[0].model_copy(
        update={"fingerprint": "another"}
    )
    stack.runtime.announce_families()
    gone = stack.api.get(f"/models/{model_id}/export")
    assert (gone.status_code, gone.json()["type"]) == (410, "urn:fineserve:problem:model-gone")
    assert "make another model" in gone.json()["detail"]
    client.delete("fineserve:family:tiny")
    away = stack.api.get(f"/models/{model_id}/export")
    assert (away.status_code, away.json()["type"]) == (503, "urn:fineserve:problem:no-family")
