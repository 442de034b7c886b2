"""What the engine promises: its state in the words of `elastic`, and what has come of it."""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from learngenes.measuring.steps import StepCosts
from registry import metrics
from registry.errors import Refused
from worker.sampling.elastic import (
    Ask,
    Choice,
    Controller,
    Load,
    Place,
    Promise,
    forecast,
    uncrowded,
)
from worker.sampling.jobs import Elastic, Job, JobPart, SampleRequest, choice_of
from worker.sampling.residency import Pool
from worker.sampling.turns import in_turn

GAUGED_SECONDS = 5.0
"""Seconds over which gauges are taken."""
WORTH_STEPS = 2
"""Fewest steps that are left where going on by a smaller size is worth composing it."""


class Expected(NamedTuple):
    """What a step of a batch is expected to take."""

    kind: Hashable
    seconds: float


class Promises:
    """Promises of one engine, whose thread alone calls what does not say otherwise."""

    def __init__(
        self,
        pool_of: Callable[[SampleRequest], Pool],
        costs_of: Callable[[Pool], StepCosts],
        is_estimated: Callable[[Pool], bool],
    ) -> None:
        """`is_estimated` says whether costs were measured in a hurry."""
        self.controller = Controller()
        self._pool_of, self._costs_of, self._is_estimated = pool_of, costs_of, is_estimated
        self._recent: deque[tuple[float, int]] = deque()
        """When, and by which depths, the last requests were served."""
        self._depth: float | None = None
        """Mean of those depths; what it was last, where nothing has come for a while."""
        self._counting = threading.Lock()

    def decide(
        self, elastic: Elastic, parts: Sequence[JobPart], served: Mapping[str, float]
    ) -> tuple[SampleRequest, Promise]:
        """What a request is served by, and what is promised of it. Raises Refused."""
        best, now = elastic.best, time.monotonic()
        place = self.place(self._pool_of(best))
        ask = Ask(
            best.owner,
            len(best.seeds),
            place,
            tuple(elastic.choices),
            elastic.deadline,
            elastic.yields,
        )
        decided = self.controller.decide(ask, self.loads(parts), served, now)
        if isinstance(decided, Promise):
            metrics.ELASTIC_QUALITY.observe(decided.choice.quality)
            with self._counting:
                self._recent.append((now, decided.choice.depth))
            return elastic.choices[decided.choice], decided
        metrics.PROMISES.labels("refused").inc()
        left = max(0.0, elastic.deadline - now)
        if decided.retry_seconds is None:
            raise Refused(
                f"{left:.2f} s are left for it, and the smallest size that is allowed takes "
                f"{decided.least_seconds:.2f} s even when nobody else is there: allow more, or "
                "ask for fewer images or steps",
                None,
            )
        raise Refused(
            f"it cannot be there in the {left:.2f} s that are left: others are served first; "
            f"retry in {decided.retry_seconds} s, or allow more",
            decided.retry_seconds,
        )

    def gauges(self) -> dict[str, float]:
        """Values of registry.metrics.WORKER_GAUGES; no depth before anything came. Any thread."""
        since = time.monotonic() - GAUGED_SECONDS
        with self._counting:
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
            depths = [depth for _, depth in self._recent]
            self._depth = statistics.mean(depths) if depths else self._depth
        slowdown = self.controller.learned.slowdown
        known = {"elastic_depth": self._depth, "engine_slowdown_ratio": slowdown}
        gauges = {name: value for name, value in known.items() if value is not None}
        return {"elastic_rate": len(depths) / GAUGED_SECONDS, **gauges}

    def place(self, pool: Pool) -> Place:
        costs, learned = self._costs_of(pool), self.controller.learned
        return Place(
            key=pool,
            depth=pool.shared.family.full_size.depth,
            full_rows=min(costs.full_rows, pool.most_rows),
            step_seconds=costs.step_seconds,
            ratio=lambda deepest: learned.ratio(self._kind(pool, deepest)),
            estimated=self._is_estimated(pool),
        )

    def loads(self, parts: Sequence[JobPart]) -> list[Load]:
        """What is there, in the controller's words."""
        places = {pool: self.place(pool) for pool in {part.pool for part in parts}}
        return [self._load(part, places[part.pool]) for part in parts]

    @staticmethod
    def _load(part: JobPart, place: Place) -> Load:
        request, left = part.job.request, part.left
        steps = request.sampling.guided
        guided = len(range(max(steps.start, part.done_steps), steps.stop))
        guide = request.sampling.guide
        guiding = guided * (guide.depth if guide else request.depth) / request.depth
        rows = len(part.seeds) * (1 + guiding / max(1, left))
        promised = part.job.promise is not None and part.job.promise.kept
        elastic = part.job.elastic is not None
        return Load(part.owner, place, part.deadline, rows, request.depth, left, promised, elastic)

    def noticed(self, request: SampleRequest, pool: Pool) -> None:
        """Note a request that is not elastic."""
        ask = Ask(request.owner, len(request.seeds), self.place(pool), (), math.inf)
        self.controller.noticed(ask, choice_of(request), time.monotonic())

    def uncrowded(self, chosen: Sequence[JobPart]) -> list[JobPart]:
        """Those of the chosen that leave modest owners their speed."""
        if not any(part.job.elastic for part in chosen):
            return list(chosen)
        now = time.monotonic()

        def is_modest(owner: str) -> bool:
            return self.controller.pace.is_modest(owner, now)

        loads = self.loads(chosen)
        return uncrowded(list(zip(chosen, loads, strict=True)), is_modest, now)

    def expected(self, parts: Sequence[JobPart]) -> Expected:
        """What the next steps of a batch of parts should take."""
        depths: list[tuple[float, float]] = []
        for part in parts:
            request, own = part.job.request, len(part.seeds)
            depths.append((request.depth, own))
            if more := part.rows - own:
                guide = request.sampling.guide
                depths.append((guide.depth if guide else request.depth, more))
        place = self.place(parts[0].pool)
        deepest = max(depth for depth, _ in depths)
        return Expected(self._kind(parts[0].pool, deepest), place.expected(depths))

    def stepped(self, expected: Expected, seconds: float) -> None:
        """Learn from the seconds of a step."""
        self.controller.learned.step(expected.kind, expected.seconds, seconds)

    def turned(self, seconds: float, stepping: float) -> None:
        """Learn from the seconds of a turn, of which so many went into steps."""
        self.controller.learned.turned(seconds, stepping)

    @staticmethod
    def _kind(pool: Pool, deepest: float) -> Hashable:
        """Kind of steps that take alike more, or less, than is expected."""
        return pool.shared.family.fingerprint, pool.shared.dtype, deepest

    def ended(self, job: Job) -> None:
        """Learn from the end of a request whose end was foreseen."""
        if job.promise is None or job.elastic is None or job.finished_at is None:
            return
        learned = self.controller.learned
        late = job.finished_at + learned.overhead_seconds > job.elastic.deadline
        if job.promise.kept and job.shrunk is None:
            learned.end(late=late)
        metrics.PROMISES.labels("missed" if late else "kept").inc()

    def in_danger(
        self, parts: Sequence[JobPart], served: Mapping[str, float]
    ) -> list[tuple[Job, Choice]]:
        """Jobs whose promise would be broken, and the size by which the rest of their steps keeps
        it, or which is the least of what may be.
        """
        if not any(part.job.promise and part.job.elastic and part.left for part in parts):
            return []
        now, loads = time.monotonic(), self.loads(parts)
        of = {id(load): part for load, part in zip(loads, parts, strict=True)}
        ordered = in_turn(loads, served)
        found = {}
        for load, end in zip(ordered, forecast(ordered, now), strict=True):
            part = of[id(load)]
            job, elastic = part.job, part.job.elastic
            late = load.promised and now < load.deadline < end
            if elastic is None or not (late and elastic.shrinks) or job.shrunk is not None:
                continue
            if part.left < WORTH_STEPS:
                continue
            smaller = [c for c in elastic.choices if _rest_of(c, job.request)]
            if smaller:
                need = (load.deadline - now) / max(end - now, 1e-9) * job.request.depth
                fitting = [c for c in smaller if c.depth <= need]
                found[job] = max(fitting or smaller, key=lambda c: c.depth if fitting else -c.depth)
        return list(found.items())


def _rest_of(choice: Choice, request: SampleRequest) -> bool:
    """Whether a smaller size can make the rest of a request's steps."""
    sampling = request.sampling
    same = (choice.num_inference_steps, choice.guided) == (
        sampling.num_inference_steps,
        sampling.guided,
    )
    guide_depth = sampling.guide.depth if sampling.guide and sampling.guided else 0
    return same and choice.guide_depth == guide_depth and choice.depth < request.depth
