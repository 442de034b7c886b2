"""POST /plan: the model that a budget would give, without making it."""

import itertools
import re
from typing import Any

import pytest
import redis
from fastapi.testclient import TestClient

from learngenes.sizing.profile import DeviceProfile, Observation
from tests.service.conftest import Stack
from tests.support.answers import refused
from tests.support.devices import keep_profile

NOTHING_BINDS = {"max_mem_gb": 4}
BUDGETS = [
    NOTHING_BINDS,
    {"max_latency_ms": 60},
    {"max_latency_ms": 60, "latency_percentile": 50},
    {"max_mem_gb": 0.0005},
    {"max_mem_gb": 0.0006, "max_latency_ms": 50, "min_quality": 0.3},
    {"max_mem_gb": 1, "mem_scope": "process", "n": 1, "guidance_scale": 1},
    {"max_mem_gb": 1, "depth": 3, "rank": 24, "mode": "factored", "dtype": "int8"},
]


def needs(plan: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Memory in bytes and latency in seconds, as budgets bound them."""
    return plan["predicted"]["memory_bytes"], plan["predicted"]["latency_p95_seconds"]


def planned(stack: Stack, **body: object) -> dict[str, Any]:
    answer = stack.plan(**body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def front(stack: Stack) -> list[dict[str, dict[str, float]]]:
    return planned(stack, **NOTHING_BINDS)["front"]


def test_a_plan_says_its_cost_and_its_worth(stack: Stack, profile: DeviceProfile) -> None:
    body = planned(stack, **NOTHING_BINDS)
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
def test_a_plan_is_what_a_model_gets(stack: Stack, body: dict[str, object]) -> None:
    model = stack.deploy(**{"max_mem_gb": None, **body}).json()
    assert model["plan"] == planned(stack, **body)["plan"]


def test_the_front_holds_nothing_that_another_beats(stack: Stack) -> None:
    sizes = front(stack)
    assert sizes[0] == planned(stack, **NOTHING_BINDS)["plan"]
    assert len(sizes) > 3
    for better, worse in itertools.combinations(sizes, 2):
        assert better["quality"] >= worse["quality"]
        assert any(less < more for less, more in zip(needs(worse), needs(better), strict=True))


def test_the_best_of_the_front_within_the_budget_is_the_plan(stack: Stack) -> None:
    sizes = front(stack)
    for wanted in sizes:
        memory, latency = needs(wanted)
        body = planned(stack, max_mem_gb=memory / 1e9, max_latency_ms=latency * 1000 + 1e-6)
        fitting = [size for size in sizes if needs(size)[0] <= memory]
        best = next(size for size in fitting if needs(size)[1] <= latency + 1e-9)
        assert body["plan"] == best


def test_a_latency_holds_for_the_percentile_that_is_asked_for(stack: Stack) -> None:
    tight_ms = stack.plan(max_latency_ms=0.5).json()["nearest_feasible"]["max_latency_ms"]
    by_default, at_95, at_50 = (
        planned(stack, max_latency_ms=tight_ms, **percentile)
        for percentile in ({}, {"latency_percentile": 95}, {"latency_percentile": 50})
    )
    assert by_default == at_95
    assert at_95["plan"]["quality"] < at_50["plan"]["quality"]
    for answer, figure in ((at_95, "latency_p95_seconds"), (at_50, "latency_seconds")):
        left = tight_ms / 1000 - answer["plan"]["predicted"][figure]
        assert answer["slack"]["latency_seconds"] == pytest.approx(left)
        assert left >= 0
    assert at_50["plan"]["predicted"]["latency_p95_seconds"] * 1000 > tight_ms


def test_the_nearest_median_is_a_budget_that_is_kept(stack: Stack) -> None:
    asked = {"max_latency_ms": 0.5, "latency_percentile": 50}
    nearest = refused(stack.plan(**asked), 422)["nearest_feasible"]
    assert nearest["max_latency_ms"] < needs(nearest["plan"])[1] * 1000
    kept = planned(stack, **{**asked, "max_latency_ms": nearest["max_latency_ms"]})["plan"]
    assert kept["predicted"]["latency_seconds"] * 1000 <= nearest["max_latency_ms"]


def test_what_binds_is_named(stack: Stack) -> None:
    best = [needs(size) for size in front(stack) if size["quality"] == 1]
    memory_gb = min(memory for memory, _ in best) / 1e9
    latency_ms = min(latency for _, latency in best) * 1000
    for tight in (["max_mem_gb"], ["max_latency_ms"], ["max_mem_gb", "max_latency_ms"]):
        budgets = {"max_mem_gb": 9 * memory_gb, "max_latency_ms": 9 * latency_ms}
        budgets |= {name: 0.11 * budgets[name] for name in tight}
        body = planned(stack, **budgets)
        assert body["binding"] == tight
        assert body["plan"]["quality"] < 1
        assert body["slack"]["memory_bytes"] >= 0
        assert body["slack"]["latency_seconds"] >= 0


def test_a_larger_budget_is_never_worth_less(stack: Stack) -> None:
    floor = stack.plan(max_mem_gb=1e-6).json()["nearest_feasible"]["max_mem_gb"]
    budgets = (floor * (1 + step / 10) for step in range(20))
    worth = [planned(stack, max_mem_gb=budget)["plan"]["quality"] for budget in budgets]
    assert worth == sorted(worth)
    assert worth[0] < worth[-1]


def test_min_quality_is_kept_or_named(stack: Stack) -> None:
    tight = stack.plan(max_mem_gb=1e-6).json()["nearest_feasible"]["max_mem_gb"]
    worth = planned(stack, max_mem_gb=tight)["plan"]["quality"]
    assert planned(stack, max_mem_gb=tight, min_quality=worth)["plan"]["quality"] == worth
    missed = refused(stack.plan(max_mem_gb=tight, min_quality=1), 422)
    assert missed["binding"] == ["max_mem_gb"]


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
    body = planned(stack, **NOTHING_BINDS, **fixed)
    for plan in (body["plan"], *body["front"]):
        assert {name: plan[name] for name in fixed} == fixed
    assert body["binding"] == []


def test_a_budget_for_the_process_bounds_the_process(stack: Stack, profile: DeviceProfile) -> None:
    best = front(stack)[0]["predicted"]
    assert best["process_memory_bytes"] > profile.process_base_bytes
    budget_gb = (best["process_memory_bytes"] - 1) / 1e9
    model, process = (
        planned(stack, max_mem_gb=budget_gb, mem_scope=scope) for scope in ("model", "process")
    )
    assert model["plan"]["predicted"] == best
    assert process["plan"]["predicted"]["process_memory_bytes"] < best["process_memory_bytes"]
    needed = process["plan"]["predicted"]["process_memory_bytes"]
    assert process["slack"]["memory_bytes"] == round(budget_gb * 1e9) - needed


def test_a_guide_is_smaller_than_every_size_that_is_planned(stack: Stack) -> None:
    body = planned(stack, **NOTHING_BINDS, guide={"depth": 3, "rank": 24})
    for plan in (body["plan"], *body["front"]):
        assert (plan["depth"], plan["rank"]) != (3, 24)
        assert plan["depth"] >= 3
        assert plan["rank"] >= 24
    refused(stack.plan(**NOTHING_BINDS, guide={"depth": 3, "rank": 9}), 422, "its ranks 8, 24, 48")
    refused(stack.plan(**NOTHING_BINDS, guide={"depth": 4, "rank": 48}), 422, "is fixed excludes")


def test_fewer_rows_cost_less(stack: Stack) -> None:
    fixed = {"max_mem_gb": 1, "depth": 4, "rank": 48, "mode": "materialised", "dtype": "float32"}
    whole = needs(planned(stack, **fixed)["plan"])
    for less in ({"n": 1}, {"guidance_scale": 1}):
        fewer = needs(planned(stack, **fixed, **less)["plan"])
        assert all(a < b for a, b in zip(fewer, whole, strict=True))
    shorter = needs(planned(stack, **fixed, num_inference_steps=5)["plan"])
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
    problem = refused(stack.plan(**body, dtype=dtype), 422, kind="infeasible-budget")
    assert problem["binding"] == binding
    relaxed = problem["nearest_feasible"]
    nearest = relaxed.pop("plan")
    assert list(relaxed) == binding
    assert all(f"{name} " in problem["detail"] for name in binding)
    accepted = planned(stack, **{**body, **relaxed}, dtype=dtype)
    assert accepted["plan"]["quality"] >= nearest["quality"]
    assert f"needs {binding[0]} {relaxed[binding[0]]}" in problem["detail"]


WRONG = {
    "min_quality": ("0", "1.01", "NaN"),
    "mem_scope": ('"host"',),
    "n": ("0", "2.5", "true", "1025", "21"),
    "num_inference_steps": ("0", '"25"', "251"),
    "guidance_scale": ("0.5", "Infinity"),
    "depth": ("0", "7", "1e30", "1" + 30 * "0"),
    "rank": ("9", '"48"'),
    "mode": ('"dense"',),
    "dtype": ('"float16"',),
    "latency_percentile": ("99", "0", '"50"', "true", "50"),
    "family": ('"huge"', "1"),
    "device_class": ('"abacus"',),
    "max_latency": ("800",),
    "name": ('"only a model has one"',),
}
WRONG_ALONE = {
    "max_mem_gb": ("0", "-1", "NaN", "Infinity", "-Infinity", '"4"', "1e308", "true", "[4]"),
    "max_latency_ms": ("0", "-1", "NaN", "Infinity", '"800"', "1e308", "false"),
}


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        *((f'{{"{name}": {value}}}', name) for name in WRONG_ALONE for value in WRONG_ALONE[name]),
        *(
            (f'{{"max_mem_gb": 1, "{name}": {value}}}', name)
            for name in WRONG
            for value in WRONG[name]
        ),
        ("", "body"),
        ("{", "JSON"),
        ("[]", "body"),
        ("null", "body"),
        ("{}", "max_mem_gb"),
        ('{"max_mem_gb": null}', "max_mem_gb"),
        ('{"min_quality": 1}', "max_latency_ms"),
        ('{"mem_scope": "process"}', "max_mem_gb"),
        ('{"max_latency_ms": 800, "mem_scope": "process"}', "mem_scope"),
        ('{"max_latency_ms": 800, "latency_percentile": 99}', "latency_percentile"),
        ('{"max_mem_gb": 1, "mode": "materialised", "dtype": "int3"}', "int3"),
        ('{"max_mem_gb": 4, "family": "\\ud800"}', "family"),
        ('{"max_mem_gb": 4, "device_class": "\\ud800"}', "device_class"),
        ('{"max_latency_ms": 5e-324}', "no size fits"),
        ('{"max_latency_ms": 1e-310, "max_mem_gb": 5e-324}', "no size fits"),
    ],
)
def test_a_bad_budget_is_refused_and_the_field_named(stack: Stack, raw: str, field: str) -> None:
    for path in ("/plan",) if field == "name" else ("/plan", "/models"):
        answer = stack.api.post(path, content=raw, headers={"content-type": "application/json"})
        assert re.search(rf"\b{field}\b", refused(answer, 422)["detail"])


def test_whole_numbers_do_for_amounts(stack: Stack) -> None:
    planned(stack, max_mem_gb=4, max_latency_ms=10_000, guidance_scale=2)


@pytest.mark.parametrize("path", ["/plan", "/models"])
def test_without_a_worker_nothing_is_planned(api: TestClient, path: str) -> None:
    refused(api.post(path, json=NOTHING_BINDS), 503, "start a worker", "no-family")


def test_one_of_several_families_is_the_default_or_named(stack: Stack) -> None:
    (tiny,) = stack.runtime.repository.families()
    stack.runtime.repository.announce_family(tiny.model_copy(update={"name": "another"}))
    for answer in (stack.plan(**NOTHING_BINDS), stack.deploy()):
        refused(answer, 422, "say which family: one of another, tiny", "family-needed")
    assert planned(stack, max_mem_gb=4, family="tiny")["family"] == "tiny"
    stack.runtime.settings.default_family = "tiny"
    assert planned(stack, max_mem_gb=4)["family"] == "tiny"


def test_a_family_that_is_not_calibrated_has_no_plans(stack: Stack) -> None:
    (family,) = stack.runtime.repository.families()
    stack.runtime.repository.announce_family(family.model_copy(update={"quality": None}))
    answer = stack.plan(**NOTHING_BINDS)
    refused(answer, 422, "`fineserve calibrate`", "family-not-calibrated")


def test_without_a_build_worker_there_are_plans_but_no_models(stack: Stack) -> None:
    stack.heartbeat(seconds=0.001)
    stack.heartbeat(id="another", queue="sample")
    refused(stack.deploy(), 503, "start one", "no-worker")
    planned(stack, max_mem_gb=4)


def test_a_worker_of_another_family_does_not_count(stack: Stack) -> None:
    stack.heartbeat(families=["huge"])
    refused(stack.deploy(), 503, kind="no-worker")


def test_one_of_two_devices_must_be_named(stack: Stack, profile: DeviceProfile) -> None:
    mine = stack.runtime.device_class
    seen = [Observation(ratio=0.5, overhead_seconds=0.0005, at=profile.measured_at)] * 3
    fast = profile.model_copy(update={"device_class": "a-gpu", "observations": tuple(seen)})
    keep_profile(stack.runtime.repository, fast)
    refused(stack.plan(**NOTHING_BINDS), 422, f"a-gpu, {mine}", "device-class-needed")
    slow, quick = (planned(stack, max_mem_gb=4, device_class=name) for name in (mine, "a-gpu"))
    assert quick["device_class"] == "a-gpu"
    assert needs(quick["plan"])[1] == pytest.approx(needs(slow["plan"])[1] / 2)

    made = stack.deploy().json()
    assert made["device_class"] == mine, "nobody builds on the other one now"
    refused(stack.deploy(device_class="a-gpu"), 422, kind="unknown-device-class")
    stack.heartbeat(id="another", device_class="a-gpu")
    refused(stack.deploy(), 422, kind="device-class-needed")
    assert stack.deploy(device_class="a-gpu").json()["device_class"] == "a-gpu"
    assert stack.runtime.queue.length("build", "a-gpu") == 1


def test_an_unknown_device_is_told_the_known_ones(stack: Stack) -> None:
    answer = stack.plan(max_mem_gb=4, device_class="abacus")
    problem = refused(answer, 422, kind="unknown-device-class")
    assert problem["detail"].endswith(f"choose one of {stack.runtime.device_class}")


def test_until_there_is_a_profile_nothing_is_planned(stack: Stack, client: redis.Redis) -> None:
    client.flushall()
    stack.runtime.announce_families()
    refused(stack.plan(**NOTHING_BINDS), 503, "retry then", "no-profile")
    stack.heartbeat()
    for answer in (stack.plan(**NOTHING_BINDS), stack.deploy()):
        refused(answer, 503, "retry then", "no-profile")


@pytest.mark.parametrize("change", [{"family_fingerprint": "another"}, {"version": 0}])
def test_a_profile_of_another_family_or_release_is_stale(
    stack: Stack, profile: DeviceProfile, change: dict[str, object]
) -> None:
    keep_profile(stack.runtime.repository, profile.model_copy(update=change))
    for answer in (stack.plan(**NOTHING_BINDS), stack.deploy()):
        refused(answer, 503, "`fineserve profile`", "stale-profile")


def test_a_profile_of_another_torch_than_the_workers_is_stale(stack: Stack) -> None:
    stack.heartbeat(torch_version="1.0")
    refused(stack.deploy(), 503, kind="stale-profile")


def test_a_profile_that_cannot_be_read_is_stale(stack: Stack) -> None:
    stack.runtime.repository.change_profile(stack.runtime.device_class, "tiny", lambda _: "{")
    refused(stack.plan(**NOTHING_BINDS), 503, kind="stale-profile")
