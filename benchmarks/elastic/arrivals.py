"""Moments at which requests come: Poisson, bursts, a diurnal curve, a flash crowd."""

import itertools
import math
import random
from collections.abc import Callable, Iterator

Rate = Callable[[float], float]
"""Requests a second, by the second."""


def constant(rate: float) -> Rate:
    return lambda _: rate


def diurnal(mean: float, seconds: float, swing: float = 0.8) -> Rate:
    """A day in so many seconds: least at its ends, most at noon."""
    return lambda t: mean * (1 - swing * math.cos(2 * math.pi * t / seconds))


def flash_crowd(rate: float, times: float, begins: float, ends: float) -> Rate:
    """So many times the usual rate from one second to another."""
    return lambda t: rate * (times if begins <= t < ends else 1)


def bursts(rate: float, every: float, lasting: float) -> Rate:
    """All that comes in `every` seconds comes within the first `lasting` of them."""
    return lambda t: rate * every / lasting if t % every < lasting else 0.0


def poisson(rate: Rate, most: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process whose rate is never above `most` (Lewis and Shedler's
    thinning)."""
    chance = random.Random(seed)

    def candidates() -> Iterator[float]:
        at = 0.0
        while True:
            at += chance.expovariate(most)
            yield at

    within = itertools.takewhile(lambda at: at < seconds, candidates())
    return [at for at in within if chance.random() * most < rate(at)]
