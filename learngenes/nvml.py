"""What the driver says of a GPU's memory: bytes of this process, of others, of the whole card.

The runtime's own figure is device-wide, so it counts what every other process holds.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_before: dict[str, int] = {}
"""Bytes that were in use on each device before this process had a context there."""


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """NVML, or None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, or one of another version
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def remember_use() -> None:
    """Note what is in use on each GPU: to be called before this process has a context on any."""
    with _library() as library:
        if library is None:
            return
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            _before[_plain(library.nvmlDeviceGetUUID(handle))] = _used(library, handle)


def process_bytes(uuid: str) -> int:
    """Bytes that this process holds on a GPU; 0 where nobody can say.

    The driver tells them by process. In a container it knows processes by other numbers, and then
    they are what is in use beyond what was before this process began.
    """
    with _library() as library:
        if library is None:
            return 0
        handle = _handle(library, uuid)
        if handle is None:
            return 0
        for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        before = _before.get(_plain(uuid))
        return 0 if before is None else max(0, _used(library, handle) - before)


def others_bytes(uuid: str) -> int:
    """Bytes that other processes hold on a GPU; 0 where nobody can say."""
    with _library() as library:
        handle = None if library is None else _handle(library, uuid)
        if handle is None:
            return 0
        used = _used(library, handle)
    return max(0, used - process_bytes(uuid))


def _handle(library: Any, uuid: str) -> Any:
    """Device of a UUID, with its prefix or without; None where there is none."""
    for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
        with contextlib.suppress(library.NVMLError):
            return library.nvmlDeviceGetHandleByUUID(name)
    return None


def _used(library: Any, handle: Any) -> int:
    return int(library.nvmlDeviceGetMemoryInfo(handle).used)


def _plain(uuid: str) -> str:
    """UUID without the kind of device before it."""
    for kind in ("GPU-", "MIG-"):
        uuid = uuid.removeprefix(kind)
    return uuid
