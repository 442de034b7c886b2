"""Whether a measurement had its device for itself."""

import contextlib
import os
import time
from pathlib import Path

import torch

from learngenes.device import synchronise

MOST_WAITING = 0.05
"""Share of the time for which a thread may have waited for a processor."""
MOST_STOLEN = 0.05
"""Share of one processor's time that a hypervisor may have given to others."""
MOST_SLOWDOWN = 1.3
"""Ratio of the reference product to its fastest that counts as another tenant of the device."""
SIDE = 512
ROUNDS = 5
NANOSECONDS = 1e9

_fastest: dict[str, float] = {}
"""Fastest reference product of this process, by device and number of threads."""


class Quiet:
    """Watch over a device, from its making or the last `disturbed_by` to the next.

    On Linux the scheduler counts for how long a thread was ready and did not run, and for how
    long the hypervisor ran somebody else. What shares a GPU shows in a product between the two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slowest = self._slowdown()
        self._begin()

    def _begin(self) -> None:
        self._began, self._waited, self._stolen = time.monotonic(), _waited(), _stolen_seconds()

    def disturbed_by(self) -> str:
        """What else used the device meanwhile; empty for nothing. The watch begins anew."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        before, after = self._waited, _waited()
        waiting = max((after[t] - before.get(t, 0) for t in after), default=0) / NANOSECONDS
        stolen = _stolen_seconds() - self._stolen
        now = self._slowdown()
        slowest, self._slowest = max(self._slowest, now), now
        self._begin()
        if waiting > MOST_WAITING * seconds:
            return f"other processes: it waited {waiting / seconds:.0%} of the time"
        if stolen > MOST_STOLEN * seconds:
            return f"the host: it took {stolen / seconds:.0%} of a processor"
        if slowest > MOST_SLOWDOWN:
            return f"something on the device: a product took {slowest:.1f} times as long"
        return ""

    def _slowdown(self) -> float:
        """Ratio of a reference product to the fastest so far."""
        key = f"{self._device} {torch.get_num_threads()}"
        side = torch.ones(SIDE, SIDE, device=self._device)
        rounds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            side @ side
            synchronise(self._device)
            rounds.append(time.perf_counter() - began)
        fastest = min(*rounds, _fastest.get(key, rounds[0]))
        _fastest[key] = fastest
        return min(rounds) / fastest


def _waited() -> dict[str, int]:
    """Nanoseconds for which each thread of this process waited for a processor."""
    waited = {}
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it ended, or is not counted
            waited[task.name] = int((task / "schedstat").read_text().split()[1])
    return waited


def _stolen_seconds() -> float:
    """Seconds that the hypervisor gave to others, over all processors; 0 where unknown."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        ticks = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
        return ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
