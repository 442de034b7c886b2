import dataclasses
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from kombu.exceptions import OperationalError

from learngenes.measuring.model import Measurement
from tests.service.conftest import Stack
from tests.support.builds import build, verify_here
from tests.support.records import A_COST, queued_model


def test_a_budget_becomes_a_queued_model(stack: Stack) -> None:
    answer = stack.api.post("/models", json={"max_mem_gb": 4})
    assert answer.status_code == 202
    model = answer.json()
    assert answer.headers["location"] == f"/models/{model['id']}"
    assert (model["status"], model["revision"], model["error"]) == ("queued", None, None)
    assert model["plan"]["depth"] == 4
    assert model["plan"]["rank"] == 48
    assert model["plan"]["predicted"]["memory_bytes"] < 4e9
    assert model["plan"]["predicted"]["latency_seconds"] > 0
    assert model["plan"]["quality"] == 1
    assert model["device_class"] == stack.runtime.device_class
    assert (model["measured"], model["over_budget"]) == (None, [])
    assert stack.api.get(answer.headers["location"]).json() == model


def test_it_becomes_ready_with_measured_figures(stack: Stack) -> None:
    model_id = stack.ready_model()
    model = stack.api.get(f"/models/{model_id}").json()
    assert (model["status"], model["revision"]) == ("ready", 1)
    assert 0 < model["measured"]["memory_bytes"] <= model["plan"]["predicted"]["memory_bytes"]
    assert model["measured"]["latency_p95_seconds"] > 0
    assert model["measured"].keys() == model["plan"]["predicted"].keys()
    assert model["ready_at"] > model["created_at"]


def test_smaller_budgets_give_smaller_models(stack: Stack) -> None:
    answer = stack.api.post("/models", json={"max_mem_gb": 1e-6})
    floor = answer.json()["nearest_feasible"]["max_mem_gb"]
    sizes = set()
    for budget in (floor, floor * 1.5, 1):
        plan = stack.api.post("/models", json={"max_mem_gb": budget}).json()["plan"]
        assert plan["predicted"]["memory_bytes"] <= budget * 1e9
        sizes.add((plan["depth"], plan["rank"], plan["mode"]))
    assert len(sizes) == 3


def test_the_record_repeats_the_whole_request(stack: Stack) -> None:
    body = {
        "max_mem_gb": 2.0,
        "mem_scope": "process",
        "max_latency_ms": 60_000.0,
        "min_quality": 0.1,
        "n": 2,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "depth": 3,
        "rank": 24,
        "mode": "factored",
        "dtype": "int8",
    }
    names = {"name": "my model", "family": "tiny", "device_class": stack.runtime.device_class}
    model = stack.api.post("/models", json={**body, **names}).json()
    assert model["budget"] == body
    assert {key: model[key] for key in names} == names
    fixed = {key: model["plan"][key] for key in ("depth", "rank", "mode", "dtype", "n")}
    assert fixed == {"depth": 3, "rank": 24, "mode": "factored", "dtype": "int8", "n": 2}


def test_a_model_that_was_made_again_shows_both_figures(stack: Stack) -> None:
    needed = stack.plan(max_mem_gb=4).json()["plan"]["predicted"]["memory_bytes"]
    model_id = stack.make_model(needed / 1e9)
    more = iter((needed + 1,))

    def measure_more(*args: Any) -> Measurement:
        """The first time."""
        measurement = verify_here(*args)
        memory_bytes = next(more, measurement.cost.memory_bytes)
        cost = dataclasses.replace(measurement.cost, memory_bytes=memory_bytes)
        return dataclasses.replace(measurement, cost=cost)

    build(stack.runtime, model_id, verify=measure_more)
    model = stack.api.get(f"/models/{model_id}").json()
    assert (model["status"], model["revision"]) == ("ready", 4)
    assert model["over_budget"][0]["measured"]["memory_bytes"] == needed + 1
    assert model["measured"]["memory_bytes"] <= needed
    events = stack.api.get(f"/models/{model_id}/events").text
    assert events.count("event: verified") == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_mem_gb": 0}, "max_mem_gb: Input should be greater than 0"),
        ({"max_mem_gb": -1}, "greater than 0"),
        ({"max_memory": 4}, "max_memory: Extra inputs are not permitted"),
        ({}, "send a budget: max_mem_gb, max_latency_ms, or both"),
        ({"max_mem_gb": 4, "n": 0}, "n: Input should be greater than or equal to 1"),
        ({"max_mem_gb": 4, "name": "<script>"}, "name: String should match pattern"),
        ({"max_mem_gb": 4, "family": "huge"}, "no family 'huge'; choose one of tiny"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    stack: Stack, body: dict[str, object], message: str
) -> None:
    answer = stack.api.post("/models", json=body)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert stack.api.get("/models").json()["models"] == []


