from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.settings import Settings, get_settings


def test_the_embedded_valkey_is_the_default(tmp_path: Path) -> None:
    settings = Settings(var_dir=tmp_path)
    assert settings.resolved_redis_url == f"unix://{tmp_path}/valkey.sock"
    assert settings.redis_address.for_kombu.startswith(f"redis+socket://{tmp_path}/valkey.sock?")
    assert settings.resolved_store_dir == tmp_path / "store"


def test_an_outside_redis_is_used_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_REDIS_URL", "redis://db:6379/1")
    settings = Settings()
    assert settings.resolved_redis_url == "redis://db:6379/1"
    assert settings.redis_address.for_kombu == "redis://db:6379/1"


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "API_KEY", "PORT", "KEYS_FILE", "DEVICE_MEM_GB"):
        monkeypatch.setenv(f"FINESERVE_{name}", "")
    settings = Settings()
    assert (settings.redis_url, settings.api_key, settings.port) == (None, None, 8000)
    assert (settings.keys_file, settings.device_mem_gb) == (None, None)


def test_names_of_hosts_are_written_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_ALLOWED_HOSTS", " Fine.Example. ,, other")
    assert Settings().allowed_host_names == {"fine.example", "other"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALLOWED_HOSTS", "https://fine.example", "is no host's name"),
        ("ALLOWED_HOSTS", "fine.example:8000", "is no host's name"),
        ("TRUSTED_PROXIES", "proxy", "'proxy' does not appear to be an IPv4 or IPv6 network"),
        ("REDIS_URL", "http://h", "has to begin with redis://"),
        ("PORT", "70000", "less than or equal to 65535"),
    ],
)
def test_a_setting_that_cannot_be_ends_a_process_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(f"FINESERVE_{name}", value)
    with pytest.raises(SystemExit):
        get_settings.__wrapped__()
    told = capsys.readouterr().err
    assert told.startswith(f"FINESERVE_{name}: ")
    assert message in told
    assert told.count("\n") == 1


def test_a_bad_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_PORT", "70000")
    with pytest.raises(ValidationError, match="port"):
        Settings()
