import base64
import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from PIL import Image

from learngenes.training.retrain import retrain
from registry.errors import StorageFull, StoreAway, StoreRefuses
from registry.events import connect_async
from registry.store import DirectoryStore, served_name
from tests.service.conftest import ASYNC, LOCAL, Stack
from tests.support.answers import refused
from tests.support.builds import build
from tests.support.failures import raising

PNG = {"Accept": "image/png"}
Body = dict[str, object]
KEY = {"Idempotency-Key": "abc"}


@pytest.fixture
def model(stack: Stack) -> str:
    return stack.ready_model()


def test_images_are_waited_for(stack: Stack, model: str, working: None) -> None:
    body = {"class_labels": ["star", 0], "n": 3, "seed": 5}
    answer = stack.generate(model, **body)
    assert answer.status_code == 200
    result = answer.json()
    assert (result["status"], result["model"], result["revision"]) == ("done", model, 1)
    assert [i["class_label"] for i in result["images"]] == [3, 0, 3]
    assert [i["seed"] for i in result["images"]] == [5, 6, 7]
    assert result["seconds"]["queued"] >= 0
    assert result["seconds"]["sampling"] > 0
    for image in result["images"]:
        assert Image.open(io.BytesIO(base64.b64decode(image["b64_png"]))).size == (8, 8)
    again = stack.generate(model, **body).json()
    assert again["id"] != result["id"]
    assert again["images"] == result["images"]


def test_by_default_each_class_has_a_new_seed(stack: Stack, model: str, working: None) -> None:
    first, second = (stack.generate(model).json()["images"] for _ in range(2))
    assert [image["class_label"] for image in first] == [0, 1, 2, 3, 4]
    assert first[0]["seed"] != second[0]["seed"]


@pytest.fixture
def guided(stack: Stack) -> str:
    return stack.ready_model(
        depth=4, num_inference_steps=3, guide={"depth": 2, "rank": 8}, guidance_stop=0.7
    )


def test_what_is_left_open_is_as_it_was_planned(stack: Stack, guided: str, working: None) -> None:
    planned = stack.told(f"/models/{guided}")["plan"]["sampling"]
    assert (planned["guide"], planned["num_inference_steps"]) == ({"depth": 2, "rank": 8}, 3)

    def sampled(**asked: object) -> dict[str, Any]:
        answer = stack.api.post("/generate", json={"model": guided, "n": 1, "seed": 1, **asked})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    alone, again = sampled(), sampled(**planned)
    assert alone["sampling"] == again["sampling"] == planned
    assert alone["images"] == again["images"]
    old = {"num_inference_steps": 25, "guidance_scale": 2.0, "scheduler": "ddim"}
    whole = {**old, "guidance_start": 0, "guidance_stop": 1, "guide": None}
    assert sampled(**old)["sampling"] == whole


def test_what_an_older_release_planned_is_sampled_as_it_was(stack: Stack, model: str) -> None:
    plan = stack.runtime.repository.models.get(model).plan
    stack.runtime.repository.models.change(model, plan=replace(plan, sampling=None))
    answer = stack.api.post("/generate", json={"model": model}, headers=ASYNC)
    sampling = answer.json()["sampling"]
    assert (sampling["scheduler"], sampling["num_inference_steps"]) == ("ddim", 25)
    assert (sampling["guidance_scale"], sampling["guidance_stop"]) == (2, 1)


@pytest.mark.parametrize(("n", "size"), [(1, (8, 8)), (5, (24, 16))])
def test_whoever_asks_for_a_picture_gets_one_png(
    stack: Stack, model: str, working: None, n: int, size: tuple[int, int]
) -> None:
    answer = stack.generate(model, PNG, class_labels=[1], n=n)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == size


def test_whoever_does_not_wait_comes_back_later(stack: Stack, model: str) -> None:
    answer = stack.generate(model, ASYNC)
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    location = answer.headers["location"]
    assert stack.told(location)["status"] == "queued"
    stack.sampler.generate(answer.json()["id"])
    done = stack.told(location)
    assert done["status"] == "done"
    assert len(done["images"]) == 5
    events = stack.api.get(f"{location}/events").text
    assert events.index('"status":"queued"') < events.index('"status":"done"')
    assert stack.api.get(location, headers=PNG).content[:4] == b"\x89PNG"


