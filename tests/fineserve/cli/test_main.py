import functools
import json
import os
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fineserve.cli.main import cli
from fineserve.embedded import Embedded, EmbeddedError, programs, supervisor_config
from learngenes.config import NetworkConfig, SizeSpace
from learngenes.family.family import load_family
from learngenes.family.synthetic import write_synthetic_family
from registry.settings import Settings, get_settings
from registry.store import ArtifactStore
from worker.build.profiles import stored_profile
from worker.runtime import Runtime


@pytest.fixture(autouse=True)
def settings_of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINESERVE_VAR_DIR", str(tmp_path))
    monkeypatch.setattr("registry.logs.configure_logging", lambda _: None)
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
    assert "`fineserve up` first" in result.output


def test_a_taken_port_is_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("FINESERVE_PORT", str(port))
        result = CliRunner().invoke(cli, ["up"])
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in result.output
    assert f"FINESERVE_PORT={port + 1} fineserve up" in result.output


def test_a_path_too_long_for_sockets_is_a_clear_message(tmp_path: Path) -> None:
    settings = Settings(var_dir=tmp_path / ("x" * 100))
    with pytest.raises(EmbeddedError, match="set FINESERVE_VAR_DIR shorter"):
        Embedded(settings).start()


def test_an_outside_redis_needs_no_valkey(tmp_path: Path) -> None:
    inside, outside = Settings(), Settings(redis_url="redis://db")
    assert list(programs(inside)) == ["valkey", "build-worker", "sample-worker", "api"]
    assert list(programs(outside)) == ["build-worker", "sample-worker", "api"]
    assert "--appendonly yes" in supervisor_config(inside)


def test_only_what_cannot_begin_is_not_started_again() -> None:
    assert f"exitcodes={os.EX_CONFIG}\n" in supervisor_config(Settings())


def test_pretrain_cannot_go_on_with_what_is_no_family(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path / "work"), "--family", "f", "--start", str(tmp_path)]
    result = CliRunner().invoke(cli, ["pretrain", "families/fashion/config.toml", *words])
    assert result.exit_code == 1
    assert "leave --start out" in result.output


def test_pretrain_needs_a_configuration() -> None:
    result = CliRunner().invoke(cli, ["pretrain", "missing.toml", "--work", "w", "--family", "f"])
    assert result.exit_code == 2
    assert "does not exist" in result.output


@pytest.fixture
def deployed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The commands see the Valkey and the families of this test."""
    monkeypatch.setenv("FINESERVE_REDIS_URL", settings.resolved_redis_url)
    monkeypatch.setenv("FINESERVE_FAMILIES_DIR", str(settings.families_dir))
    monkeypatch.setenv("FINESERVE_PROFILE_SECONDS", "0.5")
    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: 10**8)
    get_settings.cache_clear()
    return settings


def test_profile_measures_this_device_and_keeps_the_result(deployed: Settings) -> None:
    runtime = Runtime.start(deployed)
    steps = runtime.device_class, "tiny", "torch.float32"
    runtime.repository.keep_step_costs(*steps, "{}")
    result = CliRunner().invoke(cli, ["profile"])
    assert result.exit_code == 0, result.output
    assert "tiny on " in result.output
    assert runtime.repository.step_costs(*steps) is None
    profile = stored_profile(runtime, "tiny")
    assert profile is not None
    assert profile.process_base_bytes == 10**8
    assert [family.name for family in runtime.repository.families()] == ["tiny"]


def test_profile_says_which_families_there_are(deployed: Settings) -> None:
    result = CliRunner().invoke(cli, ["profile", "--family", "huge"])
    assert result.exit_code == 1
    assert "no family 'huge'" in result.output


def test_profile_needs_a_calibrated_family(deployed: Settings) -> None:
    manifest = deployed.families_dir / "tiny" / "family.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]["quality.json"]
    manifest.write_text(json.dumps(content))
    result = CliRunner().invoke(cli, ["profile"])
    assert result.exit_code == 1
    assert "`fineserve calibrate` one first" in result.output


def test_profile_needs_redis(deployed: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESERVE_REDIS_URL", f"unix://{deployed.var_dir}/nothing.sock")
    get_settings.cache_clear()
    result = CliRunner().invoke(cli, ["profile"])
    assert result.exit_code == 1
    assert "Redis cannot be reached" in result.output


def test_calibrate_writes_what_sizes_are_worth(families_dir: Path) -> None:
    tiny = families_dir / "tiny"
    before = load_family(tiny).quality
    result = CliRunner().invoke(cli, ["calibrate", str(tiny), "--points", "2", "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "restart its workers" in result.output
    quality = load_family(tiny).quality
    assert quality is not None
    assert quality != before
    assert (quality.depths, quality.ranks) == ((2, 4), (8, 48))
    assert "2 steps" in quality.source


def test_calibrate_names_what_is_corrupt(families_dir: Path) -> None:
    (families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    result = CliRunner().invoke(cli, ["calibrate", str(families_dir / "tiny")])
    assert result.exit_code == 1
    assert "stem.safetensors is corrupt" in result.output


def test_synthesise_writes_a_family_and_no_second_one(
    network: NetworkConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(
        write_synthetic_family, network=network, sizes=SizeSpace(depths=(2, 4), ranks=(8, 48))
    )
    monkeypatch.setattr("learngenes.family.synthetic.write_synthetic_family", small)
    directory = tmp_path / "synthetic" / "small"
    result = CliRunner().invoke(cli, ["synthesise", str(directory)])
    assert result.exit_code == 0, result.output
    assert f"FINESERVE_FAMILIES_DIR={directory.parent} fineserve up" in result.output
    assert load_family(directory).manifest.name == "small"
    again = CliRunner().invoke(cli, ["synthesise", str(directory)])
    assert again.exit_code == 1
    assert "exists; choose another name" in again.output


def test_gc_deletes_what_can_be_made_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    names = ("generations/g-1", "exports/m-1/revision-1", "models/m-1/revision-1")
    for name in names:
        store.put(name, {"a": b"1"}, {})
    for options in ([], ["--older-than-hours", "0"]):  # they may be about to be read
        kept = CliRunner().invoke(cli, ["gc", *options])
        assert (kept.exit_code, kept.stdout) == (0, "0 deleted\n")
    an_hour_ago = time.time() - 3600
    for name in names:
        os.utime(store.root / name, (an_hour_ago, an_hour_ago))
    swept = CliRunner().invoke(cli, ["gc", "--older-than-hours", "0", "--json"])
    assert json.loads(swept.stdout) == {"deleted": 2}
    assert store.read("models/m-1/revision-1", "a") == b"1"
