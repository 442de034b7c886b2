import asyncio
import io
import tarfile
import threading
import time
from collections.abc import Callable

import httpx
import pytest
import redis
from fastapi import Request
from kombu.exceptions import OperationalError
from starlette.requests import ClientDisconnect

from fineserve.wire import ExportFormat
from registry.errors import StorageFull
from service.access import Caller
from service.connection import while_connected
from service.exports import wait_for_export
from tests.service.conftest import Stack
from tests.support.answers import refused
from tests.support.builds import build
from tests.support.failures import raising
from tests.support.records import revision_name
from worker.build.restore import restore
from worker.export.export import export
from worker.leases import Stopping

Make = Callable[[str, ExportFormat], object]
Exporting = Callable[[Make], list[tuple[str, ...]]]


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> Exporting:
    """Calls `make` for each export that is queued; returns the messages."""

    def start(make: Make) -> list[tuple[str, ...]]:
        messages: list[tuple[str, ...]] = []

        def enqueue(_: object, *message: str) -> None:
            messages.append(message)
            make(message[1], ExportFormat(message[3]))

        monkeypatch.setattr("registry.queue.Queue.enqueue", enqueue)
        return messages

    return start


def exported(stack: Stack, model_id: str, form: str = "diffusers") -> httpx.Response:
    return stack.api.get(f"/models/{model_id}/export", params={"format": form})


def files(answer: httpx.Response) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        return tar.getnames()


def test_a_model_is_exported_when_it_is_asked_for(stack: Stack, exporting: Exporting) -> None:
    model_id = stack.ready_model()
    asked = exporting(lambda *what: threading.Timer(0.3, export, (stack.runtime, *what)).start())
    first, again = (stack.api.get(f"/models/{model_id}/export") for _ in range(2))
    assert asked == [("fineserve.export", model_id, stack.runtime.device_class, "diffusers")]
    assert first.headers["content-type"] == "application/x-tar"
    assert f'{model_id}.tar"' in first.headers["content-disposition"]
    assert first.content == again.content
    assert f"{model_id}/transformer/config.json" in files(first)
    assert f"{model_id}/own.safetensors" in files(exported(stack, model_id, "adapter"))
    assert "'native'" in refused(exported(stack, model_id, "pickle"), 422)["detail"]
    stack.api.delete(f"/models/{model_id}")
    refused(exported(stack, model_id), 410)
    assert not (stack.runtime.store.root / "exports" / model_id).exists()