@pytest.mark.parametrize("raw", [b"", b"{", b'{"max_mem_gb": NaN}', b'{"max_mem_gb": Infinity}'])
def test_a_body_that_is_no_budget_is_refused(stack: Stack, raw: bytes) -> None:
    answer = stack.api.post("/models", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["title"] == "Invalid request"


def test_without_a_worker_nothing_is_accepted(api: TestClient) -> None:
    answer = api.post("/models", json={"max_mem_gb": 4})
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:fineserve:problem:no-family"
    assert "start a worker" in answer.json()["detail"]
    assert answer.headers["retry-after"]


def test_a_request_over_the_limits_is_refused(stack: Stack) -> None:
    for body in ({"n": 21}, {"num_inference_steps": 251}):
        answer = stack.api.post("/models", json={"max_mem_gb": 4, **body})
        assert answer.status_code == 422
        assert "over this server's limit" in answer.json()["detail"]


def test_of_two_families_one_must_be_named(stack: Stack) -> None:
    (family,) = stack.runtime.repository.families()
    stack.runtime.repository.announce_family(family.model_copy(update={"name": "other"}))
    answer = stack.api.post("/models", json={"max_mem_gb": 4})
    assert answer.json()["detail"] == "say which family: one of other, tiny"


@pytest.mark.parametrize("n", [1, 3, 7, 20])
def test_the_suggested_budget_is_feasible(stack: Stack, n: int) -> None:
    answer = stack.api.post("/models", json={"max_mem_gb": 1e-6, "n": n})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:fineserve:problem:infeasible-budget"
    body = {"max_mem_gb": problem["nearest_feasible"]["max_mem_gb"], "n": n}
    assert f"needs max_mem_gb {body['max_mem_gb']:g}; send that" in problem["detail"]
    assert stack.api.post("/models", json=body).status_code == 202


def test_an_accepted_model_survives_a_broker_that_takes_no_message(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OperationalError("away")

    headers = {"Idempotency-Key": "abc"}
    with monkeypatch.context() as patch:
        patch.setattr("registry.queue.Queue.enqueue", refuse)
        answer = stack.api.post("/models", json={"max_mem_gb": 4}, headers=headers)
    assert answer.status_code == 202
    queue = stack.runtime.queue
    assert queue.length("build", stack.runtime.device_class) == 0
    again = stack.api.post("/models", json={"max_mem_gb": 4}, headers=headers)
    assert again.json()["id"] == answer.json()["id"]
    assert queue.length("build", stack.runtime.device_class) == 1


@pytest.mark.parametrize("suffix", [":lease", ":events", "0", "*"])
def test_only_an_id_names_a_model(stack: Stack, suffix: str) -> None:
    model_id = stack.make_model()
    assert stack.api.get(f"/models/{model_id}{suffix}").status_code == 404
    assert stack.api.post("/generate", json={"model": model_id + suffix}).status_code == 404


def test_the_same_key_makes_one_model(stack: Stack) -> None:
    headers = {"Idempotency-Key": "abc"}
    first, again = (
        stack.api.post("/models", json={"max_mem_gb": 4}, headers=headers) for _ in range(2)
    )
    assert first.json() == again.json()
    other = stack.api.post("/models", json={"max_mem_gb": 3}, headers=headers)
    assert other.status_code == 422
    assert "use a new key" in other.json()["detail"]


def test_the_list_is_paginated(stack: Stack) -> None:
    ids = [stack.make_model() for _ in range(3)]
    first = stack.api.get("/models", params={"limit": 2}).json()
    assert [m["id"] for m in first["models"]] == [ids[2], ids[1]]
    rest = stack.api.get("/models", params={"limit": 2, "offset": first["next_offset"]}).json()
    assert [m["id"] for m in rest["models"]] == [ids[0]]
    assert rest["next_offset"] is None


def test_cancel(stack: Stack) -> None:
    model_id = stack.make_model()
    assert stack.api.post(f"/models/{model_id}/cancel").json()["status"] == "cancelled"
    build(stack.runtime, model_id)
    assert stack.api.get(f"/models/{model_id}").json()["status"] == "cancelled"
    assert stack.api.post(f"/models/{model_id}/cancel").status_code == 200
    too_late = stack.api.post(f"/models/{stack.ready_model()}/cancel")
    assert too_late.status_code == 409
    assert "is ready, it cannot be cancelled" in too_late.json()["detail"]
    refused = stack.api.post("/generate", json={"model": model_id})
    assert refused.json()["type"] == "urn:fineserve:problem:model-cancelled"


def test_delete_removes_the_model_and_its_artifacts(stack: Stack) -> None:
    model_id = stack.ready_model()
    store = stack.runtime.settings.resolved_store_dir
    assert (store / "models" / model_id).exists()
    assert stack.api.delete(f"/models/{model_id}").status_code == 204
    assert stack.api.delete(f"/models/{model_id}").status_code == 204
    assert not (store / "models" / model_id).exists()
    assert stack.api.get(f"/models/{model_id}").json()["status"] == "deleted"
    assert stack.api.get("/models").json()["models"] == []
    refused = stack.api.post("/generate", json={"model": model_id})
    assert refused.status_code == 410


def test_an_unknown_model_is_not_found(stack: Stack) -> None:
    for answer in (
        stack.api.get("/models/m-none"),
        stack.api.delete("/models/m-none"),
        stack.api.get("/models/m-none/events"),
        stack.api.post("/generate", json={"model": "m-none"}),
        stack.api.get("/nothing/here"),
    ):
        assert answer.status_code == 404
        assert answer.json()["type"] == "urn:fineserve:problem:not-found"


def test_events_are_replayed_from_the_first_to_the_last(stack: Stack) -> None:
    model_id = stack.ready_model()
    lines = stack.api.get(f"/models/{model_id}/events").text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    assert names[0] == "status"
    assert data[0]["status"] == "queued"
    assert data[-1]["status"] == "ready"
    assert names.count("verified") == 1
    progress = [d for d, name in zip(data, names, strict=True) if name == "progress"]
    assert progress[-1]["step"] == 4
    assert progress[-1]["loss"] > 0
    resumed = stack.api.get(f"/models/{model_id}/events", headers={"Last-Event-ID": ids[-2]})
    assert resumed.text.count("event: ") == 1


def test_a_model_of_a_failed_build_tells_why(stack: Stack) -> None:
    record = queued_model(family="gone")
    stack.runtime.repository.models.create(record)
    build(stack.runtime, record.id)
    answer = stack.api.post("/generate", json={"model": record.id})
    assert answer.status_code == 409
    assert "no family 'gone'" in answer.json()["detail"]


def test_a_refined_model_is_planned_with_its_weights_written_out(stack: Stack) -> None:
    body = {"max_mem_gb": 1, "refine": {"max_seconds": 60}}
    model = stack.api.post("/models", json=body).json()
    assert model["refine"] == {"max_seconds": 60, "stopped": False}
    assert (model["plan"]["mode"], model["budget"]["mode"]) == ("materialised", "materialised")
    refused = stack.api.post("/models", json={**body, "mode": "factored"})
    assert refused.status_code == 422
    assert "a refined model has no factors: leave mode out" in refused.text
    for seconds in (0, 86_401, 1.5):
        answer = stack.api.post("/models", json={**body, "refine": {"max_seconds": seconds}})
        assert answer.status_code == 422


def test_to_cancel_a_refinement_is_to_keep_what_it_has(stack: Stack) -> None:
    body = {"max_mem_gb": 1, "refine": {"max_seconds": 60}}
    model_id = stack.api.post("/models", json=body).json()["id"]
    models = stack.runtime.repository.models
    for status in ("assembling", "retraining", "verifying"):
        models.change(model_id, status=status)
    models.change(model_id, status="refining", measured=A_COST)
    for status in ("refining", "assembling"):  # when it gave way, or its worker died
        models.change(model_id, status=status)
        model = stack.api.post(f"/models/{model_id}/cancel").json()
        assert (model["status"], model["refine"]["stopped"]) == (status, True)


def test_a_model_that_is_to_be_refined_can_be_cancelled_before(stack: Stack) -> None:
    body = {"max_mem_gb": 1, "refine": {"max_seconds": 60}}
    model_id = stack.api.post("/models", json=body).json()["id"]
    assert stack.api.post(f"/models/{model_id}/cancel").json()["status"] == "cancelled"
