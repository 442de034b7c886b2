"""POST /plan: what a budget would give, without making it."""

import itertools
import json
import re

import pytest
import redis
from fastapi.testclient import TestClient

from learngenes.sizing.profile import DeviceProfile
from tests.service.conftest import Stack
from tests.support.devices import keep_profile

NOTHING_BINDS = {"max_mem_gb": 4}
BUDGETS = [
    NOTHING_BINDS,
    {"max_latency_ms": 60},
    {"max_mem_gb": 0.0005},
    {"max_mem_gb": 0.0006, "max_latency_ms": 50, "min_quality": 0.3},
    {"max_mem_gb": 1, "mem_scope": "process", "n": 1, "guidance_scale": 1},
    {"max_mem_gb": 1, "depth": 3, "rank": 24, "mode": "factored", "dtype": "int8"},
]


def needs(plan: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Memory and latency, as budgets bound them."""
    return plan["predicted"]["memory_bytes"], plan["predicted"]["latency_p95_seconds"]


def front(stack: Stack) -> list[dict[str, dict[str, float]]]:
    return stack.plan(**NOTHING_BINDS).json()["front"]


def test_a_plan_says_what_it_costs_and_what_it_is_worth(
    stack: Stack, profile: DeviceProfile
) -> None:
    answer = stack.plan(**NOTHING_BINDS)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["family"], body["device_class"]) == ("tiny", stack.runtime.device_class)
    assert body["profiled_at"] == profile.model_dump(mode="json")["measured_at"]
    plan = body["plan"]
    assert (plan["depth"], plan["rank"], plan["dtype"], plan["n"]) == (4, 48, "float32", 4)
    assert plan["quality"] == 1
    assert 0 < plan["predicted"]["latency_seconds"] < plan["predicted"]["latency_p95_seconds"]
    assert body["binding"] == []
    left = 4e9 - plan["predicted"]["memory_bytes"]
    assert body["slack"] == {"memory_bytes": left, "latency_seconds": None}


def test_a_plan_makes_nothing(stack: Stack) -> None:
    stack.plan(**NOTHING_BINDS)
    assert stack.runtime.repository.models.page(0, 10).items == []
    assert stack.runtime.queue.length("build", stack.runtime.device_class) == 0


@pytest.mark.parametrize("body", BUDGETS, ids=str)
def test_it_is_the_plan_that_a_model_gets(stack: Stack, body: dict[str, object]) -> None:
    answer = stack.plan(**body)
    assert answer.status_code == 200, answer.text
    assert stack.api.post("/models", json=body).json()["plan"] == answer.json()["plan"]


def test_the_front_holds_nothing_that_another_beats(stack: Stack) -> None:
    sizes = front(stack)
    assert sizes[0] == stack.plan(**NOTHING_BINDS).json()["plan"]
    assert len(sizes) > 3
    for better, worse in itertools.combinations(sizes, 2):
        assert better["quality"] >= worse["quality"]
        assert any(less < more for less, more in zip(needs(worse), needs(better), strict=True))


def test_the_best_of_the_front_within_the_budget_is_the_plan(stack: Stack) -> None:
    sizes = front(stack)
    for wanted in sizes:
        memory, latency = needs(wanted)
        answer = stack.plan(max_mem_gb=memory / 1e9, max_latency_ms=latency * 1000 + 1e-6)
        fitting = [size for size in sizes if needs(size)[0] <= memory]
        best = next(size for size in fitting if needs(size)[1] <= latency + 1e-9)
        assert answer.json()["plan"] == best


def test_what_binds_is_named(stack: Stack) -> None:
    best = [needs(size) for size in front(stack) if size["quality"] == 1]
    memory_gb = min(memory for memory, _ in best) / 1e9
    latency_ms = min(latency for _, latency in best) * 1000
    for tight in (["max_mem_gb"], ["max_latency_ms"], ["max_mem_gb", "max_latency_ms"]):
        budgets = {"max_mem_gb": 9 * memory_gb, "max_latency_ms": 9 * latency_ms}
        budgets |= {name: 0.11 * budgets[name] for name in tight}
        body = stack.plan(**budgets).json()
        assert body["binding"] == tight
        assert body["plan"]["quality"] < 1
        assert body["slack"]["memory_bytes"] >= 0
        assert body["slack"]["latency_seconds"] >= 0


def test_a_larger_budget_is_never_worth_less(stack: Stack) -> None:
    floor = stack.plan(max_mem_gb=1e-6).json()["nearest_feasible"]["max_mem_gb"]
    worth = [
        stack.plan(max_mem_gb=floor * (1 + step / 10)).json()["plan"]["quality"]
        for step in range(20)
    ]
    assert worth == sorted(worth)
    assert worth[0] < worth[-1]


def test_min_quality_is_kept_or_named(stack: Stack) -> None:
    tight = stack.plan(max_mem_gb=1e-6).json()["nearest_feasible"]["max_mem_gb"]
    worth = stack.plan(max_mem_gb=tight).json()["plan"]["quality"]
    kept = stack.plan(max_mem_gb=tight, min_quality=worth)
    assert kept.json()["plan"]["quality"] == worth
    missed = stack.plan(max_mem_gb=tight, min_quality=1)
    assert missed.status_code == 422
    assert missed.json()["binding"] == ["max_mem_gb"]


@pytest.mark.parametrize(
    "fixed",
    [
        {"depth": 3},
        {"rank": 8},
        {"mode": "factored"},
        {"dtype": "bfloat16"},
        {"depth": 2, "rank": 24, "mode": "factored", "dtype": "int8"},
    ],
    ids=str,
)
def test_what_is_fixed_is_kept(stack: Stack, fixed: dict[str, object]) -> None:
    body = stack.plan(**NOTHING_BINDS, **fixed).json()
    for plan in (body["plan"], *body["front"]):
        assert {name: plan[name] for name in fixed} == fixed
    assert body["binding"] == []


def test_a_budget_for_the_process_bounds_the_process(stack: Stack, profile: DeviceProfile) -> None:
    best = front(stack)[0]["predicted"]
    assert best["process_memory_bytes"] > profile.process_base_bytes
    budget_gb = (best["process_memory_bytes"] - 1) / 1e9
    model, process = (
        stack.plan(max_mem_gb=budget_gb, mem_scope=scope).json() for scope in ("model", "process")
    )
    assert model["plan"]["predicted"] == best
    assert process["plan"]["predicted"]["process_memory_bytes"] < best["process_memory_bytes"]
    needed = process["plan"]["predicted"]["process_memory_bytes"]
    assert process["slack"]["memory_bytes"] == round(budget_gb * 1e9) - needed


def test_fewer_rows_cost_less(stack: Stack) -> None:
    fixed = {"max_mem_gb": 1, "depth": 4, "rank": 48, "mode": "materialised", "dtype": "float32"}
    whole = needs(stack.plan(**fixed).json()["plan"])
    for less in ({"n": 1}, {"guidance_scale": 1}):
        fewer = needs(stack.plan(**fixed, **less).json()["plan"])
        assert fewer[0] < whole[0]
        assert fewer[1] < whole[1]
    shorter = needs(stack.plan(**fixed, num_inference_steps=1).json()["plan"])
    assert shorter[0] == whole[0]
    assert shorter[1] < whole[1]


@pytest.mark.parametrize("dtype", [None, "float32", "int8"])
@pytest.mark.parametrize(
    ("body", "binding"),
    [
        ({"max_mem_gb": 1e-6}, ["max_mem_gb"]),
        ({"max_mem_gb": 1e-12}, ["max_mem_gb"]),
        ({"max_mem_gb": 0.001, "mem_scope": "process"}, ["max_mem_gb"]),
        ({"max_latency_ms": 0.5}, ["max_latency_ms"]),
        ({"max_mem_gb": 1, "max_latency_ms": 0.5}, ["max_latency_ms"]),
        ({"max_mem_gb": 1e-6, "max_latency_ms": 0.5}, ["max_mem_gb", "max_latency_ms"]),
        ({"max_mem_gb": 1, "min_quality": 1, "rank": 8}, ["min_quality"]),
        (
            {"max_mem_gb": 1e-6, "max_latency_ms": 0.5, "min_quality": 1, "rank": 8},
            ["max_mem_gb", "max_latency_ms", "min_quality"],
        ),
    ],
    ids=str,
)
def test_an_infeasible_budget_names_what_binds_and_the_nearest_that_is_feasible(
    stack: Stack, body: dict[str, object], binding: list[str], dtype: str | None
) -> None:
    answer = stack.plan(**body, dtype=dtype)
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["type"] == "urn:fineserve:problem:infeasible-budget"
    assert problem["binding"] == binding
    relaxed = problem["nearest_feasible"]
    nearest = relaxed.pop("plan")
    assert list(relaxed) == binding
    assert all(f"{name} " in problem["detail"] for name in binding)
    accepted = stack.plan(**{**body, **relaxed}, dtype=dtype)
    assert accepted.status_code == 200, accepted.text
    plan = accepted.json()["plan"]
    assert plan["quality"] >= nearest["quality"]


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ('{"max_mem_gb": %s}' % value, "max_mem_gb")  # noqa: UP031 - braces
        for value in ("0", "-1", "NaN", "Infinity", "-Infinity", '"4"', "1e308", "true", "[4]")
    ]
    + [
        ('{"max_latency_ms": %s}' % value, "max_latency_ms")  # noqa: UP031
        for value in ("0", "-1", "NaN", "Infinity", '"800"', "1e308", "false")
    ]
    + [
        ('{"max_mem_gb": 1, "%s": %s}' % (name, value), name)  # noqa: UP031
        for name, value in (
            ("min_quality", "0"),
            ("min_quality", "1.01"),
            ("min_quality", "NaN"),
            ("mem_scope", '"host"'),
            ("n", "0"),
            ("n", "2.5"),
            ("n", "true"),
            ("n", "1025"),
            ("n", "21"),
            ("num_inference_steps", "0"),
            ("num_inference_steps", '"25"'),
            ("num_inference_steps", "251"),
            ("guidance_scale", "0.5"),
            ("guidance_scale", "Infinity"),
            ("depth", "0"),
            ("depth", "7"),
            ("depth", "1e30"),
            ("depth", "1" + 30 * "0"),
            ("rank", "9"),
            ("rank", '"48"'),
            ("mode", '"dense"'),
            ("dtype", '"float16"'),
            ("family", '"huge"'),
            ("family", "1"),
            ("device_class", '"abacus"'),
            ("max_latency", "800"),
            ("name", '"only a model has one"'),
        )
    ]
    + [
        ("", "body"),
        ("{", "JSON"),
        ("[]", "body"),
        ("null", "body"),
        ("{}", "max_mem_gb"),
        ('{"max_mem_gb": null}', "max_mem_gb"),
        ('{"min_quality": 1}', "max_latency_ms"),
        ('{"mem_scope": "process"}', "max_mem_gb"),
        ('{"max_latency_ms": 800, "mem_scope": "process"}', "mem_scope"),
        ('{"max_mem_gb": 1, "mode": "materialised", "dtype": "int8"}', "int8"),
    ],
)
def test_a_bad_budget_is_refused_and_the_field_named(stack: Stack, raw: str, field: str) -> None:
    for path in ("/plan", "/models"):
        if path == "/models" and field == "name":
            continue
        answer = stack.api.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert re.search(rf"\b{field}\b", answer.json()["detail"])


def test_whole_numbers_do_for_amounts(stack: Stack) -> None:
    assert stack.plan(max_mem_gb=4, max_latency_ms=10_000, guidance_scale=2).status_code == 200


def refusal(stack: Stack, kind: str, path: str = "/plan", **body: object) -> str:
    """What a request is told that is right in itself."""
    answer = stack.api.post(path, json={"max_mem_gb": 4, **body})
    assert answer.json()["type"] == f"urn:fineserve:problem:{kind}"
    assert answer.status_code in {422, 503}
    assert ("retry-after" in answer.headers) == (answer.status_code == 503)
    return str(answer.json()["detail"])


def test_without_a_family_nothing_is_planned(api: TestClient) -> None:
    answer = api.post("/plan", json={"max_mem_gb": 4})
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:fineserve:problem:no-family"


def test_of_several_families_the_default_is_meant_or_one_must_be_named(stack: Stack) -> None:
    (tiny,) = stack.runtime.repository.families()
    stack.runtime.repository.announce_family(tiny.model_copy(update={"name": "another"}))
    assert "one of another, tiny" in refusal(stack, "family-needed")
    assert stack.plan(max_mem_gb=4, family="tiny").json()["family"] == "tiny"
    stack.api.app.state.fineserve.settings.default_family = "tiny"  # type: ignore[attr-defined]
    assert stack.plan(max_mem_gb=4).json()["family"] == "tiny"


def test_a_family_that_is_not_calibrated_has_no_plans(stack: Stack) -> None:
    (family,) = stack.runtime.repository.families()
    stack.runtime.repository.announce_family(family.model_copy(update={"quality": None}))
    assert "`fineserve calibrate`" in refusal(stack, "family-not-calibrated")


def test_without_a_build_worker_there_are_plans_but_no_models(stack: Stack) -> None:
    stack.heartbeat(seconds=0.001)
    stack.heartbeat(id="another", queue="sample")
    assert "start one" in refusal(stack, "no-worker", "/models")
    assert stack.plan(max_mem_gb=4).status_code == 200


def test_a_worker_of_another_family_does_not_count(stack: Stack) -> None:
    stack.heartbeat(families=["huge"])
    refusal(stack, "no-worker", "/models")


def test_of_two_devices_one_must_be_named(stack: Stack, profile: DeviceProfile) -> None:
    mine = stack.runtime.device_class
    fast = profile.model_copy(update={"device_class": "a-gpu", "speed_correction": 0.1})
    keep_profile(stack.runtime.repository, fast)
    assert f"a-gpu, {mine}" in refusal(stack, "device-class-needed")
    plans = {
        device_class: stack.plan(max_mem_gb=4, device_class=device_class).json()
        for device_class in ("a-gpu", mine)
    }
    assert plans["a-gpu"]["device_class"] == "a-gpu"
    slow, quick = (needs(plans[name]["plan"])[1] for name in (mine, "a-gpu"))
    assert quick == pytest.approx(slow / 10)

    made = stack.api.post("/models", json={"max_mem_gb": 4})
    assert made.json()["device_class"] == mine, "nobody builds on the other one now"
    refusal(stack, "unknown-device-class", "/models", device_class="a-gpu")
    stack.heartbeat(id="another", device_class="a-gpu")
    refusal(stack, "device-class-needed", "/models")
    made = stack.api.post("/models", json={"max_mem_gb": 4, "device_class": "a-gpu"})
    assert made.json()["device_class"] == "a-gpu"
    assert stack.runtime.queue.length("build", "a-gpu") == 1


def test_an_unknown_device_is_told_the_known_ones(stack: Stack) -> None:
    detail = refusal(stack, "unknown-device-class", device_class="abacus")
    assert detail.endswith(f"choose one of {stack.runtime.device_class}")


def test_until_there_is_a_profile_nothing_is_planned(stack: Stack, client: redis.Redis) -> None:
    client.flushall()
    stack.runtime.announce_families()
    assert "retry then" in refusal(stack, "no-profile")
    stack.heartbeat()
    assert "retry then" in refusal(stack, "no-profile")
    refusal(stack, "no-profile", "/models")


@pytest.mark.parametrize("change", [{"family_fingerprint": "another"}, {"version": 0}])
def test_a_profile_of_another_family_or_release_is_stale(
    stack: Stack, profile: DeviceProfile, change: dict[str, object]
) -> None:
    keep_profile(stack.runtime.repository, profile.model_copy(update=change))
    for path in ("/plan", "/models"):
        assert "`fineserve profile`" in refusal(stack, "stale-profile", path)


def test_a_profile_of_another_torch_than_the_workers_is_stale(stack: Stack) -> None:
    stack.heartbeat(torch_version="1.0")
    refusal(stack, "stale-profile", "/models")


def test_a_profile_that_cannot_be_read_is_stale(stack: Stack) -> None:
    stack.runtime.repository.change_profile(stack.runtime.device_class, "tiny", lambda _: "{")
    refusal(stack, "stale-profile")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_mem_gb": 4, "family": "\ud800"}, "family"),
        ({"max_mem_gb": 4, "device_class": "\ud800"}, "device_class"),
        ({"max_latency_ms": 5e-324}, "no size fits"),
        ({"max_latency_ms": 1e-310, "max_mem_gb": 5e-324}, "no size fits"),
    ],
)
@pytest.mark.parametrize("path", ["/plan", "/models"])
def test_the_oddest_input_is_refused_and_named(
    stack: Stack, path: str, body: dict[str, object], message: str
) -> None:
    answer = stack.api.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_the_refusal_says_the_same_budget_as_its_members(stack: Stack) -> None:
    answer = stack.plan(max_mem_gb=1e-6).json()
    assert f"needs max_mem_gb {answer['nearest_feasible']['max_mem_gb']};" in answer["detail"]
