"""`fineserve keys …`, and the other commands with a key."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fineserve.cli.main import cli
from registry.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def here(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FINESERVE_VAR_DIR", str(settings.var_dir))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def made(*options: str) -> dict[str, str]:
    result = run("keys", "create", "--owner", "team", "--scope", "deploy", "--json", *options)
    assert result.exit_code == 0, result.output
    answer: dict[str, str] = json.loads(result.stdout)
    return answer


def test_a_key_is_shown_once_listed_and_revoked() -> None:
    key = made("--days", "1", "--requests-per-minute", "60", "--max-active", "2")
    told = run("keys", "create", "--owner", "team", "--scope", "admin", "--scope", "generate")
    assert "export FINESERVE_API_KEY=fsk-" in told.stdout
    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [entry["scopes"] for entry in listed] == [["deploy"], ["admin", "generate"]]
    assert listed[0]["state"] == "valid"
    assert key["key"] not in run("keys", "list").stdout
    assert "sha256" not in listed[0]
    assert run("keys", "revoke", key["id"]).exit_code == 0
    assert "revoked" in run("keys", "list").stdout
    unknown = run("keys", "revoke", "k-0")
    assert unknown.exit_code == 1
    assert "fineserve keys list" in unknown.stderr


def test_commands_send_the_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = made()["key"]
    refused = run("models", "list", "--url", url)
    assert refused.exit_code == 1
    assert "needs an API key" in refused.stderr
    monkeypatch.setenv("FINESERVE_API_KEY", key)
    get_settings.cache_clear()
    assert run("models", "list", "--json", "--url", url).stdout.strip() == "[]"


def test_a_broken_file_is_named(settings: Settings) -> None:
    made()
    file: Path = settings.resolved_keys_file
    file.write_text("{")
    broken = run("keys", "list")
    assert broken.exit_code == 1
    assert str(file) in broken.stderr
