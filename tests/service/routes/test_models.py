import dataclasses
import json
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from learngenes.measuring.model import Measurement
from tests.service.conftest import Stack
from tests.support.answers import refused
from tests.support.builds import build, verify_here
from tests.support.failures import raising
from tests.support.records import A_COST, queued_model
from worker.build.restore import restore

KEY = {"Idempotency-Key": "abc"}
A_MINUTE = {"max_seconds": 60}
"""A refinement."""


def test_a_budget_becomes_a_queued_model(stack: Stack) -> None:
    answer = stack.deploy()
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
    assert stack.told(answer.headers["location"]) == model


def test_a_model_becomes_ready_with_measured_figures(stack: Stack) -> None:
    model = stack.told(f"/models/{stack.ready_model()}")
    assert (model["status"], model["revision"]) == ("ready", 1)
    assert 0 < model["measured"]["memory_bytes"] <= model["plan"]["predicted"]["memory_bytes"]
    assert model["measured"]["latency_p95_seconds"] > 0
    assert model["measured"].keys() == model["plan"]["predicted"].keys()
    assert model["ready_at"] > model["created_at"]


def test_smaller_budgets_give_smaller_models(stack: Stack) -> None:
    floor = stack.deploy(max_mem_gb=1e-6).json()["nearest_feasible"]["max_mem_gb"]
    sizes = set()
    for budget in (floor, floor * 1.5, 1):
        plan = stack.deploy(max_mem_gb=budget).json()["plan"]
        assert plan["predicted"]["memory_bytes"] <= budget * 1e9
        sizes.add((plan["depth"], plan["rank"], plan["mode"]))
    assert len(sizes) == 3


def test_the_record_repeats_the_whole_request(stack: Stack) -> None:
    fixed = {"depth": 3, "rank": 24, "mode": "factored", "dtype": "int8", "n": 2}
    workload: dict[str, object] = {"num_inference_steps": 3, "guidance_scale": 1.0}
    bounds = {"max_mem_gb": 2.0, "max_latency_ms": 60_000.0, "min_quality": 0.1}
    bounds["latency_percentile"] = 50
    guidance = {"guidance_start": 0.0, "guidance_stop": 0.5, "guide": {"depth": 2, "rank": 8}}
    workload |= {**guidance, "scheduler": "euler"}
    body = {**fixed, **workload, **bounds, "mem_scope": "process"}
    names = {"name": "my model", "family": "tiny", "device_class": stack.runtime.device_class}
    model = stack.deploy(**body, **names).json()
    assert model["budget"] == body
    assert {key: model[key] for key in names} == names
    assert {key: model["plan"][key] for key in fixed} == fixed
    assert model["plan"]["sampling"] == workload


def test_a_model_that_was_made_again_shows_both_figures(stack: Stack) -> None:
    needed = stack.plan(max_mem_gb=4).json()["plan"]["predicted"]["memory_bytes"]
    model_id = stack.make_model(max_mem_gb=needed / 1e9)
    more = iter((needed + 1,))  # the first time

    def measure_more(*args: Any) -> Measurement:
        measurement = verify_here(*args)
        memory_bytes = next(more, measurement.cost.memory_bytes)
        cost = dataclasses.replace(measurement.cost, memory_bytes=memory_bytes)
        return dataclasses.replace(measurement, cost=cost)

    build(stack.runtime, model_id, verify=measure_more)
    model = stack.told(f"/models/{model_id}")
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
        ({"max_mem_gb": None, "max_memory": 4}, "max_memory: Extra inputs are not permitted"),
        ({"max_mem_gb": None}, "send a budget: max_mem_gb, max_latency_ms, or both"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 21}, "over this server's limit"),
        ({"num_inference_steps": 251}, "over this server's limit"),
        ({"name": "<script>"}, "name: String should match pattern"),
        ({"family": "huge"}, "no family 'huge'; choose one of tiny"),
    ],
)
def test_a_bad_request_is_explained(stack: Stack, body: dict[str, Any], message: str) -> None:
    refused(stack.deploy(**body), 422, message)
    assert stack.told("/models")["models"] == []


@pytest.mark.parametrize("raw", [b"", b"{", b'{"max_mem_gb": NaN}', b'{"max_mem_gb": Infinity}'])
def test_a_body_that_is_no_budget_is_refused(stack: Stack, raw: bytes) -> None:
    answer = stack.api.post("/models", content=raw, headers={"content-type": "application/json"})
    assert refused(answer, 422)["title"] == "Invalid request"


@pytest.mark.parametrize("n", [1, 3, 7, 20])
def test_the_suggested_budget_is_feasible(stack: Stack, n: int) -> None:
    problem = refused(stack.deploy(max_mem_gb=1e-6, n=n), 422, kind="infeasible-budget")
    max_mem_gb = problem["nearest_feasible"]["max_mem_gb"]
    assert f"needs max_mem_gb {max_mem_gb:g}; send that" in problem["detail"]
    assert stack.deploy(max_mem_gb=max_mem_gb, n=n).status_code == 202


