"""The embedded default as a user meets it, whose processes are killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import Deployment, wait

pytestmark = pytest.mark.integration


def test_from_a_budget_to_an_image_through_a_killed_worker(deployment: Deployment) -> None:
    up = deployment.run("up")
    assert up.returncode == 0, up.stdout + up.stderr
    assert "curl -s http://127.0.0.1" in up.stdout
    again = deployment.run("up")
    assert again.returncode == 0
    assert len(deployment.pids("-m worker build")) == 1

    def planned() -> dict[str, Any]:
        return deployment.http.post("/plan", json={"max_mem_gb": 4}).json()

    def sampled() -> dict[str, Any]:
        body = {"model": model_id, "n": 5, "seed": 1}
        return deployment.http.post("/generate", json=body).json()

    plan = planned()
    assert plan["plan"]["quality"] == 1
    model_id = deployment.client.create_model(max_mem_gb=4).id
    assert deployment.http.get(f"/models/{model_id}").json()["plan"] == plan["plan"]
    deployment.wait_model(model_id, lambda m: m.status == "retraining")
    assert sampled()["revision"] == 0

    (victim,) = deployment.pids("-m worker build")
    os.kill(victim, signal.SIGKILL)
    assert deployment.client.model(model_id).status == "retraining"
    ready = deployment.client.wait(model_id)
    assert ready.revision == 1
    assert ready.measured is not None
    assert ready.measured.memory_bytes <= ready.plan.predicted.memory_bytes
    events = [json.loads(line) for line in deployment.events(model_id)]
    assert [e.get("status") for e in events].count("ready") == 1
    assert max(e.get("attempts", 0) for e in events) == 2

    one = sampled()
    assert one["revision"] == 1
    assert one["images"] == sampled()["images"]

    (valkey,) = deployment.pids("valkey-server")
    os.kill(valkey, signal.SIGKILL)
    wait(lambda: deployment.pids("valkey-server"))
    wait(deployment.ready)
    assert deployment.client.model(model_id).status == "ready"
    assert planned()["plan"]["depth"] == plan["plan"]["depth"]
    assert sampled()["images"] == one["images"]

    down = deployment.run("down")
    assert down.returncode == 0, down.stderr
    assert deployment.pids() == []


def test_a_corrupt_family_is_named_at_the_start(deployment: Deployment, families_dir: Path) -> None:
    (families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    up = deployment.run("up")
    assert up.returncode == 1
    assert "stem.safetensors is corrupt" in up.stderr
    assert deployment.run("down").returncode == 0
