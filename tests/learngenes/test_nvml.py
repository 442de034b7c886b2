"""What the driver says, through a library that is made up."""

import os
import sys
import types
from collections.abc import Callable

import pytest

from learngenes import nvml

TOTAL, OURS, OTHERS = 24_000, 700, 5_000
UUID = "3f1c"


class Missing(Exception):
    """NVML's error."""


def library(uuid: str = f"GPU-{UUID}", pid: int | None = None, ours: int | None = OURS) -> object:
    """A driver with one GPU, on which another process holds some, and this one: under `pid`."""
    process = types.SimpleNamespace(pid=os.getpid() if pid is None else pid, usedGpuMemory=ours)
    used = {"bytes": OTHERS}

    def by_uuid(name: str) -> str:
        if name != uuid:
            raise Missing
        return "handle"

    return types.SimpleNamespace(
        NVMLError=Missing,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda _: "handle",
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda _: uuid,
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(used=used["bytes"]),
        nvmlDeviceGetComputeRunningProcesses=lambda _: [process],
        used=used,
    )


Install = Callable[[object], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    monkeypatch.setattr(nvml, "_before", {})
    return lambda made: monkeypatch.setitem(sys.modules, "pynvml", made)


@pytest.mark.parametrize("kind", ["GPU-", "MIG-", ""])
def test_the_driver_tells_what_a_process_holds(install: Install, kind: str) -> None:
    install(library(f"{kind}{UUID}"))
    assert nvml.process_bytes(UUID) == OURS
    assert nvml.others_bytes(UUID) == OTHERS - OURS


@pytest.mark.parametrize(("pid", "ours"), [(1, OURS), (None, None)])
def test_where_processes_are_hidden_it_is_what_came_since(
    install: Install, pid: int | None, ours: int | None
) -> None:
    """As in a container, and on Windows."""
    driver = library(pid=pid, ours=ours)
    install(driver)
    assert nvml.process_bytes(UUID) == 0  # nobody has looked before
    nvml.remember_use()
    driver.used["bytes"] += OURS  # type: ignore[attr-defined]
    assert nvml.process_bytes(UUID) == OURS
    assert nvml.others_bytes(UUID) == OTHERS


def test_without_a_driver_nobody_can_say(install: Install) -> None:
    install(None)  # importing it fails
    nvml.remember_use()
    assert (nvml.process_bytes(UUID), nvml.others_bytes(UUID)) == (0, 0)


def test_another_device_is_none_of_these(install: Install) -> None:
    install(library())
    assert (nvml.process_bytes("other"), nvml.others_bytes("other")) == (0, 0)
