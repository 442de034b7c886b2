"""Limits of the control groups that a process is in: containers, nested ones, systemd's services.

Version 2 (Documentation/admin-guide/cgroup-v2.rst of Linux) and version 1, by the paths in
/proc/self/cgroup; in a namespace of its own a container sees its group at the top.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_limit_bytes() -> int | None:
    """Least limit of the groups that this process is in; None without one."""
    found = [
        int(text)
        for folder in _groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _text(folder / name)) and text.isdigit()
    ]
    return min(found, default=None)


def processors_limit() -> float | None:
    """Least number of processors that the groups of this process may use; None without a limit."""
    found = []
    for folder in _groups("cpu"):
        quota, _, period = (_text(folder / "cpu.max") or "").partition(" ")
        quota = quota or _text(folder / "cpu.cfs_quota_us") or ""
        period = period or _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process for a controller, and of those around them."""
    for line in (_text(OWN) or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = [ROOT / controllers, ROOT / controller] if controllers else [ROOT]
        inside = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / part for part in (inside, *inside.parents))


def _text(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return None
