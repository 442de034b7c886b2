"""Turns: who is in the next steps when not everything fits in a batch."""

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class Contender(Protocol):
    """Contender for a step: images of one request that are stepped together."""

    @property
    def owner(self) -> str: ...
    @property
    def deadline(self) -> float: ...
    @property
    def rows(self) -> float: ...
    @property
    def left(self) -> int:
        """Number of steps that it still needs."""
        ...

    @property
    def place(self) -> Hashable:
        """Place of the contender; those of one place share a batch."""
        ...


C = TypeVar("C", bound=Contender)


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch in one place."""

    rows: int
    """Most rows: more do not fit, or only make each other wait."""
    seconds: Callable[[float], float]
    """Seconds of one step, by its rows."""


def in_turn(contenders: Sequence[C], served: Mapping[str, float]) -> list[C]:
    """Contenders in turn: the owner served least first, then the earliest deadline."""
    queues: dict[str, list[C]] = {}
    for contender in sorted(contenders, key=lambda c: c.deadline):
        queues.setdefault(contender.owner, []).append(contender)
    order: list[C] = []
    heap = [(served.get(owner, 0.0), queue[0].deadline, owner) for owner, queue in queues.items()]
    heapq.heapify(heap)
    while heap:
        share, _, owner = heapq.heappop(heap)
        chosen = queues[owner].pop(0)
        order.append(chosen)
        if queues[owner]:
            heapq.heappush(heap, (share + chosen.rows, queues[owner][0].deadline, owner))
    return order


def choose(
    contenders: Sequence[C],
    served: Mapping[str, float],
    limits: Callable[[Any], BatchLimits],
    now: float,
) -> list[C]:
    """Choose as many as fit, in turn, unless one more makes one before it miss its deadline.

    A deadline that is missed anyway holds nobody up. One contender always runs, however large.
    """
    chosen: list[C] = []
    rows: dict[Hashable, float] = {}
    seconds = 0.0

    def step_seconds() -> float:
        return sum(limits(place).seconds(n) for place, n in rows.items() if n)

    for contender in in_turn(contenders, served):
        place = contender.place
        before = rows.get(place, 0)
        if before and before + contender.rows > limits(place).rows:
            continue
        rows[place] = before + contender.rows
        slower = step_seconds()
        if any(now + c.left * seconds <= c.deadline < now + c.left * slower for c in chosen):
            rows[place] = before
            continue
        chosen.append(contender)
        seconds = slower
    return chosen
