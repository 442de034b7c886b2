"""Elastic requests by HTTP: a family asked with a deadline, and models that may be stepped down."""

from typing import Any

import pytest

from registry.errors import Refused
from tests.service.conftest import ASYNC, Stack
from tests.support.answers import refused
from worker.sampling.engine import Engine
from worker.sampling.jobs import Elastic, Job


def asked(stack: Stack, **body: object) -> dict[str, Any]:
    content = {"family": "tiny", "deadline_seconds": 60, "num_inference_steps": 2, "n": 2, **body}
    answer = stack.api.post("/generate", json=content)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture
def sampling(stack: Stack, working: None) -> None:
    """A sampling worker is known, and does all that is asked."""
    stack.heartbeat(queue="sample", id="here:2:sample")


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch, sampling: None) -> list[Refused]:
    """The engine refuses as the last of these says, while there are any."""
    refusals = [Refused("others are served first", 7)]

    submit = Engine.submit_elastic

    def submit_elastic(engine: Engine, elastic: Elastic) -> Job:
        if refusals:
            raise refusals[-1]
        return submit(engine, elastic)

    monkeypatch.setattr(Engine, "submit_elastic", submit_elastic)
    return refusals


def test_a_family_is_asked_without_a_model(stack: Stack, sampling: None) -> None:
    answer = asked(stack, class_labels=["star", 0], seed=5, size="auto")
    assert (answer["status"], answer["model"], answer["revision"]) == ("done", "tiny", None)
    assert [image["class_label"] for image in answer["images"]] == [3, 0]
    served = answer["elastic"]
    full = stack.told("/families")["families"][0]["network"]
    assert served["size"] == {"depth": full["depth"], "rank": full["rank"]}
    assert served["quality"] == served["best_quality"] > 0
    assert served["promised_seconds"] == 60
    assert 0 < served["took_seconds"] < 60
    assert 0 < served["foreseen_seconds"] < 60
    assert served["finished_by"] is None
    assert answer["sampling"]["num_inference_steps"] == 2
    again = asked(stack, class_labels=["star", 0], seed=5)
    assert again["images"] == answer["images"]


def test_what_is_too_late_for_the_least_is_told_so(stack: Stack, sampling: None) -> None:
    body = {"family": "tiny", "deadline_seconds": 0.001, "n": 1}
    problem = refused(stack.api.post("/generate", json=body), 422, "allow more")
    assert problem["type"].endswith("infeasible-deadline")


def test_what_is_refused_for_now_says_when_to_try_again(stack: Stack, busy: list[Refused]) -> None:
    body = {"family": "tiny", "deadline_seconds": 5, "n": 1}
    answer = stack.api.post("/generate", json=body)
    refused(answer, 429, "others are served first", "too-busy")
    assert answer.headers["retry-after"] == "7"
    assert stack.told("/status")["failures"] == []  # it is no fault of ours
    openai = {"model": "tiny", "prompt": "star", "deadline_seconds": 5}
    answer = stack.api.post("/v1/images/generations", json=openai)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert "others are served first" in answer.json()["error"]["message"]


def test_what_was_refused_may_be_asked_again_with_its_key(
    stack: Stack, busy: list[Refused]
) -> None:
    """As clients do that heed Retry-After."""
    body = {"family": "tiny", "deadline_seconds": 60, "n": 1, "num_inference_steps": 2}
    key = {"Idempotency-Key": "once"}
    refused(stack.api.post("/generate", json=body, headers=key), 429, kind="too-busy")
    refused(stack.api.post("/generate", json=body, headers=key), 429, kind="too-busy")
    busy.clear()
    made, again = (stack.api.post("/generate", json=body, headers=key) for _ in range(2))
    assert (made.status_code, made.json()["id"]) == (200, again.json()["id"])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "body: send a model's id, or a family and deadline_seconds"),
        ({"family": "tiny"}, "send deadline_seconds"),
        ({"family": "tiny", "model": "m-0123456789abcdef"}, "send a model's id, or a family"),
        ({"model": "m-0123456789abcdef", "size": "auto"}, "a model has its size already"),
        ({"family": "other", "deadline_seconds": 1}, "choose one of tiny"),
        ({"family": "tiny", "deadline_seconds": 0}, "greater than 0"),
        ({"family": "tiny", "deadline_seconds": 1, "min_quality": 1.5}, "less than or equal to 1"),
        (
            {"family": "tiny", "deadline_seconds": 1, "guide": {"depth": 9, "rank": 8}},
            "no size of depth 9",
        ),
    ],
)
def test_contradictions_are_told(
    stack: Stack, sampling: None, body: dict[str, object], told: str
) -> None:
    refused(stack.api.post("/generate", json=body), 422, told)


