"""Watch over work: who does it tells that it moves, who ends stuck processes asks."""

import contextlib
import time
from collections.abc import Iterator


class Watch:
    def __init__(self) -> None:
        self._moved_at: float | None = None
        """Time of the last move; None while nothing could be stuck."""

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def rest(self) -> None:
        """Stop watching: there is nothing to do, or another has to do it first."""
        self._moved_at = None

    @property
    def resting(self) -> bool:
        return self._moved_at is None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what runs inside, which tells now and then that it moves."""
        self.moved()
        try:
            yield
        finally:
            self.rest()

    def stuck_seconds(self) -> float:
        """Seconds since what is watched last moved; zero while nothing is."""
        moved_at = self._moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at
