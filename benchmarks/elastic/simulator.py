"""The engine in a second of the machine's time for minutes of its own: turns, steps, decisions.

What waits is chosen by the engine's own `turns`, and what comes is decided by its own controller;
only the seconds of a step are a formula, times chance.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from worker.sampling.elastic import Ask, Choice, Controller, Load, Place, Promise, uncrowded
from worker.sampling.turns import BatchLimits, choose

QUANTUM_STEPS = 8


@dataclass(frozen=True)
class Arrival:
    at: float
    owner: str = ""
    images: int = 1
    deadline_seconds: float | None = None
    """None: it is no elastic request, and served by the first of its choices."""
    choices: Sequence[Choice] = ()


@dataclass(frozen=True)
class Served:
    arrival: Arrival
    choice: Choice | None
    """None where it was refused."""
    seconds: float = 0.0
    foreseen: float = 0.0

    @property
    def kept(self) -> bool:
        limit = self.arrival.deadline_seconds
        return self.choice is not None and (limit is None or self.seconds <= limit)


@dataclass(eq=False)
class _Part:
    """A contender of `turns`, which runs."""

    load: Load
    left: int

    @property
    def owner(self) -> str:
        return self.load.owner

    @property
    def deadline(self) -> float:
        return self.load.deadline

    @property
    def rows(self) -> int:
        return max(1, round(self.load.rows))

    @property
    def place(self) -> Place:
        return self.load.place

    @property
    def now(self) -> Load:
        load = self.load
        return Load(
            *(load.owner, load.place, load.deadline, load.rows, load.depth, self.left),
            promised=load.promised,
            elastic=load.elastic,
        )


@dataclass
class _Job:
    arrival: Arrival
    choice: Choice
    parts: list[_Part]
    foreseen: float


@dataclass
class Simulation:
    """What came of a list of arrivals, and what deciding took."""

    served: list[Served]
    decision_seconds: list[float]

    def share_kept(self) -> float:
        accepted = [s for s in self.served if s.choice is not None and s.arrival.deadline_seconds]
        return sum(s.kept for s in accepted) / max(1, len(accepted))

    def share_refused(self) -> float:
        return sum(s.choice is None for s in self.served) / max(1, len(self.served))

    def quality(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Mean of what was served of what came between two moments."""
        found = [
            s.choice.quality
            for s in self.served
            if s.choice is not None and since <= s.arrival.at < until
        ]
        return sum(found) / max(1, len(found))


def simulate(
    arrivals: Sequence[Arrival],
    place: Place,
    controller: Controller,
    *,
    noise: float = 0.1,
    slower: Callable[[float], float] = lambda _: 1.0,
    between: float = 1.0,
    seed: int = 0,
    elastic: bool = True,
) -> Simulation:
    """Serve all arrivals. Steps take so many times what was measured, by moment, and by chance up
    to `noise` more or less; the engine takes `between` times its steps. Without `elastic` each is
    served by its best choice."""
    chance, learned = random.Random(seed), controller.learned
    place = replace(place, ratio=learned.ratio)
    coming, now = sorted(arrivals, key=lambda a: a.at), 0.0
    jobs: list[_Job] = []
    done = Simulation([], [])
    rows_of: dict[str, float] = {}
    limits = BatchLimits(place.full_rows, place.step_seconds)

    def is_modest(owner: str) -> bool:
        return controller.pace.is_modest(owner, now)

    def limits_of(_: object) -> BatchLimits:
        return limits

    while coming or jobs:
        if not jobs and coming:
            now = max(now, coming[0].at)
        while coming and coming[0].at <= now:
            arrival = coming.pop(0)
            waiting = {job.arrival.owner for job in jobs}
            rows_of = {owner: rows_of.get(owner, 0.0) for owner in waiting}
            rows_of.setdefault(arrival.owner, min(rows_of.values(), default=0.0))
            began = time.perf_counter()
            job = _begun(arrival, place, controller, jobs, rows_of, elastic, now)
            done.decision_seconds.append(time.perf_counter() - began)
            if job is None:
                done.served.append(Served(arrival, None))
            else:
                jobs.append(job)
        parts = [part for job in jobs for part in job.parts]
        chosen = choose(parts, rows_of, limits_of, now)
        chosen = uncrowded([(part, part.now) for part in chosen], is_modest, now)
        steps = min((part.left for part in chosen), default=0)
        if len(chosen) < len(parts):
            steps = min(steps, QUANTUM_STEPS)
        shape = [(part.load.depth, part.load.rows) for part in chosen]
        for _ in range(steps):
            expected = place.expected(shape)
            taken = expected * slower(now) * chance.uniform(1 - noise, 1 + noise)
            learned.step(max(depth for depth, _ in shape), expected, taken)
            learned.turned(taken * between, taken)
            now += taken * between
            for part in chosen:
                part.left -= 1
                rows_of[part.owner] += part.load.rows
            if coming and coming[0].at <= now:
                break
        for job in list(jobs):
            job.parts = [part for part in job.parts if part.left]
            if not job.parts:
                jobs.remove(job)
                seconds = now - job.arrival.at
                done.served.append(Served(job.arrival, job.choice, seconds, job.foreseen))
                if job.foreseen:
                    controller.learned.end(late=not done.served[-1].kept)
    return done


def _begun(
    arrival: Arrival,
    place: Place,
    controller: Controller,
    jobs: Sequence[_Job],
    served: dict[str, float],
    elastic: bool,
    now: float,
) -> _Job | None:
    limit = arrival.deadline_seconds
    deadline = arrival.at + (limit if limit is not None else 1e6)
    ask = Ask(arrival.owner, arrival.images, place, arrival.choices, deadline)
    choice, foreseen = max(arrival.choices, key=lambda c: c.quality), 0.0
    if elastic and limit is not None:
        loads = [part.now for job in jobs for part in job.parts]
        decided = controller.decide(ask, loads, served, now)
        if not isinstance(decided, Promise):
            return None
        choice, foreseen = decided.choice, decided.seconds + now - arrival.at
    loads = controller.loads_of(ask, choice)
    if limit is None:
        controller.noticed(ask, choice, now)
        loads = [replace(load, promised=False, elastic=False) for load in loads]
    parts = [_Part(load, load.left) for load in loads]
    return _Job(arrival, choice, parts, foreseen)
