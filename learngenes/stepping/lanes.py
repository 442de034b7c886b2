"""Lanes: parts of a step that run side by side, each with rows and threads of its own.

On two cores two lanes of one thread made 542 rows a second where one of two threads made 436
(batches of 32, `fashion` in float32, nothing else to do): cores wait for each other once a step,
not after every operation, and lose less when another process takes one of them for a moment. More
cores than that have not been measured. A GPU has one lane. An executor's own `map` would not do:
the thread that asks is a lane, too, and an error is only raised once no lane is running any more.
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from learngenes.device import lanes_of

T = TypeVar("T")


class Lanes:
    """Lanes of one engine; its own thread is one of them. Each has `threads` OpenMP threads."""

    def __init__(self, count: int = 1, threads: int = 1) -> None:
        self.count, self.threads = count, threads
        self._others = ThreadPoolExecutor(
            max(1, count - 1), "lane", initializer=torch.set_num_threads, initargs=(threads,)
        )

    @classmethod
    def of(cls, device: torch.device) -> "Lanes":
        return cls(*lanes_of(device))

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Results of `works`, in order; raises what one of them raised, once all have ended."""
        inferring = torch.is_inference_mode_enabled()
        given: dict[int, T] = {}
        todo = iter(enumerate(works))

        def lane() -> None:
            with torch.inference_mode(inferring):  # each thread has a mode of its own
                for place, work in todo:
                    given[place] = work()

        others: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # Python is about to end: this lane does all
                for _ in range(1, min(self.count, len(works))):
                    others.append(self._others.submit(lane))
            lane()
        finally:
            wait(others)
        while others:  # an error would keep in memory what it saw, were it kept here
            others.pop().result()
        return [given[place] for place in range(len(works))]

    def close(self) -> None:
        self._others.shutdown(wait=False)


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """Slices of `sizes`, at most `count` and none empty, whose sums are about the same."""
    total, done, start = sum(sizes), 0, 0
    found: list[slice] = []
    for end, size in enumerate(sizes, start=1):
        done += size
        if done * count >= total * (len(found) + 1) or end == len(sizes):
            found.append(slice(start, end))
            start = end
    return found
