"""`fineserve keys …`, and the other commands with a key."""

import json

import pytest

from registry.settings import Settings
from tests.fineserve.conftest import Configure
from tests.support.commands import run

pytestmark = pytest.mark.usefixtures("configure")


def made(*options: str) -> dict[str, str]:
    words = ("keys", "create", "--owner", "team", "--scope", "deploy", "--json", *options)
    return json.loads(run(*words).stdout)


def test_a_key_is_shown_once_listed_and_revoked() -> None:
    key = made("--days", "1", "--requests-per-minute", "60", "--max-active", "2")
    told = run("keys", "create", "--owner", "team", "--scope", "admin", "--scope", "generate")
    assert "export FINESERVE_API_KEY=fsk-" in told.stdout
    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [entry["scopes"] for entry in listed] == [["deploy"], ["admin", "generate"]]
    assert listed[0]["state"] == "valid"
    assert key["key"] not in run("keys", "list").stdout
    assert "sha256" not in listed[0]
    run("keys", "revoke", key["id"])
    assert "revoked" in run("keys", "list").stdout
    assert "fineserve keys list" in run("keys", "revoke", "k-0", exit_code=1).stderr


def test_commands_send_the_key(url: str, configure: Configure) -> None:
    key = made()["key"]
    assert "needs an API key" in run("models", "list", "--url", url, exit_code=1).stderr
    configure(api_key=key)
    assert run("models", "list", "--json", "--url", url).stdout.strip() == "[]"


def test_a_broken_file_of_keys_is_named(settings: Settings) -> None:
    made()
    file = settings.resolved_keys_file
    file.write_text("{")
    assert str(file) in run("keys", "list", exit_code=1).stderr