def test_waiting_ends_with_202_when_it_takes_too_long(stack: Stack, model: str) -> None:
    stack.runtime.settings.wait_seconds = 0.05
    answer = stack.generate(model)
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"


def test_a_cancelled_generation_has_no_images(stack: Stack, model: str) -> None:
    generation = stack.queue(model)
    cancelled = stack.api.post(f"/generations/{generation}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    stack.sampler.generate(generation)
    assert stack.told(f"/generations/{generation}")["images"] == []


def test_a_generation_that_ends_badly_is_a_problem(stack: Stack, model: str, working: None) -> None:
    name = served_name(stack.runtime.repository.models.get(model))
    (stack.runtime.store.root / name / "own.safetensors").write_bytes(b"")
    refused(stack.generate(model), 500, "corrupt")


def test_a_model_deleted_after_the_request_was_accepted_is_gone(stack: Stack, model: str) -> None:
    queued = stack.queue(model, KEY)
    stack.api.delete(f"/models/{model}")
    stack.sampler.generate(queued)
    assert stack.told(f"/generations/{queued}")["status"] == "failed"
    refused(stack.generate(model, KEY), 410, f"model {model} is deleted", "model-gone")


def test_a_key_is_replayed_when_the_model_is_gone(stack: Stack, model: str, working: None) -> None:
    first = stack.generate(model, KEY).json()
    stack.api.delete(f"/models/{model}")
    assert stack.generate(model, KEY).json() == first


def test_images_that_are_gone_are_to_be_made_again(stack: Stack, model: str, working: None) -> None:
    generation = stack.generate(model).json()["id"]
    stack.runtime.store.delete(f"generations/{generation}")
    refused(stack.api.get(f"/generations/{generation}"), 410, "make the request again")


def test_revision_zero_serves_while_the_model_is_retrained(stack: Stack) -> None:
    model_id = stack.make_model()
    refused(stack.generate(model_id), 409, kind="model-not-ready")
    served: list[dict[str, object]] = []

    def generate_and_retrain(*given: Any, **more: Any) -> object:
        generation = stack.queue(model_id)
        stack.sampler.generate(generation)
        served.append(stack.told(f"/generations/{generation}"))
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
        ({"guidance_start": -0.1}, "guidance_start"),
        ({"guidance_stop": 1.1}, "guidance_stop"),
        ({"guidance_start": 0.5, "guidance_stop": 0.2}, "let it stop after it starts"),
        ({"guide": {"depth": 9, "rank": 8}}, "no size of depth 9, rank 8"),
        ({"guide": {"depth": 4, "rank": 48}}, "a guide is smaller than what it guides"),
        ({"scheduler": "heun"}, "scheduler"),
        ({"format": "gif"}, "format"),
        ({"prompt": "a shoe"}, "prompt: Extra inputs"),
    ],
)
def test_a_bad_request_is_explained(stack: Stack, model: str, body: Body, message: str) -> None:
    refused(stack.generate(model, **body), 422, message)
    assert stack.runtime.repository.generations.active() == []


def test_class_names_are_found_in_any_case(stack: Stack, model: str) -> None:
    queued = stack.queue(model, class_labels=["SQUARE"])
    assert stack.runtime.repository.generations.get(queued).class_labels == [1]


