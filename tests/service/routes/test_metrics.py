"""GET /metrics: what any process has counted, and what is there now."""

import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from registry.settings import Settings
from service import metrics
from service.app import make_app
from tests.service.conftest import LOCAL, Stack

Labels = frozenset[tuple[str, str]]


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has just been counted is told at once."""
    monkeypatch.setattr(metrics, "REST", 0.0)


def scraped(api: TestClient) -> dict[str, dict[Labels, float]]:
    answer = api.get("/metrics")
    assert answer.status_code == 200
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


class Watched:
    """Growth of samples, since tests of one process share their counters."""

    def __init__(self, api: TestClient) -> None:
        self._api, self._before = api, scraped(api)

    def grown(self, name: str, **labels: str) -> float:
        key = frozenset(labels.items())
        return scraped(self._api)[name][key] - self._before.get(name, {}).get(key, 0)


def now(api: TestClient, name: str, **labels: str) -> float:
    return scraped(api)[name][frozenset(labels.items())]


@pytest.fixture
def watched(stack: Stack) -> Watched:
    return Watched(stack.api)


def test_requests_are_counted_by_route_and_not_by_path(stack: Stack, watched: Watched) -> None:
    for number in range(3):
        stack.api.get(f"/models/m-{number:016x}")
    labels = {"handler": "/models/{model_id}", "method": "GET", "status": "4xx"}
    assert watched.grown("fineserve_http_requests_total", **labels) == 3
    assert "m-0000000000000001" not in stack.api.get("/metrics").text


def test_a_build_tells_its_phases_and_how_it_was_predicted(stack: Stack, watched: Watched) -> None:
    stack.ready_model()
    assert watched.grown("fineserve_plans_total", outcome="solved") == 1
    assert watched.grown("fineserve_finished_total", kind="model", outcome="ready") == 1
    assert watched.grown("fineserve_queue_wait_seconds_count", kind="model") == 1
    for phase in ("assembling", "retraining", "verifying"):
        assert watched.grown("fineserve_build_phase_seconds_count", phase=phase) == 1
    for quantity in ("memory_bytes", "process_memory_bytes"):
        ratios = "fineserve_measured_over_predicted_ratio_count"
        assert watched.grown(ratios, quantity=quantity) == 1
    assert watched.grown("fineserve_retraining_heldout_loss_count", when="after") == 1
    assert now(stack.api, "fineserve_models", status="ready") == 1


def test_what_is_known_of_a_device_is_told(stack: Stack) -> None:
    told = {"family": "tiny", "device_class": stack.runtime.device_class}
    assert now(stack.api, "fineserve_profile_estimated", **told) == 0
    assert now(stack.api, "fineserve_profile_age_seconds", **told) > 0
    assert now(stack.api, "fineserve_profile_correction_ratio", **told) == 1


def test_budgets_that_cannot_be_kept_are_counted_apart(stack: Stack, watched: Watched) -> None:
    assert stack.plan(max_mem_gb=1e-6).status_code == 422
    assert watched.grown("fineserve_plans_total", outcome="infeasible") == 1
    assert stack.plan(max_mem_gb=4, depth=999).status_code == 422
    assert watched.grown("fineserve_plans_total", outcome="impossible") == 1


def test_images_and_the_engine(stack: Stack) -> None:
    model = stack.ready_model()
    watched = Watched(stack.api)
    for _ in range(2):
        how = {"num_inference_steps": 3, "guidance_scale": 2}
        generation = stack.queue(model, class_labels=[0, 1], **how)
        assert now(stack.api, "fineserve_active", kind="generation") == 1
        stack.sampler.generate(generation)
    assert now(stack.api, "fineserve_active", kind="generation") == 0
    depth = str(stack.runtime.repository.models.get(model).plan.depth)
    assert watched.grown("fineserve_images_total", depth=depth) == 4
    assert watched.grown("fineserve_finished_total", kind="generation", outcome="done") == 2
    assert watched.grown("fineserve_engine_step_seconds_count") == 6
    assert watched.grown("fineserve_engine_batch_rows_sum") == 2 * 4
    assert watched.grown("fineserve_engine_batch_models_sum") == 2
    assert watched.grown("fineserve_engine_lookups_total", cache="model", outcome="miss") == 1
    assert watched.grown("fineserve_engine_lookups_total", cache="model", outcome="hit") == 1
    assert watched.grown("fineserve_engine_lookups_total", cache="modulations", outcome="miss") == 3
    assert stack.sampler.engine.gauges["engine_models"] == 1


def test_queues_and_the_gauges_of_workers_that_live(stack: Stack) -> None:
    stack.make_model()
    assert now(stack.api, "fineserve_queue_depth", queue="build") == 1
    gauges = {"device_held_bytes": 5e6, "engine_waiting": 2}
    stack.heartbeat(id="host:7:1", queue="sample", gauges=gauges)
    of = {"worker": "host:7", "device_class": stack.runtime.device_class}
    assert now(stack.api, "fineserve_device_held_bytes", **of) == 5e6
    assert now(stack.api, "fineserve_workers", queue="sample") == 1
    stack.heartbeat(seconds=0.001, id="host:7:1", queue="sample", gauges=gauges)
    assert scraped(stack.api).get("fineserve_device_held_bytes", {}) == {}
    assert now(stack.api, "fineserve_workers", queue="sample") == 0


def test_without_redis_there_are_metrics(tmp_path: Path) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/none.sock", var_dir=tmp_path)
    with TestClient(make_app(settings), LOCAL) as api:
        samples = scraped(api)
    assert samples["fineserve_redis_up"] == {frozenset(): 0}
    assert samples["fineserve_store_disk_free_bytes"][frozenset()] > 0
    assert "fineserve_models" not in samples


def test_processes_count_together(tmp_path: Path) -> None:
    count = "from registry.metrics import PLANS; PLANS.labels('solved').inc(2)"
    tell = (
        "from prometheus_client import generate_latest; from registry.metrics import registry;"
        "import sys; sys.stdout.buffer.write(generate_latest(registry()))"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for code in (count, count, tell):
        told = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert 'fineserve_plans_total{outcome="solved"} 4.0' in told


def test_who_scrapes_all_the_time_is_told_the_same(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REST", 1e9)
    monkeypatch.setattr(metrics, "MOST_REST_SECONDS", 60.0)
    stack.api.get("/metrics")
    before = now(stack.api, "fineserve_queue_depth", queue="build")
    stack.make_model()
    assert now(stack.api, "fineserve_queue_depth", queue="build") == before
