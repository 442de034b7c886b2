import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fineserve.cli import cli
from fineserve.embedded import Embedded, EmbeddedError, programs, supervisor_config
from registry.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def settings_of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINESERVE_VAR_DIR", str(tmp_path))
    monkeypatch.setattr("fineserve.cli.configure_logging", lambda _: None)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_down_when_nothing_runs() -> None:
    result = CliRunner().invoke(cli, ["down"])
    assert result.exit_code == 0
    assert "fineserve is down" in result.output


def test_logs_when_there_are_none() -> None:
    result = CliRunner().invoke(cli, ["logs"])
    assert result.exit_code == 1
    assert "`make up` first" in result.output


def test_a_taken_port_is_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("FINESERVE_PORT", str(port))
        result = CliRunner().invoke(cli, ["up"])
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in result.output
    assert f"FINESERVE_PORT={port + 1} make up" in result.output


def test_a_path_too_long_for_sockets_is_a_clear_message(tmp_path: Path) -> None:
    settings = Settings(var_dir=tmp_path / ("x" * 100))
    with pytest.raises(EmbeddedError, match="set FINESERVE_VAR_DIR shorter"):
        Embedded(settings).start()


def test_an_outside_redis_needs_no_valkey(tmp_path: Path) -> None:
    inside, outside = Settings(), Settings(redis_url="redis://db")
    assert list(programs(inside)) == ["valkey", "build-worker", "sample-worker", "api"]
    assert list(programs(outside)) == ["build-worker", "sample-worker", "api"]
    assert "--appendonly yes" in supervisor_config(inside)


def test_pretrain_needs_a_configuration() -> None:
    result = CliRunner().invoke(cli, ["pretrain", "missing.toml", "--work", "w", "--family", "f"])
    assert result.exit_code == 2
    assert "does not exist" in result.output
