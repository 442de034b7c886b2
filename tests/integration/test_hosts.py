"""Two hosts that share nothing but Redis and a bucket of a real S3 server."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.deployment import FAMILIES, wait
from benchmarks.scale.site import Host, Shared, Site, hosts_can_be, site
from fineserve.wire import ExportFormat

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not hosts_can_be(), reason="hosts of their own need root, and `unshare`"),
]

AWAY_SECONDS = 20
LATER = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with site() as shared:
        yield shared


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    (folder / "fashion").symlink_to(FAMILIES / "fashion")
    return folder


def host(families: Path, shared: Site, **settings: object) -> Host:
    given = {
        "lease_seconds": 3,
        "retraining_steps": 20,
        "profile_seconds": 2,
        "verify_seconds": 1,
        "compile": "false",
        **settings,
    }
    return Host(families, shared.redis, shared.bucket, **given)


@pytest.fixture(scope="module")
def first(families: Path, shared: Site) -> Iterator[Host]:
    with host(families, shared) as first:
        first.up()
        yield first


@pytest.fixture(scope="module")
def second(families: Path, shared: Site, first: Host) -> Iterator[Host]:
    with host(families, shared) as second:
        second.up()
        yield second


@pytest.fixture(scope="module")
def model(first: Host) -> str:
    """A model that is ready."""
    return first.ready_model()


def images(http: httpx.Client, model: str, seed: int = 1) -> list[str]:
    body = {"model": model, "n": 2, "seed": seed, "num_inference_steps": 5}
    answer = http.post("/generate", json=body).raise_for_status()
    return [image["b64_png"] for image in answer.json()["images"]]


def ask(http: httpx.Client, model: str, **more: object) -> str:
    """Id of a generation that nobody waits for."""
    body = {"model": model, "n": 2, "num_inference_steps": 5, **more}
    answer = http.post("/generate", json=body, headers=LATER)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def generation(http: httpx.Client, generation_id: str) -> dict[str, Any]:
    return http.get(f"/generations/{generation_id}").raise_for_status().json()


def finished(http: httpx.Client, generation_id: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        told = generation(http, generation_id)
        return told if told["status"] in ("done", "failed") else None

    return wait(ended, 120)


def ends(first: Host, kind: str, record_id: str) -> int:
    """How often a record was said to have ended."""
    told = [json.loads(each) for each in events(first, kind, record_id)]
    return sum(each.get("status") in ("done", "ready") for each in told)


def events(host: Host, kind: str, record_id: str) -> list[str]:
    text = host.http.get(f"/{kind}/{record_id}/events").text
    return [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]


def test_what_one_host_builds_another_samples_and_exports(first: Host, second: Host) -> None:
    second.control("stop", "build-worker")
    first.control("stop", "sample-worker")
    model = first.ready_model()
    made = images(second.http, model)
    assert images(first.http, model) == made, "either API has what either host makes"
    for host in (first, second):
        exported = host.client.export(model, host.var / "exported", ExportFormat.NATIVE)
        assert [*exported.glob("*.safetensors")]
        assert not (host.var / "store").exists(), "nothing of it is on this disk"
    second.http.get("/families/fashion/previews.png")
    second.control("start", "build-worker")
    first.control("start", "sample-worker")
    second.control("stop", "sample-worker")
    assert images(first.http, model) == made, "nothing was lost with the other host"
    second.control("start", "sample-worker")


@pytest.mark.slow
def test_a_family_that_is_published_on_one_host_is_served_by_the_other(
    first: Host, second: Host, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(FAMILIES / "fashion", other)
    file = other / "family.json"
    file.write_text(file.read_text().replace('"fashion"', '"other"'))
    assert "other is published" in first.run("publish", str(other)).stdout
    first.control("stop", "all")
    try:
        known = lambda: "other" in second.http.get("/status").json()["families"]  # noqa: E731
        wait(known, 60)
        budget = {"family": "other", "max_mem_gb": 4}
        made = wait(lambda: _accepted(second.http.post("/models", json=budget)), 60)
        second.client.wait(made)
        assert len(images(second.http, made)) == 2
    finally:
        first.control("start", "all")


def _accepted(answer: httpx.Response) -> str | None:
    return str(answer.json()["id"]) if answer.is_success else None


@pytest.mark.slow
def test_what_a_host_leaves_undone_another_finishes(first: Host, second: Host, model: str) -> None:
    first.control("stop", "sample-worker", "build-worker")
    sampled = ask(second.http, model, num_inference_steps=120, n=8)
    budget = {"max_mem_gb": 4, "refine": {"max_seconds": 8}}
    refined = second.http.post("/models", json=budget).raise_for_status().json()["id"]
    wait(lambda: generation(second.http, sampled)["status"] == "running", 60)
    for pid in second.pids("-m worker sample"):
        os.kill(pid, signal.SIGKILL)
    second.control("stop", "sample-worker")
    wait(lambda: any("heldout" in each for each in events_so_far(first, refined)), 60)
    second.control("stop", "build-worker")  # its checkpoint goes into the bucket
    first.control("start", "sample-worker", "build-worker")
    assert finished(first.http, sampled)["status"] == "done"
    assert ends(first, "generations", sampled) == 1
    first.client.wait(refined)
    told = [
        each["step"]
        for each in map(json.loads, events(first, "models", refined))
        if "step" in each and each["status"] == "refining"
    ]
    assert told == sorted(told), "it goes on from where the other host was"
    second.control("start", "all")


def events_so_far(host: Host, model: str) -> list[str]:
    with host.redis() as client:
        entries = client.xrange(f"fineserve:model:{model}:events")
    return [fields["data"] for _, fields in entries]


@pytest.mark.slow
def test_a_new_worker_has_work_at_once(first: Host, second: Host, model: str) -> None:
    second.control("stop", "sample-worker")
    asked = [ask(first.http, model, num_inference_steps=50, n=4, seed=i) for i in range(30)]
    second.control("start", "sample-worker")

    def runs_at_both() -> bool:
        workers = first.http.get("/status").json()["workers"]
        running = [w["gauges"].get("engine_running", 0) for w in workers if w["queue"] == "sample"]
        return len(running) == 2 and min(running) > 0

    wait(runs_at_both, 60)
    assert {finished(first.http, each)["status"] for each in asked} == {"done"}
    assert {ends(first, "generations", each) for each in asked} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["redis", "bucket"])
def test_what_is_accepted_outlives_what_hosts_share(
    what: str, first: Host, second: Host, shared: Site, model: str
) -> None:
    away: Shared = getattr(shared, what)
    asked = [ask(first.http, model, seed=i, num_inference_steps=50) for i in range(8)]
    building = first.client.create_model(max_mem_gb=4).id
    with ThreadPoolExecutor(1) as pool, away.out_of_reach():
        meanwhile = pool.submit(
            lambda: first.http.post("/generate", json={"model": model}, headers=LATER)
        )
        time.sleep(AWAY_SECONDS)
    answer = meanwhile.result(timeout=60)
    assert answer.status_code in (202, 503), answer.text
    if answer.status_code == 202:
        asked.append(answer.json()["id"])
    assert {finished(second.http, each)["status"] for each in asked} == {"done"}
    assert {ends(first, "generations", each) for each in asked} == {1}
    first.client.wait(building)
    assert ends(first, "models", building) == 1


def test_doctor_tries_the_bucket_out(first: Host, shared: Site) -> None:
    told = first.run("doctor").stdout
    assert f"{shared.bucket.url} can be written to and read" in told
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(first.environment, "FINESERVE_STORE_URL", "s3://no-such-bucket/fineserve")
        assert "FINESERVE_STORE_URL" in first.run("doctor").stdout
