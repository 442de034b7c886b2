import subprocess
import sys

import pytest
import torch

from learngenes.measuring import quiet
from learngenes.measuring.quiet import Quiet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests do on this machine does not count."""
    monkeypatch.setattr(quiet, "_waited", lambda: {"1": 0})
    monkeypatch.setattr(quiet, "_stolen_seconds", lambda: 0.0)
    monkeypatch.setattr(quiet, "MOST_SLOWDOWN", 1e9)


def test_nothing_disturbs_what_is_alone() -> None:
    assert Quiet(CPU).disturbed_by() == ""


def test_waiting_for_a_processor_is_being_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Quiet(CPU)
    monkeypatch.setattr(quiet, "_waited", lambda: {"1": 10**12, "2": 5})
    assert watch.disturbed_by().startswith("other processes")
    assert watch.disturbed_by() == "", "it begins anew"


def test_a_host_that_takes_a_processor_away_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Quiet(CPU)
    monkeypatch.setattr(quiet, "_stolen_seconds", lambda: 100.0)
    assert watch.disturbed_by().startswith("the host")


def test_a_slower_device_is_shared_with_something(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Quiet(CPU)
    monkeypatch.setattr(quiet, "MOST_SLOWDOWN", 0.5)
    assert watch.disturbed_by().startswith("something on the device")


def test_a_thread_that_shares_its_processor_is_seen_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes on one processor: each waits half of the time, as Linux counts it."""
    monkeypatch.undo()
    code = """
import os, sys, time
import torch
from learngenes.measuring import quiet
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
quiet.MOST_SLOWDOWN = 1e9
watch = quiet.Quiet(torch.device("cpu"))
until = time.monotonic() + 1
while time.monotonic() < until:
    pass
print(watch.disturbed_by())
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert any("other processes" in each for each in said)


def test_where_the_system_does_not_count_nothing_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(quiet.Path, "read_text", _missing)
    assert quiet._stolen_seconds() == 0
    assert quiet._waited() == {}


def _missing(*_: object) -> str:
    raise OSError
