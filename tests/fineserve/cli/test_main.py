import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fineserve.embedded import Embedded, EmbeddedError, programs, supervisor_config
from learngenes.config import NetworkConfig
from learngenes.family.family import load_family
from learngenes.family.synthetic import SHAPES
from registry.published import published
from registry.settings import Settings
from registry.store import DirectoryStore, open_store
from tests.fineserve.conftest import Configure
from tests.support.commands import run
from tests.support.engines import Undisturbed
from worker.build.profiles import stored_profile
from worker.runtime import Runtime

pytestmark = pytest.mark.usefixtures("configure")


def test_a_terminal_that_knows_ascii_alone_is_told_all_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "FINESERVE_VAR_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "fineserve", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert " disk: " in done.stdout
    assert "Traceback" not in done.stderr


def test_down_is_no_failure_when_nothing_runs() -> None:
    assert "fineserve is down" in run("down").output


def test_logs_that_are_not_there_are_said() -> None:
    assert "`fineserve up` first" in run("logs", exit_code=1).output


def test_a_taken_port_is_a_clear_message(taken_port: int, configure: Configure) -> None:
    configure(port=taken_port)
    told = run("up", exit_code=1).output
    assert f"port {taken_port} on 127.0.0.1 cannot be used" in told
    assert f"FINESERVE_PORT={taken_port + 1} fineserve up" in told


def test_a_path_too_long_for_sockets_is_a_clear_message(tmp_path: Path) -> None:
    settings = Settings(var_dir=tmp_path / ("x" * 100))
    with pytest.raises(EmbeddedError, match="set FINESERVE_VAR_DIR shorter"):
        Embedded(settings).start()


def test_an_outside_redis_needs_no_valkey() -> None:
    inside, outside = Settings(), Settings(redis_url="redis://db")
    assert list(programs(inside)) == ["valkey", "build-worker", "sample-worker", "api"]
    assert list(programs(outside)) == ["build-worker", "sample-worker", "api"]
    assert "--appendonly yes" in supervisor_config(inside)


def test_only_what_cannot_begin_is_not_started_again() -> None:
    assert f"exitcodes={os.EX_CONFIG}\n" in supervisor_config(Settings())


def test_pretrain_cannot_go_on_with_what_is_no_family(tmp_path: Path) -> None:
    words = ("--work", str(tmp_path / "work"), "--family", "f", "--start", str(tmp_path))
    told = run("pretrain", "families/fashion/config.toml", *words, exit_code=1).output
    assert "leave --start out" in told


def test_pretrain_needs_a_configuration() -> None:
    words = ("pretrain", "missing.toml", "--work", "w", "--family", "f")
    assert "does not exist" in run(*words, exit_code=2).output


def test_profile_measures_this_device_and_keeps_the_result(
    deployed: Settings, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(profile_seconds=0.5)
    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: (10**8, 0))
    monkeypatch.setattr("worker.build.profiles.Quiet", Undisturbed)
    runtime = Runtime.start(deployed)
    assert "tiny on " in run("profile").output
    profile = stored_profile(runtime, "tiny")
    assert profile is not None
    assert profile.process_base_bytes == 10**8
    assert [family.name for family in runtime.repository.families()] == ["tiny"]
    assert "tiny: 0 observations are forgotten" in run("profile", "--reset").output
    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: (2 * 10**8, 0))
    assert "tiny: a process needs 0.200 GB" in run("profile", "--memory").output


def test_a_disturbed_measurement_is_refused(
    deployed: Settings, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(profile_seconds=0.5)
    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: (10**8, 0))
    monkeypatch.setattr(
        "worker.build.profiles.Quiet", lambda device: Undisturbed(device, "other processes")
    )
    assert "disturbed by other processes" in run("profile", exit_code=1).output
    assert stored_profile(Runtime.start(deployed), "tiny") is None


def test_profile_says_which_families_there_are(deployed: Settings) -> None:
    assert "no family 'huge'" in run("profile", "--family", "huge", exit_code=1).output


def test_profile_needs_a_calibrated_family(deployed: Settings) -> None:
    manifest = deployed.families_dir / "tiny" / "family.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]["quality.json"]
    manifest.write_text(json.dumps(content))
    assert "`fineserve calibrate` one first" in run("profile", exit_code=1).output


def test_profile_needs_redis(deployed: Settings, configure: Configure) -> None:
    configure(redis_url=f"unix://{deployed.var_dir}/nothing.sock")
    assert "Redis cannot be reached" in run("profile", exit_code=1).output


def test_calibrate_writes_what_sizes_are_worth(families_dir: Path) -> None:
    tiny = families_dir / "tiny"
    before = load_family(tiny).quality
    told = run("calibrate", str(tiny), "--points", "2", "--steps", "2").output
    assert "restart its workers" in told
    quality = load_family(tiny).quality
    assert quality is not None
    assert quality != before
    assert (quality.depths, quality.ranks) == ((2, 4), (8, 48))
    assert "2 steps" in quality.source


def test_calibrate_names_what_is_corrupt(families_dir: Path) -> None:
    (families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    told = run("calibrate", str(families_dir / "tiny"), exit_code=1).output
    assert "stem.safetensors is corrupt" in told


def test_shapes_are_written_or_published(
    deployed: Settings, network: NetworkConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "dit-xl-2-512" in run("shapes").output
    for name in ("dit-s-2-256", "dit-xl-2-256"):
        monkeypatch.setitem(SHAPES, name, network)  # which is small
    directory = tmp_path / "shapes" / "small"
    told = run("shapes", "dit-s-2-256", "--directory", str(directory)).output
    assert f"FINESERVE_FAMILIES_DIR={directory.parent} fineserve up" in told
    assert load_family(directory).manifest.name == "small"
    again = run("synthesise", str(directory), exit_code=1).output
    assert "exists; choose another name" in again
    assert "there are dit-s-2-256" in run("shapes", "dit-xl", exit_code=1).output
    run("shapes", "dit-s-2-256")
    runtime = Runtime.start(deployed)
    assert runtime.take_published() == ["dit-s-2-256-shapes"]
    assert runtime.family("dit-s-2-256-shapes").is_random


def test_gc_deletes_what_can_be_made_again() -> None:
    store = DirectoryStore(Settings().resolved_store_dir)
    names = ("generations/g-1", "exports/m-1/revision-1", "models/m-1/revision-1")
    for name in names:
        store.put(name, {"a": b"1"}, {})
    for options in ([], ["--older-than-hours", "0"]):  # they may be about to be read
        assert run("gc", *options).stdout == "0 deleted\n"
    an_hour_ago = time.time() - 3600
    for name in names:
        os.utime(store.root / name, (an_hour_ago, an_hour_ago))
    swept = run("gc", "--older-than-hours", "0", "--json")
    assert json.loads(swept.stdout) == {"deleted": 2}
    assert store.read("models/m-1/revision-1", "a") == b"1"


def test_publish_puts_a_family_into_the_store(deployed: Settings, families_dir: Path) -> None:
    assert "tiny is published" in run("publish", str(families_dir / "tiny")).output
    assert published(open_store(deployed)) == {
        "tiny": load_family(families_dir / "tiny").fingerprint
    }
    (families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    assert "is corrupt" in run("publish", str(families_dir / "tiny"), exit_code=1).output
