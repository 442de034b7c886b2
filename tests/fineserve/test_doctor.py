"""A healthy host, and broken ones."""

import json
import shutil

import pytest
import redis
import torch

from benchmarks.deployment import free_port
from registry.settings import Settings
from tests.fineserve.conftest import Configure
from tests.support.commands import run

Finding = dict[str, str]


@pytest.fixture(autouse=True)
def host(deployed: Settings, configure: Configure) -> Settings:
    """Everything that a deployment needs, and a free port."""
    configure(port=free_port())
    return deployed


def examined(exit_code: int) -> dict[str, Finding]:
    """Findings by the name of their check."""
    findings = json.loads(run("doctor", "--json", exit_code=exit_code).stdout)
    return {finding["check"]: finding for finding in findings}


def broken(check: str) -> Finding:
    """Finding of the only check that is broken."""
    findings = examined(1)
    assert [f["check"] for f in findings.values() if f["verdict"] == "broken"] == [check]
    assert findings[check]["advice"]
    return findings[check]


def test_on_a_healthy_host_every_check_is_passed() -> None:
    findings = examined(0)
    assert len(findings) == 9
    assert findings["families"]["what"] == "tiny"
    assert findings["broker"]["verdict"] == "ok"
    assert "✓ families: tiny" in run("doctor").stdout


def test_a_taken_port_is_told_with_one_to_try(taken_port: int, configure: Configure) -> None:
    configure(port=taken_port)
    assert f"FINESERVE_PORT={taken_port + 1}" in broken("port")["advice"]


@pytest.mark.parametrize(
    ("setting", "value", "check"),
    [("redis_url", "redis://127.0.0.1:1/0", "broker"), ("families_dir", "/nowhere", "families")],
)
def test_what_is_absent_is_told_with_its_setting(
    configure: Configure, setting: str, value: str, check: str
) -> None:
    configure(**{setting: value})
    assert f"FINESERVE_{setting.upper()}" in broken(check)["advice"]


def test_a_redis_that_would_lose_work_is_told(client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert broken("broker")["advice"] == "set maxmemory-policy noeviction in it"
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_redis_that_cannot_serve_is_told(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise redis.ResponseError("unknown command 'CONFIG'")

    monkeypatch.setattr(redis.Redis, "config_get", unknown)
    assert "noeviction" in examined(0)["broker"]["advice"]
    monkeypatch.setattr(redis.Redis, "info", lambda *_: {"cluster_enabled": 1})
    assert "is a Redis Cluster" in broken("broker")["what"]


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr("fineserve.doctor.shutil.disk_usage", lambda _: usage)
    assert "FINESERVE_STORE_DIR" in broken("disk")["advice"]


def test_a_corrupt_family_is_told(host: Settings) -> None:
    (host.families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    assert "stem.safetensors is corrupt" in broken("families")["what"]


def test_a_torch_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    assert broken("torch")["advice"] == "pip install 'torch>=2.13'"


@pytest.mark.parametrize(
    ("driver", "cuda", "advice"),
    [
        ("535.1", None, "install a torch that is built for CUDA"),
        ("535.1", "13.0", "update the driver to 580 or newer, or install torch from PyTorch's"),
        ("470.2", "13.0", "update the driver to 580 or newer"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, advice: str
) -> None:
    monkeypatch.setattr("fineserve.doctor._nvidia_smi", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert broken("gpu")["advice"].startswith(advice)


def test_a_gpu_that_is_asked_for_and_not_there_is_told(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fineserve.doctor._nvidia_smi", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    configure(device="cuda")
    assert "FINESERVE_DEVICE to auto" in broken("gpu")["advice"]


def test_a_check_that_breaks_itself_hides_nothing(
    taken_port: int, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fineserve.doctor._is_fineserve", lambda _: 1 / 0)
    configure(port=taken_port)
    assert "ZeroDivisionError" in broken("port")["what"]
