"""Promises of the compose files; `make compose-test` runs them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


class Loader(yaml.SafeLoader):
    """Loader that knows Compose's tag for taking something away."""


Loader.add_constructor("!reset", lambda loader, node: "reset")
Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node, deep=True))


def load(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(), Loader)["services"]


SERVICES = load("docker-compose.yml")
OURS = [name for name, service in SERVICES.items() if "build" in service]
RESERVING = [name for name, service in SERVICES.items() if "deploy" in service]


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned(name: str) -> None:
    assert SERVICES[name]["image"].partition(":")[2] not in ("", "latest")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_of_this_host_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", [*OURS, "redis"])
def test_a_process_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["healthcheck"]["test"]


def test_redis_is_for_those_that_need_it_and_know_its_password() -> None:
    assert SERVICES["redis"]["networks"] == ["data"]
    assert "--requirepass ${REDIS_PASSWORD:?" in SERVICES["redis"]["command"]
    inside = {name for name, service in SERVICES.items() if "data" in service.get("networks", [])}
    assert inside == {"redis", *OURS, "worker-sample", "celery-exporter"}
    for name in (*OURS, "worker-sample"):
        assert "://:${REDIS_PASSWORD" in SERVICES[name]["environment"]["FINESERVE_REDIS_URL"]


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_grows_without_an_end(name: str) -> None:
    service = SERVICES[name]
    assert service["pids_limit"]
    assert service["mem_limit"]
    assert service["logging"]["options"]["max-size"]


def test_whoever_needs_redis_waits_for_it() -> None:
    for name in OURS:
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}


def devices(service: dict[str, Any]) -> dict[str, Any]:
    """The one request for devices of a service."""
    (wanted,) = service["deploy"]["resources"]["reservations"]["devices"]
    return dict(wanted)


def test_each_worker_has_a_gpu_by_its_id() -> None:
    """`count: 1` is always the first; an id is a number, a UUID, or that of a MIG slice."""
    for name, variable in (("worker-build", "BUILD"), ("worker-sample", "SAMPLE")):
        ids = [f"${{FINESERVE_{variable}_GPU:-0}}"]
        expected = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
        assert devices(SERVICES[name]) == expected


def test_a_second_gpu_has_a_worker_of_its_own() -> None:
    (second,) = load("docker/two-gpus.yml").values()
    assert second["extends"] == {"file": "../docker-compose.yml", "service": "worker-sample"}
    assert devices(second)["device_ids"] == ["${FINESERVE_SECOND_GPU:-1}"]
    assert "count" not in devices(second)


def test_no_gpu_is_reserved_on_a_host_without_one() -> None:
    without = load("docker/cpu.yml")
    started = [name for name in RESERVING if "profiles" not in SERVICES[name]]
    assert {name: {"deploy": "reset"} for name in started} == without


def test_images_contain_no_more_than_what_runs() -> None:
    listed = (ROOT / ".dockerignore").read_text().split()
    assert listed[0] == "*"
    assert "!tests" not in listed
