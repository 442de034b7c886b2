"""Whether work moves: told by who does it, asked by who would end a process that is stuck."""

import contextlib
import time
from collections.abc import Iterator


class Watch:
    def __init__(self) -> None:
        self._moved_at: float | None = None
        """None while there is nothing that could be stuck."""

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do, or another has to do it first."""
        self._moved_at = None

    @property
    def resting(self) -> bool:
        return self._moved_at is None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What goes on inside tells now and then that it moves, or is taken to be stuck."""
        self.moved()
        try:
            yield
        finally:
            self.rest()

    def stuck_seconds(self) -> float:
        """Seconds since what is watched last moved; zero while nothing is."""
        moved_at = self._moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at
