"""What a build does about its budget: it plans again, measures, steps down, gives up."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from pydantic_core import to_json

from learngenes.measuring.model import Measurement
from learngenes.model.factors import Scales
from learngenes.sizing.budget import Budget, Constraints, Cost, Plan
from learngenes.sizing.profile import DeviceProfile
from registry.records import ModelRecord
from registry.store import served_name
from tests.support.builds import build
from tests.support.devices import keep_profile, planned
from tests.support.records import revision_name
from tests.worker.conftest import MakeGeneration, MakeModel, told
from worker.artifacts import load_own
from worker.build.budget import MOST_STEPS_DOWN, budgets_missed, tightened
from worker.build.profiles import stored_profile
from worker.build.restore import restore
from worker.build.stopwatch import Timing
from worker.build.verify import Specimen
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

CHOICE = {"depth", "rank", "mode", "dtype"}
WRITTEN_OUT = {"mode": "materialised", "dtype": "float32"}
"""Fixed, so that only a shallower model is smaller."""


def as_told(of: Plan | Cost) -> object:
    """As it stands in an event."""
    return json.loads(to_json(of))


@dataclass
class Device:
    """In place of verification: models need what `profile` predicts, and some more."""

    runtime: Runtime
    profile: DeviceProfile
    make_model: MakeModel
    more_bytes: int = 0
    times_slower: float = 1.0
    tail_slower: float = 1.0
    """The same of the 95th percentile alone, beside the median."""
    always: Cost | None = None
    disturbed: str = ""
    served: bool = True
    measured: list[Plan] = field(default_factory=list)

    def plan(self, **budget: object) -> Plan:
        """What the service decides by `profile`, for two steps."""
        stated = Budget.model_validate({"num_inference_steps": 2, **budget})
        return planned(self.runtime.family("tiny"), self.profile, stated)

    def verify(self, specimen: Specimen, scales: Scales, _: object) -> Measurement:
        plan = self.plan(**specimen.model_dump(include=CHOICE))
        assert (scales.depth, scales.rank) == (plan.depth, plan.rank)
        self.measured.append(plan)
        predicted = plan.predicted
        needed = Cost(
            memory_bytes=predicted.memory_bytes + self.more_bytes,
            process_memory_bytes=predicted.process_memory_bytes + self.more_bytes,
            latency_seconds=predicted.latency_seconds * self.times_slower,
            latency_p95_seconds=predicted.latency_p95_seconds
            * self.times_slower
            * self.tail_slower,
        )
        self.needed = self.always or needed
        return Measurement(self.needed)

    def time(self, *_: object) -> Timing | None:
        """In place of a stopwatch."""
        if not self.served:
            return None
        median, p95 = self.needed.latency_seconds, self.needed.latency_p95_seconds
        overhead_seconds = self.profile.overhead_seconds * self.times_slower
        return Timing(median, p95, overhead_seconds, self.disturbed)

    def build(self, model: ModelRecord | None = None, **new: Any) -> ModelRecord:
        """Build a model, by default a new one."""
        model = model or self.make_model(**new)
        return build(self.runtime, model.id, verify=self.verify, stopwatch=lambda *_: self)

    def told(self, record: ModelRecord, event: str) -> list[dict[str, object]]:
        return told(self.runtime, record.id, event)


@pytest.fixture
def device(runtime: Runtime, profile: DeviceProfile, make_model: MakeModel) -> Device:
    return Device(runtime, profile, make_model)


def test_a_model_that_keeps_its_budget_is_as_planned(device: Device) -> None:
    plan = device.plan()
    record = device.build(plan=plan)
    assert (record.status, record.revision, record.over_budget) == ("ready", 1, [])
    assert record.plan == plan
    assert record.measured == plan.predicted
    assert device.told(record, "replanned") == []
    (verified,) = device.told(record, "verified")
    assert verified["over_budget"] == []
    assert verified["measured"] == as_told(plan.predicted)


def test_a_model_over_its_memory_is_made_again_smaller(
    sampler: Sampling, make_generation: MakeGeneration, device: Device
) -> None:
    first = device.plan()
    device.more_bytes = 1000
    budget_gb = first.predicted.memory_bytes / 1e9
    record = device.build(plan=first, max_mem_gb=budget_gb, **WRITTEN_OUT)

    assert (record.status, record.revision, record.attempts) == ("ready", 4, 1)
    (tried,) = record.over_budget
    assert tried.plan == first
    assert tried.measured.memory_bytes == first.predicted.memory_bytes + 1000
    assert record.plan.depth == first.depth - 1
    assert record.measured is not None
    assert record.measured.memory_bytes <= first.predicted.memory_bytes
    assert record.measured.memory_bytes == record.plan.predicted.memory_bytes

    verified = device.told(record, "verified")
    assert [event["over_budget"] for event in verified] == [["max_mem_gb"], []]
    assert [event["plan"] for event in verified] == [as_told(first), as_told(record.plan)]
    revisions = [event["revision"] for event in device.told(record, "status")]
    assert list(dict.fromkeys(revisions)) == [None, 0, 3, 4]
    for revision, plan in ((0, first), (3, record.plan), (4, record.plan)):
        name = revision_name(device.runtime.store, record.id, revision)
        scales = load_own(device.runtime.store, device.runtime.family("tiny"), name)
        assert (scales.depth, scales.rank) == (plan.depth, plan.rank)

    images = make_generation(record.id, n=1)
    sampler.generate(images.id)
    sampled = device.runtime.repository.generations.get(images.id)
    assert (sampled.status, sampled.revision) == ("done", 4)


def test_a_model_over_its_latency_is_made_again_faster(device: Device) -> None:
    first = device.plan()
    device.times_slower = 1.05
    budget_ms = first.predicted.latency_p95_seconds * 1000
    record = device.build(plan=first, max_mem_gb=None, max_latency_ms=budget_ms)
    assert (record.status, record.revision) == ("ready", 4)
    assert record.measured is not None
    assert record.measured.latency_p95_seconds * 1000 <= budget_ms
    over, kept = device.told(record, "verified")
    assert (over["over_budget"], kept["over_budget"]) == (["max_latency_ms"], [])


@pytest.mark.parametrize(("percentile", "tried"), [(50, 0), (95, 1)])
def test_a_slow_tail_breaks_no_budget_for_the_median(
    device: Device, percentile: int, tried: int
) -> None:
    first = device.plan()
    device.tail_slower = 1.05
    of = first.predicted.percentile_seconds(percentile)
    latency = {"max_latency_ms": of * 1000, "latency_percentile": percentile}
    record = device.build(plan=first, max_mem_gb=None, **latency)
    assert (record.status, len(record.over_budget)) == ("ready", tried)


def test_a_model_over_its_median_is_made_again_faster(device: Device) -> None:
    first = device.plan()
    device.times_slower, device.tail_slower = 1.05, 0.9
    budget_ms = first.predicted.latency_seconds * 1000
    record = device.build(
        plan=first, max_mem_gb=None, max_latency_ms=budget_ms, latency_percentile=50
    )
    assert (record.status, len(record.over_budget)) == ("ready", 1)
    assert record.measured is not None
    assert record.measured.latency_seconds * 1000 <= budget_ms


def test_a_model_that_nothing_saves_says_which_percentile_was_missed(device: Device) -> None:
    device.always = Cost(1, 1, 8.0, 9.0)
    latency = {"max_latency_ms": 5000, "latency_percentile": 50}
    record = device.build(max_mem_gb=None, **latency)
    assert record.status == "failed"
    assert "8.000 s (50th percentile)" in str(record.error)


def test_a_model_over_both_budgets_is_made_to_keep_both(device: Device) -> None:
    first = device.plan()
    device.more_bytes, device.times_slower = 1000, 1.05
    memory_gb = first.predicted.memory_bytes / 1e9
    latency_ms = first.predicted.latency_p95_seconds * 1000
    record = device.build(plan=first, max_mem_gb=memory_gb, max_latency_ms=latency_ms)
    assert record.status == "ready"
    assert record.measured is not None
    assert record.measured.memory_bytes <= first.predicted.memory_bytes
    assert record.measured.latency_p95_seconds * 1000 <= latency_ms
    over, *_ = device.told(record, "verified")
    assert over["over_budget"] == ["max_mem_gb", "max_latency_ms"]


def test_the_whole_process_counts_when_the_budget_is_for_it(device: Device) -> None:
    first = device.plan()
    device.more_bytes = 1000
    whole = first.predicted.process_memory_bytes
    record = device.build(plan=first, max_mem_gb=whole / 1e9, mem_scope="process")
    assert (record.status, len(record.over_budget)) == ("ready", 1)
    assert record.measured is not None
    assert record.measured.process_memory_bytes <= whole


def test_what_needs_more_than_it_should_is_served_when_it_keeps_the_budget(device: Device) -> None:
    device.more_bytes, device.times_slower = 100_000, 3
    record = device.build(max_mem_gb=1, max_latency_ms=10_000)
    assert (record.status, record.over_budget) == ("ready", [])


def test_it_gives_up_after_so_many_steps_down(device: Device) -> None:
    first = device.plan()
    budget = first.predicted.memory_bytes
    device.always = Cost(budget + 1, budget + 10**8, 0.01, 0.01)
    record = device.build(plan=first, max_mem_gb=budget / 1e9)
    assert (record.status, record.servable) == ("failed", False)
    assert len(record.over_budget) == MOST_STEPS_DOWN
    assert len({plan.constraints for plan in device.measured}) == 4
    assert record.error is not None
    assert record.error.startswith("OverBudget: depth ")
    assert f"was measured at {budget + 1} bytes" in record.error
    assert record.error.endswith("after 3 smaller ones; raise the budget")
    over = [event["over_budget"] for event in device.told(record, "verified")]
    assert over == [["max_mem_gb"]] * 4


def test_it_gives_up_at_once_when_what_is_fixed_leaves_nothing_smaller(device: Device) -> None:
    first = device.plan()
    device.more_bytes = 1000
    fixed = {name: getattr(first, name) for name in CHOICE}
    budget_gb = first.predicted.memory_bytes / 1e9
    record = device.build(plan=first, max_mem_gb=budget_gb, **fixed)
    assert (record.status, record.over_budget) == ("failed", [])
    assert record.error is not None
    assert "no size fits" in record.error
    assert record.error.endswith("raise the budget or fix less")


def test_a_smaller_model_may_have_another_rank(device: Device) -> None:
    """Its Sigma is then the family's again."""
    fixed = {"depth": 4, "mode": "factored", "dtype": "float32"}
    first = device.plan(**fixed, rank=24)
    device.more_bytes = 1000
    record = device.build(plan=first, max_mem_gb=first.predicted.memory_bytes / 1e9, **fixed)
    assert [plan.rank for plan in device.measured] == [24, 8]
    assert (record.status, record.revision) == ("ready", 4)


