"""Promises of the compose files; `make compose-test` runs them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


class Loader(yaml.SafeLoader):
    """Loader that knows Compose's tag for taking something away."""


Loader.add_constructor("!reset", lambda loader, node: "reset")


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


def test_no_gpu_is_reserved_on_a_host_without_one() -> None:
    without = load("docker/cpu.yml")
    started = [name for name in RESERVING if "profiles" not in SERVICES[name]]
    assert {name: {"deploy": "reset"} for name in started} == without


def test_images_contain_no_more_than_what_runs() -> None:
    listed = (ROOT / ".dockerignore").read_text().split()
    assert listed[0] == "*"
    assert "!tests" not in listed
