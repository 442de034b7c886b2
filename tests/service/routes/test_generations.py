import base64
import dataclasses
import io
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from PIL import Image

from learngenes.training.retrain import retrain
from registry.errors import StorageFull
from registry.events import connect_async
from registry.store import served_name
from tests.service.conftest import LOCAL, Stack
from tests.support.builds import build

SMALL = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture
def model(stack: Stack) -> str:
    return stack.ready_model()


@pytest.fixture
def sampling(stack: Stack) -> threading.Event:
    """A worker that takes every generation as soon as it is queued."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            for record in stack.runtime.repository.generations.active():
                stack.sampler.generate(record.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield stop
    stop.set()
    thread.join()


def test_images_are_waited_for(stack: Stack, model: str, sampling: threading.Event) -> None:
    body = {"model": model, "class_labels": ["star", 0], "n": 3, **SMALL}
    answer = stack.api.post("/generate", json=body)
    assert answer.status_code == 200
    result = answer.json()
    assert (result["status"], result["model"], result["revision"]) == ("done", model, 1)
    assert [i["class_label"] for i in result["images"]] == [3, 0, 3]
    assert [i["seed"] for i in result["images"]] == [5, 6, 7]
    assert result["seconds"]["queued"] >= 0
    assert result["seconds"]["sampling"] > 0
    for image in result["images"]:
        assert Image.open(io.BytesIO(base64.b64decode(image["b64_png"]))).size == (8, 8)
    again = stack.api.post("/generate", json=body).json()
    assert again["id"] != result["id"]
    assert again["images"] == result["images"]


def test_every_class_by_default_and_a_seed_of_its_own(
    stack: Stack, model: str, sampling: threading.Event
) -> None:
    body = {"model": model, "num_inference_steps": 1}
    first, second = (stack.api.post("/generate", json=body).json()["images"] for _ in range(2))
    assert [image["class_label"] for image in first] == [0, 1, 2, 3, 4]
    assert first[0]["seed"] != second[0]["seed"]


@pytest.mark.parametrize(("n", "size"), [(1, (8, 8)), (5, (24, 16))])
def test_one_png_when_a_picture_is_asked_for(
    stack: Stack, model: str, sampling: threading.Event, n: int, size: tuple[int, int]
) -> None:
    answer = stack.api.post(
        "/generate",
        json={"model": model, "class_labels": [1], "n": n, **SMALL},
        headers={"Accept": "image/png"},
    )
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == size


def test_who_does_not_wait_comes_back_later(stack: Stack, model: str) -> None:
    answer = stack.api.post(
        "/generate", json={"model": model, **SMALL}, headers={"Prefer": "respond-async"}
    )
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    location = answer.headers["location"]
    assert stack.api.get(location).json()["status"] == "queued"
    stack.sampler.generate(answer.json()["id"])
    done = stack.api.get(location).json()
    assert done["status"] == "done"
    assert len(done["images"]) == 5
    events = stack.api.get(f"{location}/events").text
    assert events.index('"status":"queued"') < events.index('"status":"done"')
    assert stack.api.get(location, headers={"Accept": "image/png"}).content[:4] == b"\x89PNG"


def test_waiting_ends_with_202_when_it_takes_too_long(stack: Stack, model: str) -> None:
    stack.api.app.state.fineserve.settings.wait_seconds = 0.05
    answer = stack.api.post("/generate", json={"model": model})
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"


def test_cancel(stack: Stack, model: str) -> None:
    answer = stack.api.post("/generate", json={"model": model}, headers={"Prefer": "respond-async"})
    location = answer.headers["location"]
    assert stack.api.post(f"{location}/cancel").json()["status"] == "cancelled"
    stack.sampler.generate(answer.json()["id"])
    assert stack.api.get(location).json()["images"] == []


def test_a_generation_that_ends_badly_is_a_problem(
    stack: Stack, model: str, sampling: threading.Event
) -> None:
    name = served_name(stack.runtime.repository.models.get(model))
    (stack.runtime.store.root / name / "own.safetensors").write_bytes(b"")
    answer = stack.api.post("/generate", json={"model": model})
    assert answer.status_code == 500
    assert "corrupt" in answer.json()["detail"]


def test_a_model_deleted_after_the_request_was_accepted_is_gone(stack: Stack, model: str) -> None:
    body, key = {"model": model}, {"Idempotency-Key": "abc"}
    queued = stack.api.post("/generate", json=body, headers={**key, "Prefer": "respond-async"})
    stack.api.delete(f"/models/{model}")
    stack.sampler.generate(queued.json()["id"])
    record = stack.api.get(queued.headers["location"]).json()
    assert record["status"] == "failed"
    waited = stack.api.post("/generate", json=body, headers=key)
    assert waited.status_code == 410
    assert waited.json()["type"] == "urn:fineserve:problem:model-gone"
    assert f"model {model} is deleted" in waited.json()["detail"]


def test_a_key_is_replayed_even_when_the_model_is_gone(
    stack: Stack, model: str, sampling: threading.Event
) -> None:
    headers = {"Idempotency-Key": "abc"}
    body = {"model": model, **SMALL}
    first = stack.api.post("/generate", json=body, headers=headers).json()
    stack.api.delete(f"/models/{model}")
    assert stack.api.post("/generate", json=body, headers=headers).json() == first


def test_images_that_are_gone_are_gone(stack: Stack, model: str, sampling: threading.Event) -> None:
    generation = stack.api.post("/generate", json={"model": model, **SMALL}).json()["id"]
    stack.runtime.store.delete(f"generations/{generation}")
    answer = stack.api.get(f"/generations/{generation}")
    assert answer.status_code == 410
    assert "make the request again" in answer.json()["detail"]


def test_revision_zero_serves_while_the_model_is_retrained(
    stack: Stack, sampling: threading.Event
) -> None:
    model_id = stack.make_model()
    early = stack.api.post("/generate", json={"model": model_id})
    assert early.status_code == 409
    assert early.json()["type"] == "urn:fineserve:problem:model-not-ready"
    served: list[dict[str, object]] = []

    def generate_and_retrain(*given: Any, **more: Any) -> object:
        served.append(stack.api.post("/generate", json={"model": model_id, **SMALL}).json())
        return retrain(*given, **more)

    build(stack.runtime, model_id, retrain=generate_and_retrain)
    assert [(told["status"], told["revision"]) for told in served] == [("done", 0)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"class_labels": ["boat"]}, "no class 'boat'; It is a number from 0 to 4"),
        ({"class_labels": ["sqare"]}, "did you mean square"),
        ({"class_labels": [5]}, "no class 5"),
        ({"class_labels": [-1]}, "no class -1"),
        ({"class_labels": []}, "at least 1 item"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 21}, "n=21 is over this server's limit of 20"),
        ({"num_inference_steps": 251}, "num_inference_steps=251 is over this server's limit"),
        ({"class_labels": [0, 1], "n": 1}, "n=1 is less than the 2 class_labels"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"scheduler": "heun"}, "scheduler"),
        ({"format": "gif"}, "format"),
        ({"prompt": "a shoe"}, "prompt: Extra inputs"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    stack: Stack, model: str, body: dict[str, object], message: str
) -> None:
    answer = stack.api.post("/generate", json={"model": model, **body})
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert stack.runtime.repository.generations.active() == []


def test_class_names_are_found_in_any_case(stack: Stack, model: str) -> None:
    answer = stack.api.post(
        "/generate",
        json={"model": model, "class_labels": ["SQUARE"]},
        headers={"Prefer": "respond-async"},
    )
    record = stack.runtime.repository.generations.get(answer.json()["id"])
    assert record.class_labels == [1]


def post_and_leave(
    stack: Stack, body: dict[str, object], **headers: str
) -> list[dict[str, object]]:
    """What a client is sent that closes its connection at once."""
    request = httpx.Request("POST", f"{LOCAL}/generate", json=body, headers=headers)
    messages = iter([{"type": "http.request", "body": request.read()}, {"type": "http.disconnect"}])
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "app": stack.api.app,
        "state": {},
    }
    assert stack.api.portal is not None
    stack.api.portal.call(stack.api.app, scope, receive, send)
    return sent


def test_a_client_that_leaves_cancels_its_request(stack: Stack, model: str) -> None:
    post_and_leave(stack, {"model": model, **SMALL})
    client = redis.Redis.from_url(stack.runtime.settings.resolved_redis_url, decode_responses=True)
    with client:
        (key,) = client.keys("fineserve:generation:g-????????????????")
    assert stack.runtime.repository.generations.get(key.split(":")[-1]).status == "cancelled"


def test_a_client_that_can_come_back_for_its_images_may_leave(stack: Stack, model: str) -> None:
    post_and_leave(stack, {"model": model, **SMALL}, **{"Idempotency-Key": "k"})
    (record,) = stack.runtime.repository.generations.active()
    assert record.status == "queued"


def test_whoever_sends_the_same_key_is_the_same_owner(stack: Stack, model: str) -> None:
    owners = []
    for key in ("Bearer one", "Bearer one", "Bearer two", None):
        headers = {"prefer": "respond-async"} | ({"authorization": key} if key else {})
        answer = stack.api.post("/generate", json={"model": model, **SMALL}, headers=headers)
        owners.append(stack.runtime.repository.generations.get(answer.json()["id"]).owner)
    assert owners[0] == owners[1]
    assert len(set(owners)) == 3
    assert owners[3] == ""
    assert not any("one" in owner for owner in owners)


def test_what_misses_its_deadline_says_so(stack: Stack, model: str) -> None:
    body, later = {"model": model, **SMALL}, {"prefer": "respond-async", "Idempotency-Key": "k"}
    late = stack.api.post("/generate", json={**body, "deadline_seconds": 0.01}, headers=later)
    assert late.status_code == 202
    time.sleep(0.02)
    stack.sampler.generate(late.json()["id"])
    answer = stack.api.post(
        "/generate", json={**body, "deadline_seconds": 0.01}, headers={"Idempotency-Key": "k"}
    )
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:fineserve:problem:deadline-missed"


def test_what_was_accepted_is_not_refused_when_redis_goes_away(
    stack: Stack, model: str, tmp_path: Path
) -> None:
    app = stack.api.app.state  # type: ignore[attr-defined]
    nowhere = connect_async(f"unix://{tmp_path}/none.sock")
    app.fineserve = dataclasses.replace(app.fineserve, events=nowhere)
    answer = stack.api.post("/generate", json={"model": model, **SMALL})
    assert answer.status_code == 202
    generation = answer.json()["id"]
    assert answer.headers["location"] == f"/generations/{generation}"
    assert stack.runtime.repository.generations.get(generation).status == "queued"


def test_a_model_of_a_device_that_nobody_samples_on_is_refused(stack: Stack, model: str) -> None:
    stack.heartbeat(id="a:1:1", queue="sample", device_class="another")
    answer = stack.api.post("/generate", json={"model": model, **SMALL})
    assert answer.status_code == 503
    assert "workers sample on another only" in answer.json()["detail"]
    stack.heartbeat(id="b:1:1", queue="sample")
    headers = {"prefer": "respond-async"}
    accepted = stack.api.post("/generate", json={"model": model, **SMALL}, headers=headers)
    assert accepted.status_code == 202


def test_more_artifacts_than_the_quota_are_507(stack: Stack, model: str) -> None:
    settings = stack.api.app.state.fineserve.settings  # type: ignore[attr-defined]
    used_bytes = stack.runtime.store.used_bytes()
    stack.runtime.repository.keep_store_bytes(used_bytes)
    assert stack.api.get("/status").json()["store_bytes"] == used_bytes
    settings.max_store_gb = used_bytes["models"] / 2 / 1e9
    answer = stack.api.post("/generate", json={"model": model, **SMALL})
    assert answer.status_code == 507
    assert "the artifacts take" in answer.json()["detail"]
    stack.api.delete(f"/models/{model}")
    stack.runtime.repository.keep_store_bytes(stack.runtime.store.used_bytes())
    assert stack.api.post("/models", json={"max_mem_gb": 4}).status_code == 202


def test_a_full_disk_is_507_until_there_is_room(
    stack: Stack, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stack.api.app.state.fineserve.settings  # type: ignore[attr-defined]
    enough, settings.min_free_disk_gb = settings.min_free_disk_gb, 1e9
    bodies = {"/generate": {"model": model, **SMALL}, "/models": {"max_mem_gb": 4}}
    for path, body in bodies.items():
        answer = stack.api.post(path, json=body)
        assert answer.status_code == 507, answer.text
        assert answer.headers["retry-after"]
    assert "the disk of the artifacts is full" in stack.api.get("/readyz").text
    settings.min_free_disk_gb = enough
    headers, key = {"prefer": "respond-async"}, {"Idempotency-Key": "k"}
    accepted = stack.api.post("/generate", json=bodies["/generate"], headers=headers | key)
    assert accepted.status_code == 202

    def full(name: str, *_: object) -> None:
        raise StorageFull(f"no room for {name}")

    with monkeypatch.context() as patch:
        patch.setattr(stack.runtime.store, "put", full)
        stack.sampler.generate(accepted.json()["id"])
    waiting = stack.runtime.repository.generations.get(accepted.json()["id"])
    assert (waiting.status, waiting.attempts) == ("running", 0)  # accepted is accepted
    stack.sampler.generate(waiting.id)
    assert stack.api.post("/generate", json=bodies["/generate"], headers=key).json()["images"]
