"""A minute of what `make bench-trust` measures for hours."""

from pathlib import Path

import pytest

from benchmarks.trust import archives, faults, fuzz
from benchmarks.trust.site import corrupt
from registry.store import DirectoryStore

pytestmark = pytest.mark.integration


def test_a_process_loses_no_work(families_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"compile": "false", "lease_seconds": 3, "retraining_steps": 20}
    monkeypatch.setattr(faults, "SETTINGS", {**faults.SETTINGS, **quick})
    figures = faults.kills(2, families_dir, attacked=False)
    assert figures["kills"] == sum(figures["killed"].values()) == 2
    assert figures["accepted_generations"] > 0
    for what in ("lost", "duplicated", "corrupt"):
        assert figures[what] == 0, figures


def test_no_request_that_can_be_made_up_is_answered_with_a_5xx(families_dir: Path) -> None:
    figures = fuzz.measure(families_dir, examples=10, phases=("fuzzing", "stateful"))
    assert figures["fuzz_cases"] > 100
    assert figures["fuzz_failures"] == 0, figures["failures"]
    assert figures["ended_processes"] == 0
    assert figures["ready_afterwards"]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
def test_none_of_ten_thousand_requests_is_answered_with_a_5xx(
    families_dir: Path, keys: bool
) -> None:
    figures = fuzz.measure(families_dir, keys=keys)
    assert figures["fuzz_cases"] >= 10_000
    assert figures["fuzz_failures"] == 0, figures["failures"]
    assert figures["ended_processes"] == 0


@pytest.mark.slow
def test_none_of_ten_thousand_archives_harms_the_service(families_dir: Path) -> None:
    figures = archives.measure(10_000, families_dir)
    assert (figures["wrong"], figures["crashes"]) == (0, 0)
    assert figures["resident_growth_bytes"] < 64e6


def test_no_archive_harms_the_service(families_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SETTLING_SECONDS", 0)  # no figure of memory or time is wanted
    monkeypatch.setattr(archives, "IDLE_SECONDS", 1)
    figures = archives.measure(60, families_dir)
    assert figures["made"] + figures["refused"] == 60
    assert figures["made"] > 0
    assert figures["refused"] > 0
    assert (figures["wrong"], figures["crashes"]) == (0, 0)
    assert figures["ready_afterwards"]


def test_a_corrupt_artifact_is_found(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("x/whole", {"file": b"content"}, {})
    store.put("x/broken", {"file": b"content"}, {})
    (tmp_path / "x/broken/file").write_bytes(b"contenT")
    (found,) = corrupt(store)
    assert found.startswith("x/broken: ")
