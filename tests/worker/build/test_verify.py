import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from learngenes.config import DType, Mode, Size
from learngenes.family.family import Family
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import Execution, memory_bytes
from registry.errors import StorageFull
from tests.support.builds import build
from tests.worker.conftest import MakeModel
from worker.build.verify import Specimen, VerificationError, verify
from worker.runtime import Runtime


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like this process: on a busy machine several threads wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def specimen(families_dir: Path) -> Specimen:
    return Specimen(
        family=families_dir / "tiny",
        depth=2,
        rank=8,
        mode=Mode.FACTORED,
        dtype=DType.FLOAT32,
        workload=Workload.of(n=2, num_inference_steps=2),
        max_seconds=1,
    )


@pytest.fixture
def process_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Has a shell command run in place of Python, so that it starts at once."""

    def replace_python(does: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\ncat > {tmp_path}/request\n{does}\n")
        program.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(program))

    return replace_python


def test_a_model_is_measured_in_a_process_of_its_own(
    runtime: Runtime, make_model: MakeModel
) -> None:
    """The whole way, with nothing replaced: a build whose model another process measures."""
    record = build(runtime, make_model(num_inference_steps=3).id, verify=verify)
    assert (record.status, record.error) == ("ready", None)
    assert record.measured is not None
    assert 0.9 < record.measured.memory_bytes / record.plan.predicted.memory_bytes <= 1
    assert 10**8 < record.measured.process_memory_bytes < 2 * 10**9
    assert 0 < record.measured.latency_seconds <= record.measured.latency_p95_seconds


def test_a_process_that_hangs_is_ended(
    specimen: Specimen, process_that: Callable[[str], None]
) -> None:
    process_that("exec sleep 100")
    with pytest.raises(VerificationError, match="more than"):
        verify(specimen, most_seconds=0.3)


def test_a_full_disk_is_no_fault_of_the_model(
    specimen: Specimen, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("worker.build.verify.save_file", full)
    with pytest.raises(StorageFull, match="No space left"):
        verify(specimen, family.scales)


def test_scales_may_be_left_to_the_family(specimen: Specimen, family: Family) -> None:
    measurement = verify(specimen)
    execution = Execution(specimen.mode, specimen.dtype)
    network = family.manifest.network
    predicted = memory_bytes(network, 2, 8, execution, specimen.workload)
    assert 0.9 < measurement.cost.memory_bytes / int(predicted) <= 1


def test_the_process_is_given_the_models_own_scales(
    specimen: Specimen, family: Family, tmp_path: Path, process_that: Callable[[str], None]
) -> None:
    answer = '{"cost": {"memory_bytes": 1, "process_memory_bytes": 2, "latency_seconds": 3, '
    answer += '"latency_p95_seconds": 4}, "overhead_bytes": 5}'
    process_that(f"echo '{answer}'")
    scales = family.scales_of(Size(depth=2, rank=8))
    measurement = verify(specimen, scales)
    assert dataclasses.astuple(measurement) == ((1, 2, 3, 4), 5)
    sent = Specimen.model_validate_json((tmp_path / "request").read_text())
    assert sent.own is not None
    assert sent == specimen.model_copy(update={"own": sent.own})
    assert not sent.own.exists(), "what was written for the process is removed"


def test_a_process_that_dies_leaves_its_last_words(
    specimen: Specimen, process_that: Callable[[str], None]
) -> None:
    process_that("echo no memory is left >&2; exit 3")
    with pytest.raises(VerificationError, match=r"(?s)status 3: .*no memory is left"):
        verify(specimen)


def test_a_model_whose_measurement_dies_has_failed_and_says_why(
    runtime: Runtime, make_model: MakeModel, process_that: Callable[[str], None]
) -> None:
    process_that("kill -9 $$")
    record = build(runtime, make_model().id, verify=verify)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.startswith("VerificationError: measuring ended with status -9")


def test_who_waits_may_stop_it(specimen: Specimen, process_that: Callable[[str], None]) -> None:
    process_that("sleep 60")

    def enough() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        verify(specimen, on_wait=enough)