def test_an_export_is_fetched_from_the_bucket_where_that_is_wanted(
    stack: Stack, exporting: Exporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = stack.ready_model()
    exporting(lambda *what: export(stack.runtime, *what))
    monkeypatch.setattr(stack.state.settings, "presigned_downloads", True)
    assert exported(stack, model_id).status_code == 200, "a directory has no addresses"

    def link(_: object, name: str, file: str) -> str:
        return f"https://bucket.test/{name}/{file}?signature"

    monkeypatch.setattr(type(stack.state.store), "link", link)
    params = {"format": "diffusers"}
    path = f"/models/{model_id}/export"
    answer = stack.api.get(path, params=params, follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"].startswith(f"https://bucket.test/exports/{model_id}/")
    assert answer.headers["cache-control"] == "no-store"


def test_another_revision_needs_another_export(stack: Stack, exporting: Exporting) -> None:
    model_id = stack.ready_model()
    models = stack.runtime.repository.models
    unretrained = revision_name(stack.runtime.store, model_id, 0).rpartition("/")[2]
    revisions: list[int | None] = []

    def make(record_id: str, form: ExportFormat) -> None:
        revisions.append(models.get(record_id).revision)
        if len(revisions) == 1:
            models.change(record_id, revision=0, artifact=unretrained)
        else:
            export(stack.runtime, record_id, form)

    exporting(make)
    assert exported(stack, model_id, "adapter").status_code == 200
    assert revisions == [1, 0]


@pytest.mark.parametrize("interruption", [Stopping, redis.ConnectionError])
def test_an_export_that_was_interrupted_is_asked_for_again(
    stack: Stack,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    exporting: Exporting,
    interruption: type[Exception],
) -> None:
    runtime, model_id = stack.runtime, stack.ready_model()

    def make(record_id: str, form: ExportFormat) -> None:
        if len(asked) > 1:
            export(runtime, record_id, form)
            return
        with monkeypatch.context() as patch:
            if interruption is Stopping:
                assert runtime.repository.lock("export", 60).acquire()
                runtime.stopping.set()
            else:
                patch.setattr("worker.export.export.load_own", raising(interruption("away")))
            with pytest.raises(interruption):
                export(runtime, record_id, form)
        runtime.stopping.clear()
        client.delete("fineserve:lock:export")

    asked = exporting(make)
    monkeypatch.setattr("service.exports.ASK_AGAIN_SECONDS", 0.1)
    assert exported(stack, model_id, "adapter").status_code == 200
    assert [record_id for _, record_id, *_ in asked] == [model_id, model_id]


def test_an_export_that_no_worker_makes_is_given_up(stack: Stack, exporting: Exporting) -> None:
    model_id = stack.make_model()
    refused(exported(stack, model_id), 409)
    build(stack.runtime, model_id)
    stack.runtime.settings.wait_seconds = 0.2
    late = exported(stack, model_id)
    refused(late, 503, kind="not-exported")
    assert late.headers["retry-after"] == "2"
    exporting(raising(OperationalError("gone")))
    refused(exported(stack, model_id), 503)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("too many classes"), 500, "ValueError: too many classes"),
        (StorageFull("no room"), 507, "no room to export"),
    ],
)
def test_an_export_that_fails_says_why_and_can_be_tried_again(
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
    exporting: Exporting,
    error: Exception,
    status: int,
    told: str,
) -> None:
    model_id = stack.ready_model()

    exporting(lambda *what: threading.Thread(target=export, args=(stack.runtime, *what)).start())
    monkeypatch.setattr("worker.export.export.FAILURE_SECONDS", 0.3)
    with monkeypatch.context() as changed:
        changed.setattr("worker.export.export.export_model", raising(error))
        refused(exported(stack, model_id), status, told)
    time.sleep(0.4)
    assert exported(stack, model_id).status_code == 200


def test_what_can_never_be_exported_is_not_waited_for(stack: Stack, client: redis.Redis) -> None:
    model_id = stack.ready_model()
    (family,) = stack.runtime.repository.families()
    another = family.model_copy(update={"fingerprint": "another"})
    stack.runtime.repository.announce_family(another)
    refused(exported(stack, model_id), 410, "make another model", "model-gone")
    client.delete("fineserve:family:tiny")
    refused(exported(stack, model_id), 503, kind="no-family")


def test_an_export_of_which_a_bit_has_flipped_is_made_again(
    stack: Stack, exporting: Exporting
) -> None:
    model_id = stack.ready_model()
    asked = exporting(lambda *what: export(stack.runtime, *what))
    whole = exported(stack, model_id, "adapter").content
    (file,) = stack.runtime.store.root.glob(f"exports/{model_id}/*/model.tar")
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    stack.runtime.repository._redis.flushall()
    stack.runtime.announce_families()
    restore(stack.runtime.store, stack.runtime.repository.models)
    stack.heartbeat(id="another", queue="sample")
    assert exported(stack, model_id, "adapter").content[:100] != b""
    assert len(asked) == 2


def test_whoever_leaves_an_export_is_not_waited_for(stack: Stack, exporting: Exporting) -> None:
    model_id = stack.ready_model()
    exporting(lambda *_: None)
    looked: list[float] = []
    checked = stack.state.store.checked_path

    def look(name: str, file: str) -> object:
        looked.append(time.monotonic())
        return checked(name, file)

    stack.state.store.checked_path = look

    async def leaving() -> None:
        record = stack.runtime.repository.models.get(model_id)
        asked = wait_for_export(stack.state, record.id, ExportFormat.ADAPTER, Caller("", None))
        request = Request({"type": "http"}, receive=left)
        with pytest.raises(ClientDisconnect):
            await while_connected(request, asked)

    async def left() -> dict[str, str]:
        await asyncio.sleep(0.5)
        return {"type": "http.disconnect"}

    asyncio.run(leaving())
    seen = len(looked)
    assert seen > 1
    time.sleep(0.5)
    assert len(looked) == seen