@pytest.mark.parametrize("killed_at", ["storing revision 3", "verifying it", "publishing"])
def test_a_build_that_dies_after_a_step_down_goes_on_from_there(
    device: Device, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    first = device.plan()
    device.more_bytes = 1000
    budget_gb = first.predicted.memory_bytes / 1e9
    model = device.make_model(plan=first, max_mem_gb=budget_gb, **WRITTEN_OUT)
    put, verify = device.runtime.store.put, device.verify

    def put_or_die(name: str, *args: object) -> None:
        fatal = {"storing revision 3": "/revision-3", "publishing": "/revision-4"}
        if fatal.get(killed_at, "nothing") in name:
            raise redis.ConnectionError("as if the worker had been killed")
        put(name, *args)

    def verify_or_die(*args: object) -> Measurement:
        if killed_at == "verifying it" and device.measured:
            raise redis.ConnectionError("as if the worker had been killed")
        return verify(*args)

    with monkeypatch.context() as patch:
        patch.setattr(device.runtime.store, "put", put_or_die)
        with pytest.raises(redis.ConnectionError):
            build(device.runtime, model.id, verify=verify_or_die)
    halfway = device.runtime.repository.models.get(model.id)
    assert halfway.servable
    stepped_down = killed_at != "storing revision 3"
    if stepped_down:
        assert [tried.plan for tried in halfway.over_budget] == [first]
        assert halfway.revision == 3
    else:  # what is served is still the first plan's, and the record says so
        assert (halfway.plan, halfway.over_budget, halfway.revision) == (first, [], 0)

    record = device.build(model)
    assert (record.status, record.revision, record.attempts) == ("ready", 4, 2)
    assert [tried.plan for tried in record.over_budget] == [first]
    assert not stepped_down or record.plan == halfway.plan
    assert [p.depth for p in device.measured].count(first.depth) == (1 if stepped_down else 2)


def test_what_is_served_is_of_the_plan_though_a_killed_worker_has_stored_another(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised, put = device.plan(), device.runtime.store.put
    budget_gb = promised.predicted.memory_bytes / 1e9
    model = device.make_model(plan=promised, max_mem_gb=budget_gb, **WRITTEN_OUT)

    def put_and_die(*args: Any) -> None:
        put(*args)
        raise redis.ConnectionError("as if the worker had been killed")

    with monkeypatch.context() as patch:
        patch.setattr(device.runtime.store, "put", put_and_die)
        with pytest.raises(redis.ConnectionError):
            build(device.runtime, model.id)
    smaller = device.profile.model_copy(update={"memory_overhead_bytes": 1000})
    keep_profile(device.runtime.repository, smaller)
    device.runtime.stopping.set()
    record = build(device.runtime, model.id)  # until it is retrained
    own = load_own(device.runtime.store, device.runtime.family("tiny"), served_name(record))
    assert record.revision == 0
    assert (own.depth, own.rank) == (record.plan.depth, record.plan.rank)
    assert (own.depth, own.rank) != (promised.depth, promised.rank)


def test_of_two_attempts_the_later_ones_record_comes_back(
    device: Device, monkeypatch: pytest.MonkeyPatch, client: redis.Redis
) -> None:
    first, models = device.plan(), device.runtime.repository.models
    model = device.make_model(
        plan=first, max_mem_gb=first.predicted.memory_bytes / 1e9, **WRITTEN_OUT
    )
    change = models.change

    def change_or_die(model_id: str, **changes: Any) -> ModelRecord:
        if changes.get("status") == "ready":
            raise redis.ConnectionError("as if the worker had been killed")
        return change(model_id, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(models, "change", change_or_die)
        with pytest.raises(redis.ConnectionError):
            device.build(model)
    device.more_bytes = 1000
    record = device.build(model)
    assert (record.status, record.plan == first) == ("ready", False)
    client.flushall()
    assert restore(device.runtime.store, models) == 1
    assert models.get(model.id) == record


def test_a_plan_that_the_device_has_outgrown_is_made_again(device: Device) -> None:
    promised = device.plan()
    learnt = device.profile.model_copy(update={"memory_overhead_bytes": 1000})
    keep_profile(device.runtime.repository, learnt)
    device.profile = learnt
    budget_gb = promised.predicted.memory_bytes / 1e9
    record = device.build(plan=promised, max_mem_gb=budget_gb)
    assert (record.status, record.revision, record.over_budget) == ("ready", 1, [])
    assert record.plan.predicted.memory_bytes <= promised.predicted.memory_bytes
    (replanned,) = device.told(record, "replanned")
    assert replanned["before"] == as_told(promised)
    assert replanned["plan"] == as_told(record.plan)
    assert "profile has changed" in str(replanned["reason"])


def test_a_changed_prediction_of_the_same_size_is_recorded_without_a_word(device: Device) -> None:
    promised = device.plan()
    device.profile = device.profile.model_copy(update={"request_seconds": 2.0})
    keep_profile(device.runtime.repository, device.profile)
    record = device.build(plan=promised)
    assert record.plan == device.plan()
    assert record.plan.predicted.latency_seconds > 2
    assert device.told(record, "replanned") == []


def test_the_profile_learns_from_every_model_that_is_measured(device: Device) -> None:
    device.more_bytes, device.times_slower = 5000, 1.5
    for _ in range(3):
        device.build()
    profile = stored_profile(device.runtime, "tiny")
    assert profile is not None
    assert profile.speed_correction == pytest.approx(1.5, rel=0.1)
    assert profile.memory_overhead_bytes == device.profile.memory_overhead_bytes + 5000
    assert profile.p95_ratio > device.profile.p95_ratio


def test_a_disturbed_measurement_teaches_nothing_and_breaks_no_promise(device: Device) -> None:
    device.disturbed, device.times_slower = "other processes", 9
    latency_ms = device.plan().predicted.latency_p95_seconds * 1000
    record = device.build(max_latency_ms=latency_ms)
    assert (record.status, record.over_budget) == ("ready", [])
    assert record.disturbed == "other processes"
    (verified,) = device.told(record, "verified")
    assert verified["disturbed"] == "other processes"
    learned = stored_profile(device.runtime, "tiny")
    assert learned is not None
    assert (learned.speed_correction, learned.p95_ratio) == (1, device.profile.p95_ratio)


def test_where_nobody_serves_latency_is_not_relied_on(device: Device) -> None:
    device.served = False
    record = device.build()
    assert record.disturbed.startswith("no worker of this device serves the family")


def test_each_budget_is_tightened_by_what_was_missed_and_no_other() -> None:
    limits = Constraints(max_mem_bytes=1000, max_latency_seconds=2.0)
    predicted = Cost(900, 5000, 1.0, 1.6)
    heavy, slow = Cost(1200, 5000, 1.0, 1.9), Cost(990, 5000, 1.0, 3.2)
    assert budgets_missed(limits, predicted) == []
    assert tightened(limits, predicted, predicted, []) == limits
    assert budgets_missed(limits, heavy) == ["max_mem_gb"]
    assert tightened(limits, predicted, heavy, ["max_mem_gb"]) == limits.model_copy(
        update={"max_mem_bytes": 750}
    )
    assert budgets_missed(limits, slow) == ["max_latency_ms"]
    faster = limits.model_copy(update={"max_latency_seconds": 1.0})
    assert tightened(limits, predicted, slow, ["max_latency_ms"]) == faster


def test_a_budget_is_not_loosened_where_more_was_predicted_than_measured() -> None:
    limits = Constraints(max_mem_bytes=1000)
    assert (
        tightened(limits, Cost(1500, 0, 1.0, 1.0), Cost(1100, 0, 1.0, 1.0), ["max_mem_gb"])
        == limits
    )
