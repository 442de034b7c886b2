import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from learngenes.family.family import FamilyError, load_family
from registry.published import publish
from registry.records import now
from registry.settings import Settings
from tests.support.devices import beat
from tests.support.engines import wait_until
from tests.support.failures import raising
from tests.support.records import queued_model
from tests.worker.conftest import MakeModel, build_housekeeping
from worker.leases import ProcessName, is_dead
from worker.runtime import Runtime


def test_families_are_announced_with_what_the_solver_needs(runtime: Runtime) -> None:
    runtime.announce_families()
    (family,), ours = runtime.repository.families(), runtime.family("tiny")
    assert (family.name, family.network.width) == ("tiny", 32)
    assert family.sizes == ours.manifest.sizes
    assert (family.fingerprint, family.quality) == (ours.fingerprint, ours.quality)


def test_housekeeping_shows_that_the_worker_is_alive(runtime: Runtime) -> None:
    keeper = build_housekeeping(runtime)
    keeper.start()
    deadline = time.monotonic() + 5
    while not (workers := runtime.repository.workers()):
        assert time.monotonic() < deadline
    (worker,) = workers
    assert (worker.queue, worker.families) == ("build", ["tiny"])
    assert (worker.device_class, worker.torch_version) == (runtime.device_class, torch.__version__)
    runtime.stopping.set()
    while runtime.repository.workers():  # nobody is to wait for one that has ended
        assert time.monotonic() < deadline