def post_and_leave(stack: Stack, model: str, **headers: str) -> None:
    """Ask for images, and close the connection at once."""
    request = httpx.Request("POST", f"{LOCAL}/generate", json={"model": model}, headers=headers)
    messages = iter([{"type": "http.request", "body": request.read()}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(_: object) -> None: ...

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


def test_whoever_leaves_cancels_the_request(stack: Stack, model: str, client: redis.Redis) -> None:
    post_and_leave(stack, model)
    (key,) = client.keys("fineserve:generation:g-????????????????")
    assert stack.runtime.repository.generations.get(key.split(":")[-1]).status == "cancelled"


def test_a_client_that_can_come_back_for_its_images_may_leave(stack: Stack, model: str) -> None:
    post_and_leave(stack, model, **KEY)
    (record,) = stack.runtime.repository.generations.active()
    assert record.status == "queued"


def test_whoever_sends_the_same_key_is_the_same_owner(stack: Stack, model: str) -> None:
    keys = ({"authorization": f"Bearer {word}"} for word in ("one", "one", "two"))
    queued = [stack.queue(model, headers) for headers in (*keys, None)]
    owners = [stack.runtime.repository.generations.get(one).owner for one in queued]
    assert owners[0] == owners[1]
    assert len(set(owners)) == 3
    assert owners[3] == ""
    assert not any("one" in owner for owner in owners)


def test_what_misses_its_deadline_says_so(stack: Stack, model: str) -> None:
    late = stack.queue(model, KEY, deadline_seconds=0.01)
    time.sleep(0.02)
    stack.sampler.generate(late)
    refused(stack.generate(model, KEY, deadline_seconds=0.01), 409, kind="deadline-missed")


def test_without_redis_accepted_work_is_kept(stack: Stack, model: str, tmp_path: Path) -> None:
    app = stack.api.app.state
    app.fineserve.events = connect_async(f"unix://{tmp_path}/none.sock")
    answer = stack.generate(model)
    assert answer.status_code == 202
    generation = answer.json()["id"]
    assert answer.headers["location"] == f"/generations/{generation}"
    assert stack.runtime.repository.generations.get(generation).status == "queued"


def test_a_model_of_a_device_that_nobody_samples_on_is_refused(stack: Stack, model: str) -> None:
    stack.heartbeat(id="a:1:1", queue="sample", device_class="another")
    refused(stack.generate(model), 503, "workers sample on another only")
    stack.heartbeat(id="b:1:1", queue="sample")
    assert stack.queue(model)


def test_more_artifacts_than_the_quota_are_507(stack: Stack, model: str) -> None:
    used_bytes = stack.runtime.store.used_bytes()
    stack.runtime.repository.keep_store_bytes(used_bytes)
    assert stack.told("/status")["store_bytes"] == used_bytes
    stack.runtime.settings.max_store_gb = used_bytes["models"] / 2 / 1e9
    refused(stack.generate(model), 507, "the artifacts take")
    stack.api.delete(f"/models/{model}")
    stack.runtime.repository.keep_store_bytes(stack.runtime.store.used_bytes())
    assert stack.deploy().status_code == 202


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoreAway("no answer"), "cannot be reached; retry"),
        (StoreRefuses("forbidden"), "refuses to work; tell the operator"),
    ],
)
def test_what_is_accepted_waits_for_a_store_that_is_away(
    stack: Stack, model: str, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    accepted = stack.queue(model, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(stack.runtime.store, "put", raising(error))
        stack.sampler.generate(accepted)
    waiting = stack.runtime.repository.generations.get(accepted)
    assert (waiting.status, waiting.attempts) == ("running", 0)
    stack.sampler.generate(accepted)
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "read_all", raising(error))
        refused(stack.generate(model, KEY), 503, told)
    assert stack.generate(model, KEY).json()["images"]


def test_a_full_disk_is_507_until_there_is_room(
    stack: Stack, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stack.runtime.settings, "min_free_disk_gb", 1e9)
        for answer in (stack.generate(model), stack.deploy()):
            refused(answer, 507)
        assert "the disk of the artifacts is full" in stack.api.get("/readyz").text
    accepted = stack.queue(model, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(stack.runtime.store, "put", raising(StorageFull("no room")))
        stack.sampler.generate(accepted)
    waiting = stack.runtime.repository.generations.get(accepted)
    assert (waiting.status, waiting.attempts) == ("running", 0)  # accepted is accepted
    stack.sampler.generate(accepted)
    assert stack.generate(model, KEY).json()["images"]
