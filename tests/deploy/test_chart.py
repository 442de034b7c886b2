"""The chart as helm renders it. It was never applied to a cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE, queue_name
from registry.settings import Settings

HELM = Path(sys.executable).parent.parent / "helm"
CHART = Path(__file__).parent.parent.parent / "deploy" / "chart"
KUBERNETES = "1.35"
GIVEN = {
    "redis": {"secret": "redis"},
    "store": {
        "url": "s3://bucket/folder",
        "secret": "bucket",
        "environment": {"AWS_REGION": "eu-central-1"},
    },
    "keys": {"secret": "keys"},
    "settings": {"image_ttl_seconds": 3600, "log_format": "json"},
}
EVERYTHING = {
    **GIVEN,
    "metrics": {"annotations": True, "podMonitor": True},
    "keda": {"enabled": True, "address": "redis:6379", "secret": "redis-password"},
    "workers": [
        {
            "name": name,
            "deviceClass": device_class,
            "build": {"replicas": 1},
            "sample": {"replicas": 2},
            "resources": {"limits": {"nvidia.com/gpu": 1}},
            "nodeSelector": {"gpu": name},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        }
        for name, device_class in (("large", "nvidia-h200"), ("small", "nvidia-l4"))
    ],
}


def helm(*words: str, values: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    command = [HELM, *words, "--values", "-"]
    return subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, check=False
    )


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    done = helm("template", "try", str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def containers(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] == "Deployment":
            yield from each["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("values", [GIVEN, EVERYTHING], ids=["least", "everything"])
def test_kubernetes_would_take_it(values: dict[str, Any]) -> None:
    assert helm("lint", str(CHART), values=values).returncode == 0
    objects = rendered(values)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    for each in objects:
        if "." not in each["apiVersion"].partition("/")[0] or "k8s.io" in each["apiVersion"]:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_a_deployment_for_each_queue_of_each_class_of_device() -> None:
    kinds = [
        each["metadata"]["name"] for each in rendered(EVERYTHING) if each["kind"] == "Deployment"
    ]
    assert sorted(kinds) == [
        "try-build-large",
        "try-build-small",
        "try-sample-large",
        "try-sample-small",
        "try-service",
    ]


def test_every_variable_is_a_setting() -> None:
    known = {f"FINESERVE_{name.upper()}" for name in Settings.model_fields}
    for container in containers(rendered(EVERYTHING)):
        given = {each["name"] for each in container["env"]}
        assert {name for name in given if name.startswith("FINESERVE_")} <= known
        assert {"FINESERVE_REDIS_URL", "FINESERVE_STORE_URL", "AWS_REGION"} <= given


def test_an_api_that_others_reach_wants_keys() -> None:
    (service,) = (c for c in containers(rendered(GIVEN)) if c["name"] == "service")
    environment = {each["name"]: each.get("value") for each in service["env"]}
    assert environment["FINESERVE_HOST"] == "0.0.0.0"
    assert environment["FINESERVE_REQUIRE_KEYS"] == "true"
    assert "FINESERVE_TRUSTED_NETWORK" not in environment
    mounts = {each["mountPath"]: each for each in service["volumeMounts"]}
    assert mounts["/etc/fineserve"]["readOnly"]
    assert environment["FINESERVE_KEYS_FILE"] == "/etc/fineserve/keys.json"


def test_keda_watches_the_queue_that_there_is() -> None:
    scaled = [each for each in rendered(EVERYTHING) if each["kind"] == "ScaledObject"]
    lists = [each["spec"]["triggers"][0]["metadata"]["listName"] for each in scaled]
    assert lists == [
        queue_name(queue, name)
        for name in ("nvidia-h200", "nvidia-l4")
        for queue in (BUILD_QUEUE, SAMPLE_QUEUE)
    ]
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in scaled]
    deployments = [each for each in rendered(EVERYTHING) if each["kind"] == "Deployment"]
    scaled_ones = [each for each in deployments if "replicas" not in each["spec"]]
    assert targets == [each["metadata"]["name"] for each in scaled_ones]


@pytest.mark.parametrize(("values", "on_demand"), [(GIVEN, "false"), (EVERYTHING, "true")])
def test_every_process_knows_whether_workers_come_on_demand(
    values: dict[str, Any], on_demand: str
) -> None:
    for container in containers(rendered(values)):
        environment = {each["name"]: each.get("value") for each in container["env"]}
        assert environment["FINESERVE_WORKERS_ON_DEMAND"] == on_demand


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({**GIVEN, "redis": {}}, "redis.secret"),
        ({**GIVEN, "store": {}}, "store.url"),
        ({**GIVEN, "keys": {}}, "keys.secret"),
        ({**EVERYTHING, "keda": {"enabled": True}}, "keda.address"),
        ({**GIVEN, "store": {"url": "/var/store"}}, "store/url"),
        ({**GIVEN, "replicas": 3}, "replicas"),
        ({**GIVEN, "settings": {"Image-TTL": 1}}, "Image-TTL"),
    ],
)
def test_what_is_missing_or_mistyped_is_named(values: dict[str, Any], told: str) -> None:
    done = helm("template", "try", str(CHART), values=values)
    assert done.returncode != 0
    assert told in done.stderr
