import time
from pathlib import Path

import pytest
import torch

from learngenes.family import FamilyError
from learngenes.sizing.quality import QualityTable
from registry.settings import Settings
from tests.worker.conftest import MakeModel
from worker.runtime import Housekeeping, Runtime


def test_families_are_announced_with_what_the_solver_needs(runtime: Runtime) -> None:
    runtime.announce_families()
    (family,) = runtime.repository.families()
    assert family.name == "tiny"
    assert family.network["width"] == 32
    assert family.sizes == {"depths": [2, 3, 4], "ranks": [8, 24, 48]}
    assert family.fingerprint == runtime.family("tiny").fingerprint
    assert QualityTable.model_validate(family.quality) == runtime.family("tiny").quality


def test_housekeeping_shows_that_the_worker_is_alive(runtime: Runtime) -> None:
    keeper = Housekeeping(runtime, runtime.repository.models, "build", "fineserve.build")
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


def test_a_lease_outlives_its_first_period(runtime: Runtime, make_model: MakeModel) -> None:
    models = runtime.repository.models
    model_id = make_model().id
    with runtime.lease(models, model_id) as record:
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