def test_a_worker_that_is_stuck_ends(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    runtime.settings.stuck_seconds = 0.1
    keeper = build_housekeeping(runtime)
    time.sleep(0.2)
    keeper.end_if_stuck()  # there is nothing to do
    with runtime.watch.watched():
        keeper.end_if_stuck()
        assert ended == []
        time.sleep(0.2)
        keeper.end_if_stuck()
    assert ended == [1]


def test_work_for_a_device_that_nobody_has_fails_some_time(runtime: Runtime) -> None:
    models, long_ago = runtime.repository.models, now() - timedelta(hours=7)
    gone, away, fresh = (
        models.create(queued_model(device_class=name).replace(created_at=at)).id
        for name, at in (("gone", long_ago), ("away", long_ago), ("gone", now()))
    )
    beat(runtime, device_class="away")
    build_housekeeping(runtime).requeue_lost()
    assert models.get(gone).status == "failed"
    assert models.get(gone).error == "no worker of gone for 6 hours"
    assert [models.get(model).status for model in (away, fresh)] == ["queued"] * 2


def test_whoever_waits_for_another_is_not_stuck(runtime: Runtime) -> None:
    with runtime.watch.watched():
        lock = runtime.repository.lock(f"device:{runtime.device_class}", 0.3)
        assert lock.acquire()
        waiting = threading.Thread(target=_use_device, args=(runtime,))
        waiting.start()
        while not runtime.watch.resting:
            assert waiting.is_alive()
        assert runtime.watch.stuck_seconds() == 0
        waiting.join(timeout=20)
        assert not runtime.watch.resting


def _use_device(runtime: Runtime) -> None:
    with runtime.device_alone():
        pass


def test_whoever_has_the_device_hears_that_another_waits_for_it(runtime: Runtime) -> None:
    with runtime.device_first() as first:
        assert first
        assert not runtime.device_wanted()
        waiting = threading.Thread(target=_use_device, args=(runtime,))
        waiting.start()
        wait_until(runtime.device_wanted)
    waiting.join()
    wait_until(lambda: not runtime.device_wanted())


def test_a_lease_outlives_its_first_period(runtime: Runtime, make_model: MakeModel) -> None:
    models = runtime.repository.models
    model_id = make_model().id
    with runtime.leases.claimed(models, model_id, 3) as record:
        assert record is not None
        time.sleep(runtime.settings.lease_seconds * 1.3)
        assert models.leased(model_id)
    assert not models.leased(model_id)


def test_no_family_stops_the_start(settings: Settings, tmp_path: Path) -> None:
    empty = settings.model_copy(update={"families_dir": tmp_path / "empty"})
    with pytest.raises(FamilyError, match="set FINESERVE_FAMILIES_DIR"):
        Runtime.start(empty)


def test_a_corrupt_family_stops_the_start(settings: Settings, families_dir: Path) -> None:
    (families_dir / "tiny" / "stem.safetensors").write_bytes(b"")
    with pytest.raises(FamilyError, match="corrupt"):
        Runtime.start(settings)


def test_the_default_family_is_there_first_and_the_others_follow(
    settings: Settings, families_dir: Path
) -> None:
    renamed(families_dir / "tiny", families_dir / "other")
    ours = settings.model_copy(update={"default_family": "tiny"})
    runtime = Runtime.start(ours, at_once=False)
    assert list(runtime.families) == ["tiny"]
    runtime.announce_families()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(runtime.family, "other")
        time.sleep(0.05)
        assert not waiting.done()
        runtime.load_rest()
        assert waiting.result(timeout=20).manifest.name == "other"
    runtime.announce_families()
    assert [family.name for family in runtime.repository.families()] == ["other", "tiny"]
    with pytest.raises(LookupError, match="no family 'third'"):
        runtime.family("third")


def test_a_published_family_is_loaded_wherever_it_is_asked_for(
    settings: Settings, families_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = Runtime.start(settings)
    other = renamed(families_dir / "tiny", tmp_path / "elsewhere" / "other")
    publish(runtime.store, other, "other", load_family(other).fingerprint)
    told: list[list[str]] = []
    runtime.on_published = lambda: told.append(sorted(runtime.families))
    assert runtime.family("other").fingerprint == load_family(other).fingerprint
    assert told == [["other", "tiny"]]
    assert runtime.take_published() == [], "once is enough"
    publish(runtime.store, families_dir / "tiny", "tiny", "of another")
    (other / "stem.safetensors").write_bytes(b"")
    publish(runtime.store, other, "broken", "f")
    assert runtime.take_published() == []
    assert "corrupt" in runtime.problem
    assert runtime.directories["tiny"] == families_dir / "tiny", "this host's own comes first"
    assert sorted(runtime.families) == ["other", "tiny"]


def renamed(family: Path, to: Path) -> Path:
    """Copy of a family under another name."""
    shutil.copytree(family, to)
    file = to / "family.json"
    file.write_text(file.read_text().replace(f'"{family.name}"', f'"{to.name}"'))
    return to


def test_work_of_a_process_that_has_ended_is_taken_up_at_once(
    runtime: Runtime, make_model: MakeModel
) -> None:
    models, lost, kept = runtime.repository.models, make_model().id, make_model().id
    name = "from worker.leases import ProcessName; print(ProcessName.own())"
    ended = subprocess.run([sys.executable, "-c", name], capture_output=True, text=True, check=True)
    models.claim(lost, 3, 600, ended.stdout.strip())
    models.claim(kept, 3, 600, str(ProcessName.own()))
    build_housekeeping(runtime).requeue_lost()
    assert (models.leased(lost), models.leased(kept)) == (False, True)
    assert runtime.queue.length("build", runtime.device_class) == 1


def test_of_a_process_elsewhere_nobody_knows_whether_it_lives() -> None:
    own = ProcessName.own()
    assert not is_dead(str(own))
    assert is_dead(str(own._replace(started_at="1")))
    assert not is_dead(str(own._replace(place="another-boot/pid:[1]", started_at="1")))
    assert not is_dead("")


def test_a_corrupt_family_beside_the_default_one_is_left_out(
    settings: Settings, families_dir: Path
) -> None:
    shutil.copytree(families_dir / "tiny", families_dir / "other")
    (families_dir / "other" / "stem.safetensors").write_bytes(b"")
    ours = settings.model_copy(update={"default_family": "tiny"})
    runtime = Runtime.start(ours, at_once=False)
    runtime.load_rest(despite_errors=True)
    assert list(runtime.families) == ["tiny"]
    assert "corrupt" in runtime.problem
    with pytest.raises(LookupError, match="no family 'other'"):
        runtime.family("other")
    with pytest.raises(FamilyError, match="corrupt"):
        Runtime.start(ours)


def test_nobody_waits_for_ever_for_a_family_that_cannot_be_read(
    settings: Settings, families_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(families_dir / "tiny", families_dir / "other")
    runtime = Runtime.start(settings.model_copy(update={"default_family": "tiny"}), at_once=False)
    monkeypatch.setattr("worker.runtime.load_family", raising(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        runtime.load_rest(despite_errors=True)
    with pytest.raises(LookupError, match="no family 'other'"):
        runtime.family("other")
