from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.settings import Settings


def test_the_embedded_valkey_is_the_default(tmp_path: Path) -> None:
    settings = Settings(var_dir=tmp_path)
    assert settings.resolved_redis_url == f"unix://{tmp_path}/valkey.sock"
    assert settings.broker_url == f"redis+socket://{tmp_path}/valkey.sock"
    assert settings.resolved_store_dir == tmp_path / "store"


def test_an_outside_redis_is_used_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_REDIS_URL", "redis://db:6379/1")
    settings = Settings()
    assert settings.resolved_redis_url == settings.broker_url == "redis://db:6379/1"


def test_a_bad_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_PORT", "70000")
    with pytest.raises(ValidationError, match="port"):
        Settings()
