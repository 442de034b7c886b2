"""What a step does side by side: each lane has one core and rows of its own.

On a CPU two lanes of one thread made 542 rows a second where one of two threads made 436 (batches
of 32, `fashion` in float32): cores wait for each other once a step, not after every operation, and
lose less when another process takes one of them for a moment. A GPU has one lane.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from learngenes.device import lanes_of

T = TypeVar("T")


class Lanes:
    """Of one engine. Its own thread is the first lane, and has to be `single_threaded`."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._others = ThreadPoolExecutor(
            max(1, count - 1), "lane", initializer=torch.set_num_threads, initargs=(1,)
        )

    @classmethod
    def of(cls, device: torch.device) -> "Lanes":
        return cls(lanes_of(device))

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each gives, in order. Raises what one of them raised, once all have ended."""
        inferring = torch.is_inference_mode_enabled()

        def lane(number: int) -> list[T]:
            with torch.inference_mode(inferring):  # each thread has a mode of its own
                return [work() for work in works[number :: self.count]]

        others = [self._others.submit(lane, i) for i in range(1, min(self.count, len(works)))]
        try:
            given = [lane(0)]
        finally:
            wait(others)
        given += [other.result() for other in others]
        return [given[i % self.count][i // self.count] for i in range(len(works))]


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """`sizes` in at most `count` runs, none of them empty, whose sums are about the same."""
    total, done, start = sum(sizes), 0, 0
    found: list[slice] = []
    for end, size in enumerate(sizes, start=1):
        done += size
        if done * count >= total * (len(found) + 1) or end == len(sizes):
            found.append(slice(start, end))
            start = end
    return found
