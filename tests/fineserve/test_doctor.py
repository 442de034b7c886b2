"""A healthy host, and broken ones."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import redis
import torch
from typer.testing import CliRunner

from fineserve.cli.main import cli
from registry.settings import Settings, get_settings

Findings = dict[str, dict[str, str]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Settings:
    """Everything that a deployment needs, and a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FINESERVE_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("FINESERVE_VAR_DIR", str(settings.var_dir))
    monkeypatch.setenv("FINESERVE_REDIS_URL", settings.resolved_redis_url)
    monkeypatch.setenv("FINESERVE_FAMILIES_DIR", str(settings.families_dir))
    monkeypatch.setattr("registry.logs.configure_logging", lambda _: None)
    get_settings.cache_clear()
    yield settings
    get_settings.cache_clear()


def examined() -> tuple[int, Findings]:
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    findings = json.loads(result.stdout)
    return result.exit_code, {finding["check"]: finding for finding in findings}


def broken(check: str) -> dict[str, str]:
    """The finding of the only check that is broken."""
    code, findings = examined()
    assert code == 1
    assert [f["check"] for f in findings.values() if f["verdict"] == "broken"] == [check]
    assert findings[check]["advice"]
    return findings[check]


def test_a_healthy_host(host: Settings) -> None:
    code, findings = examined()
    assert code == 0, findings
    assert len(findings) == 8
    assert findings["families"]["what"] == "tiny"
    assert findings["broker"]["verdict"] == "ok"
    told = CliRunner().invoke(cli, ["doctor"])
    assert told.exit_code == 0
    assert "✓ families: tiny" in told.stdout


def test_a_taken_port(host: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("FINESERVE_PORT", str(port))
        get_settings.cache_clear()
        finding = broken("port")
    assert f"FINESERVE_PORT={port + 1}" in finding["advice"]


def test_no_redis(host: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_REDIS_URL", "redis://127.0.0.1:1/0")
    get_settings.cache_clear()
    assert "FINESERVE_REDIS_URL" in broken("broker")["advice"]


def test_a_redis_that_would_lose_work(host: Settings, client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert broken("broker")["advice"] == "set maxmemory-policy noeviction in it"
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_full_disk(host: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr("fineserve.doctor.shutil.disk_usage", lambda _: usage)
    assert "FINESERVE_STORE_DIR" in broken("disk")["advice"]


def test_a_corrupt_family(host: Settings) -> None:
    (host.families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    assert "stem.safetensors is corrupt" in broken("families")["what"]


def test_no_family(host: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINESERVE_FAMILIES_DIR", str(tmp_path / "empty"))
    get_settings.cache_clear()
    assert broken("families")["advice"] == "set FINESERVE_FAMILIES_DIR"


def test_a_torch_that_is_too_old(host: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    assert broken("torch")["advice"] == "pip install 'torch>=2.6'"


@pytest.mark.parametrize(
    ("cuda", "advice"),
    [(None, "install a torch that is built for CUDA"), ("12.8", "update the driver")],
)
def test_a_torch_that_cannot_use_the_gpu(
    host: Settings, monkeypatch: pytest.MonkeyPatch, cuda: str | None, advice: str
) -> None:
    monkeypatch.setattr("fineserve.doctor._nvidia_smi", lambda: "535.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert broken("gpu")["advice"].startswith(advice)


def test_a_check_that_breaks_itself_hides_nothing(
    host: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fineserve.doctor._is_fineserve", lambda _: 1 / 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("FINESERVE_PORT", str(taken.getsockname()[1]))
        get_settings.cache_clear()
        assert "ZeroDivisionError" in broken("port")["what"]
