"""Duration of a refinement: until it is enough, and in turns while other models wait."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from learngenes.training.tuning import Enough, Progress
from registry.queue import BUILD_TASK
from registry.records import ModelRecord
from worker.attempts import GivingWay


@dataclass(frozen=True)
class Pace:
    turn_seconds: float = 30.0
    """Seconds that a refinement goes on while other models wait to be built."""
    least_pause_seconds: float = 2.0
    """Pause between two events of progress."""
    most_events: int = 500
    """Most events of progress; a stream keeps the last 2,000."""


class UntilEnough:
    """Callback after every step of a refinement.

    Raises Enough when its caller wants no more, and GivingWay when its turn has ended.
    """

    def __init__(
        self,
        pace: Pace,
        max_seconds: float,
        tell: Callable[[Progress | None], ModelRecord | None],
        others_wait: Callable[[], bool],
    ) -> None:
        """`tell` tells the progress, if there is any to tell, and gives the record if it was
        read."""
        self._turn_seconds = pace.turn_seconds
        self._turn_ends = time.monotonic() + pace.turn_seconds
        self._pause_seconds = max(pace.least_pause_seconds, max_seconds / pace.most_events)
        self._told_at = 0.0
        self._tell, self._others_wait = tell, others_wait

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        tells = progress.heldout_loss is not None or now - self._told_at > self._pause_seconds
        if tells:
            self._told_at = now
        record = self._tell(progress if tells else None)
        if record is not None and record.refine is not None and record.refine.stopped:
            raise Enough
        if now > self._turn_ends:
            self._turn_ends += self._turn_seconds
            if self._others_wait():
                raise GivingWay(BUILD_TASK)