def test_a_broker_that_is_away_loses_no_model(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("registry.queue.Queue.enqueue", raising(OperationalError("away")))
        model_id = stack.make_model(headers=KEY)
    queue = stack.runtime.queue
    assert queue.length("build", stack.runtime.device_class) == 0
    assert stack.make_model(headers=KEY) == model_id
    assert queue.length("build", stack.runtime.device_class) == 1


@pytest.mark.parametrize("suffix", [":lease", ":events", "0", "*"])
def test_only_an_id_names_a_model(stack: Stack, suffix: str) -> None:
    name = stack.make_model() + suffix
    assert stack.api.get(f"/models/{name}").status_code == 404
    assert stack.generate(name).status_code == 404


def test_the_same_key_makes_one_model(stack: Stack) -> None:
    first, again = (stack.deploy(KEY) for _ in range(2))
    assert first.json() == again.json()
    refused(stack.deploy(KEY, max_mem_gb=3), 422, "use a new key")


def test_the_list_is_paginated(stack: Stack) -> None:
    ids = [stack.make_model() for _ in range(3)]
    first = stack.api.get("/models", params={"limit": 2}).json()
    assert [m["id"] for m in first["models"]] == [ids[2], ids[1]]
    rest = stack.api.get("/models", params={"limit": 2, "offset": first["next_offset"]}).json()
    assert [m["id"] for m in rest["models"]] == [ids[0]]
    assert rest["next_offset"] is None


def test_a_model_can_be_cancelled_until_it_is_ready(stack: Stack) -> None:
    model_id = stack.make_model()
    assert stack.api.post(f"/models/{model_id}/cancel").json()["status"] == "cancelled"
    build(stack.runtime, model_id)
    assert stack.told(f"/models/{model_id}")["status"] == "cancelled"
    assert stack.api.post(f"/models/{model_id}/cancel").status_code == 200
    too_late = stack.api.post(f"/models/{stack.ready_model()}/cancel")
    refused(too_late, 409, "is ready, it cannot be cancelled")
    refused(stack.generate(model_id), 409, kind="model-cancelled")


def test_delete_removes_the_model_and_its_artifacts(stack: Stack) -> None:
    model_id = stack.ready_model()
    store = stack.runtime.settings.resolved_store_dir
    assert (store / "models" / model_id).exists()
    for _ in range(2):
        assert stack.api.delete(f"/models/{model_id}").status_code == 204
    assert not (store / "models" / model_id).exists()
    assert stack.told(f"/models/{model_id}")["status"] == "deleted"
    assert stack.told("/models")["models"] == []
    refused(stack.generate(model_id), 410)


def test_an_unknown_model_is_not_found(stack: Stack) -> None:
    for answer in (
        stack.api.get("/models/m-none"),
        stack.api.delete("/models/m-none"),
        stack.api.get("/models/m-none/events"),
        stack.generate("m-none"),
        stack.api.get("/nothing/here"),
    ):
        refused(answer, 404, kind="not-found")


def test_events_are_replayed_from_the_first_to_the_last(stack: Stack) -> None:
    events = f"/models/{stack.ready_model()}/events"
    fields: dict[str, list[str]] = {}
    for line in filter(None, stack.api.get(events).text.splitlines()):
        name, _, value = line.partition(": ")
        fields.setdefault(name, []).append(value)
    names, data = fields["event"], [json.loads(content) for content in fields["data"]]
    assert names[0] == "status"
    assert data[0]["status"] == "queued"
    assert data[-1]["status"] == "ready"
    assert names.count("verified") == 1
    progress = [d for d, name in zip(data, names, strict=True) if name == "progress"]
    assert progress[-1]["step"] == 4
    assert progress[-1]["loss"] > 0
    resumed = stack.api.get(events, headers={"Last-Event-ID": fields["id"][-2]})
    assert resumed.text.count("event: ") == 1


def test_a_model_of_a_failed_build_tells_why(stack: Stack) -> None:
    record = queued_model(family="gone")
    stack.runtime.repository.models.create(record)
    build(stack.runtime, record.id)
    refused(stack.generate(record.id), 409, "no family 'gone'")


def test_a_refined_model_is_planned_with_its_weights_written_out(stack: Stack) -> None:
    model = stack.deploy(refine=A_MINUTE).json()
    assert model["refine"] == {"max_seconds": 60, "stopped": False}
    assert (model["plan"]["mode"], model["budget"]["mode"]) == ("materialised", "materialised")
    factored = stack.deploy(refine=A_MINUTE, mode="factored")
    refused(factored, 422, "a refined model has no factors: leave mode out")
    for seconds in (0, 86_401, 1.5):
        refused(stack.deploy(refine={"max_seconds": seconds}), 422)


def test_to_cancel_a_refinement_is_to_keep_what_it_has(stack: Stack) -> None:
    model_id = stack.make_model(refine=A_MINUTE)
    models = stack.runtime.repository.models
    for status in ("assembling", "retraining", "verifying"):
        models.change(model_id, status=status)
    models.change(model_id, status="refining", measured=A_COST)
    for status in ("refining", "assembling"):  # when it gave way, or its worker died
        models.change(model_id, status=status)
        model = stack.api.post(f"/models/{model_id}/cancel").json()
        assert (model["status"], model["refine"]["stopped"]) == (status, True)


def test_a_model_that_is_to_be_refined_can_be_cancelled_before(stack: Stack) -> None:
    model_id = stack.make_model(refine=A_MINUTE)
    assert stack.api.post(f"/models/{model_id}/cancel").json()["status"] == "cancelled"


def test_a_record_that_cannot_be_read_is_gone_and_can_be_deleted(stack: Stack) -> None:
    model = stack.ready_model()
    folder = stack.runtime.store.root / "models" / model
    assert folder.exists()
    stack.runtime.repository._redis.set(f"fineserve:model:{model}", "{}")
    refused(stack.api.get(f"/models/{model}"), 410, "delete it", kind="unreadable")
    assert restore(stack.runtime.store, stack.runtime.repository.models) == 0
    assert stack.api.delete(f"/models/{model}").status_code == 204
    refused(stack.api.get(f"/models/{model}"), 404)
    assert not folder.exists()
    assert restore(stack.runtime.store, stack.runtime.repository.models) == 0