def test_nobody_samples_from_the_family(stack: Stack) -> None:
    body = {"family": "tiny", "deadline_seconds": 5}
    refused(stack.api.post("/generate", json=body), 503, "no worker samples from the family tiny")


def test_an_elastic_model_serves_itself_while_there_is_time(
    stack: Stack, elastic_model: str, sampling: None
) -> None:
    assert stack.told(f"/models/{elastic_model}")["elastic"] == {"min_quality": 0.01}
    answer = stack.generate(elastic_model, n=2, seed=3).json()
    assert answer["elastic"]["size"]["depth"] == 4
    assert answer["elastic"]["promised_seconds"] is None
    assert answer["revision"] is not None


@pytest.fixture
def elastic_model(stack: Stack) -> str:
    return stack.ready_model(depth=4, elastic={"min_quality": 0.01})


@pytest.fixture
def fixed_model(stack: Stack) -> str:
    return stack.ready_model()


@pytest.fixture
def small_model(stack: Stack) -> str:
    return stack.ready_model(depth=2, elastic={"min_quality": 0.01})


def test_no_model_serves_below_what_a_request_wants(
    stack: Stack, small_model: str, sampling: None
) -> None:
    own = stack.told(f"/models/{small_model}")["plan"]["quality"]
    assert own < 1
    problem = refused(stack.generate(small_model, min_quality=1), 422, kind="infeasible-quality")
    assert problem["best_quality"] == own


def test_a_floor_is_of_elastic_requests(stack: Stack, fixed_model: str, sampling: None) -> None:
    refused(stack.generate(fixed_model, min_quality=0.5), 422, "has one size", "not-elastic")
    late = {"deadline_seconds": 60, "when_late": "smaller"}
    refused(stack.generate(fixed_model, **late), 422, "leave when_late out", "not-elastic")
    assert stack.generate(fixed_model, **{**late, "when_late": "end"}).status_code in (200, 202)


def test_what_cannot_be_elastic(stack: Stack) -> None:
    too_good = stack.deploy(depth=2, elastic={"min_quality": 1})
    refused(too_good, 422, "ask for less", "infeasible-quality")
    refined = stack.deploy(elastic={"min_quality": 0.5}, refine={"max_seconds": 5})
    refused(refined, 422, "no other size knows what a refined model")
    of_a_task = stack.deploy(elastic={"min_quality": 0.5}, task="t-0123456789abcdef")
    refused(of_a_task, 422, "no other size knows")


def test_openai_clients_ask_a_family_with_a_deadline(stack: Stack, sampling: None) -> None:
    body = {"model": "tiny", "prompt": "star", "num_inference_steps": 2}
    answer = stack.api.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert "deadline_seconds" in answer.json()["error"]["message"]
    answer = stack.api.post("/v1/images/generations", json={**body, "deadline_seconds": 60})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1


def test_a_family_is_asked_and_fetched_later(stack: Stack, sampling: None) -> None:
    body = {"family": "tiny", "deadline_seconds": 60, "num_inference_steps": 2}
    accepted = stack.api.post("/generate", json=body, headers=ASYNC)
    assert accepted.status_code == 202
    assert accepted.json()["elastic"] is None
