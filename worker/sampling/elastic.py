"""Elastic requests: which size each is served by, so that all that is promised is kept.

Pure code: what waits and runs, what steps take and what time it is come in; a choice, or a refusal,
goes out. The engine asks it (`worker.sampling.engine`), and so does a simulator
(`benchmarks.elastic.simulator`).

Two things decide. The *pace* is how much of the device an image may take if as much is to go as
comes: it falls when many ask, and sizes with it, before anything is late. The *forecast* steps
through everything that is there, in the order in which it would run, and says when each would end:
what would break a promise, its own or another's, is not chosen.
"""

import bisect
import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from worker.sampling.turns import in_turn

PACE_SECONDS = 4.0
"""Seconds, about, over which arrivals are averaged; over fewer, chance alone changes sizes."""
USED_SHARE = 0.9
"""Share of the device that promises may use; the rest is for what nobody foresees."""
CALM_BACKLOG, FULL_BACKLOG = 0.2, 0.5
"""Backlogs, as shares of what a request has left until its end: up to the first its size is the
pace's alone, at the second it is the smallest."""
FIRST_MARGIN = 1.3
"""Ratio by which a forecast may be wrong, until some have been seen to come true."""
ESTIMATED_MARGIN = 1.5
"""Further ratio where what a step takes was measured in a hurry."""
OTHERS_SHARE = 0.5
"""Share of the margin that others' promises keep when one more is given: the engine's turns let
nobody in who would make them late."""
LAST_SHARE = 0.5
"""Share of the margin with which the quickest choice is promised where nothing else can be."""
MARGIN_RANGE = (1.05, 2.5)
MARGIN_STEP, MARGIN_MISSES = 0.05, 0.005
"""Steps by which the margin follows what happens, so that such a share of promises is broken."""
ANSWER_SECONDS = 0.02
"""Seconds, about, in which a caller has the answer once the images are stored."""
FORGOTTEN = 1e-3
"""Share of the device below which an owner is nobody that the device has to be shared with."""
CROWDED = 1.1
"""Ratio by which elastic requests may slow down those of a modest owner, while they have time."""
STEPS_SEEN = 64
"""Last steps whose seconds are compared with what was expected of them."""
MOST_BETWEEN = 4.0
"""Most times its steps that an engine is thought to take for them and all between them."""
TURN_SECONDS = 1.0
"""Seconds, about, over which the engine's time is averaged: a crowd is there within a second."""
MOST_RETRY_SECONDS = 60


@dataclass(frozen=True)
class Choice:
    """A way to serve a request: a size by a sampling."""

    quality: float
    depth: int
    num_inference_steps: int
    guided: range = range(0)
    """Steps that are guided."""
    guide_depth: int = 0
    """Depth of the size that guides; 0 is the model itself."""

    @property
    def rows(self) -> float:
        """Rows of an image in a step of this depth, in the mean of its steps."""
        guiding = len(self.guided) * (self.guide_depth or self.depth) / self.depth
        return 1 + guiding / self.num_inference_steps

    @property
    def layer_rows(self) -> float:
        """Rows of an image times the layers that they run through, of all steps."""
        return self.num_inference_steps * self.depth * self.rows


@dataclass(frozen=True)
class Place:
    """Family and dtype whose rows are one batch, and what its steps take."""

    key: Hashable
    """What alone tells one place from another."""
    depth: int = field(compare=False)
    """Depth of the full size, whose steps are known."""
    full_rows: int = field(compare=False)
    step_seconds: Callable[[float], float] = field(compare=False)
    """Seconds of a step of the full size, by its rows."""
    ratio: Callable[[float], float] = field(default=lambda _: 1.0, compare=False)
    """What steps were seen to take over what is expected, by the depth of their deepest row."""
    estimated: bool = field(default=False, compare=False)
    """Whether those seconds were measured in a hurry."""

    def seconds(self, depths: Sequence[tuple[float, float]]) -> float:
        """Seconds of a step of rows of several depths, (depth, rows) each."""
        return self.expected(depths) * self.ratio(max(depth for depth, _ in depths))

    def expected(self, depths: Iterable[tuple[float, float]]) -> float:
        """The same before anything was seen: a layer takes what the rows that need it take."""
        deepest_first = sorted(depths, reverse=True)
        below = [*(depth for depth, _ in deepest_first[1:]), 0.0]
        rows = seconds = 0.0
        for (depth, more), next_depth in zip(deepest_first, below, strict=True):
            rows += more
            if depth > next_depth:
                seconds += self.step_seconds(rows) * (depth - next_depth) / self.depth
        return seconds

    def image_seconds(self, choice: Choice) -> float:
        """Seconds of the device that an image takes of a full batch."""
        full = self.step_seconds(self.full_rows) * self.ratio(choice.depth) / self.full_rows
        return choice.layer_rows / self.depth * full


@dataclass(frozen=True)
class Load:
    """Images of one request that are there, or that would be: a contender of `turns`."""

    owner: str
    place: Place
    deadline: float
    rows: float
    depth: float
    left: int
    """Number of steps that it still needs."""
    promised: bool = False
    """Whether its end was promised; else nobody is told when it comes."""
    elastic: bool = False
    """Whether it came as an elastic request."""

    @property
    def device_seconds(self) -> float:
        full_rows = self.place.full_rows
        full = self.place.step_seconds(full_rows) * self.place.ratio(self.depth) / full_rows
        return self.left * self.rows * self.depth / self.place.depth * full


@dataclass(frozen=True)
class Ask:
    """An elastic request, as it comes."""

    owner: str
    images: int
    place: Place
    choices: Sequence[Choice]
    """What its caller allows; there is at least one."""
    deadline: float
    """Time by which its images are to be there, by the clock that `now` is of."""
    yields: bool = True
    """Whether it is refused where it cannot be there in time; else it is served late."""


@dataclass(frozen=True)
class Promise:
    choice: Choice
    seconds: float
    """Seconds from now in which the images are foreseen to be there."""
    kept: bool = True
    """Whether that is in time, with all that may go wrong."""
    estimated: bool = False
    """Whether nobody has measured yet what a step takes."""


@dataclass(frozen=True)
class Refusal:
    retry_seconds: int | None
    """Seconds until as much may be asked for again; None where no wait would help."""
    least_seconds: float
    """Seconds that the quickest choice takes when nobody else is there."""


def forecast(loads: Sequence[Load], now: float) -> list[float]:
    """When each load ends, if they run in this order and nothing else comes.

    Those that fit in a batch run together, and one that ends makes room for the next. Where one
    more would break a promise that was given it waits (see `turns.choose`), and those after it.
    """
    left = [load.left for load in loads]
    ends = [now] * len(loads)
    waiting, running = [i for i, steps in enumerate(left) if steps > 0], list[int]()

    while running or waiting:
        held: dict[Hashable, float] = {}
        for i in running:
            held[loads[i].place.key] = held.get(loads[i].place.key, 0.0) + loads[i].rows
        seconds = step_seconds(loads[i] for i in running)
        still, closed = [], False
        for i in waiting:
            place, before = loads[i].place, held.get(loads[i].place.key, 0.0)
            if closed or (before and before + loads[i].rows > place.full_rows):
                still.append(i)
                continue
            slower = step_seconds(loads[j] for j in (*running, i))
            closed = any(
                now + left[j] * seconds <= loads[j].deadline < now + left[j] * slower
                for j in running
                if loads[j].promised
            )
            if closed:
                still.append(i)
                continue
            held[place.key], seconds = before + loads[i].rows, slower
            running.append(i)
        waiting = still
        steps = min(left[i] for i in running)
        now += steps * seconds
        for i in running:
            left[i] -= steps
            ends[i] = now
        running = [i for i in running if left[i]]
    return ends


P = TypeVar("P")


def uncrowded(
    chosen: Sequence[tuple[P, Load]], modest: Callable[[str], bool], now: float
) -> list[P]:
    """Those of the chosen that leave the requests of modest owners about the speed that they have
    alone: elastic ones of others give way to them while they have time."""
    firm = [load for _, load in chosen if not load.elastic]
    guarded = {load.owner for load in firm if modest(load.owner)}
    if not guarded:
        return [part for part, _ in chosen]
    alone, beside, kept = step_seconds(firm), list(firm), []
    wait = alone * max(load.left for load in firm)
    for part, load in chosen:
        if load.elastic and load.owner not in guarded:
            late = now + wait + load.left * step_seconds([load]) > load.deadline
            if not late and step_seconds([*beside, load]) > CROWDED * alone:
                continue
            beside.append(load)
        kept.append(part)
    return kept


def step_seconds(loads: Iterable[Load]) -> float:
    """Seconds of one step of all these loads, place after place."""
    of_place: dict[Place, list[tuple[float, float]]] = {}
    for load in loads:
        of_place.setdefault(load.place, []).append((load.depth, load.rows))
    return sum(place.seconds(depths) for place, depths in of_place.items())


class Pace:
    """How many seconds of the device an image may take, so that as much goes as comes.

    Each owner has an equal share of the device, and what others do not use of theirs.
    """

    def __init__(self, seconds: float = PACE_SECONDS) -> None:
        self._seconds = seconds
        self._rates: dict[str, tuple[float, float, float]] = {}
        """Of each owner: images a second, seconds of the device a second if each got the best of
        what it allows, and when that was."""
        self._credit: dict[str, float] = {}

    def arrived(self, owner: str, images: int, best_seconds: float, now: float) -> None:
        """Note that somebody asks for so many images, the best of which take so long each."""
        rate, load = self._now(owner, now)
        more = images / self._seconds
        self._rates[owner] = rate + more, load + more * best_seconds, now

    def is_modest(self, owner: str, now: float) -> bool:
        """Whether an owner asks for less than an equal part of the device."""
        loads = [self._now(other, now)[1] for other in self._rates]
        there = sum(load > FORGOTTEN for load in loads)
        return self._now(owner, now)[1] < USED_SHARE / max(1, there)

    def _now(self, owner: str, now: float) -> tuple[float, float]:
        rate, load, at = self._rates.get(owner, (0.0, 0.0, now))
        faded = math.exp(min(0.0, at - now) / self._seconds)
        return rate * faded, load * faded

    def image_seconds(self, owner: str, share: float, now: float) -> float:
        """Seconds of the device that one more image of this owner may take, of such a share of it;
        infinite where there is more than anybody wants."""
        loads = {other: self._now(other, now)[1] for other in self._rates}
        for other in [o for o, load in loads.items() if load < FORGOTTEN and o != owner]:
            self._rates.pop(other)
            self._credit.pop(other, None)
            loads.pop(other)
        own = _fair_share(loads, share).get(owner, share)
        if own >= loads.get(owner, 0.0):
            self._credit[owner] = 0.0
            return math.inf
        return own / self._now(owner, now)[0] + self._credit.get(owner, 0.0)

    def took(self, owner: str, allowed: float, seconds: float) -> None:
        """Note what was taken of what an image might: what is left is for the next."""
        if allowed < math.inf:
            before = self._credit.get(owner, 0.0)
            fair = allowed - before
            self._credit[owner] = max(-fair, min(allowed - seconds, fair))


def _fair_share(wanted: Mapping[str, float], share: float) -> dict[str, float]:
    """Max-min fair parts of a share: who wants less than an equal part leaves it to the others."""
    given: dict[str, float] = {}
    for n, owner in enumerate(sorted(wanted, key=lambda owner: wanted[owner])):
        given[owner] = min(wanted[owner], share / (len(wanted) - n))
        share -= given[owner]
    return given


@dataclass
class Learned:
    """What steps and ends were, beside what they were expected to be."""

    margin: float = FIRST_MARGIN
    """Ratio by which a forecast is multiplied before it is promised."""
    overhead_seconds: float = ANSWER_SECONDS
    """Seconds from the engine's end to the caller's: pictures, store, answer."""
    _ratios: dict[Hashable, deque[float]] = field(default_factory=dict)
    _medians: dict[Hashable, float] = field(default_factory=dict)
    _turning: float = TURN_SECONDS
    _stepping: float = TURN_SECONDS
    _overheads: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_SEEN))

    def step(self, key: Hashable, expected: float, seconds: float) -> None:
        """Note the seconds of a step of some kind."""
        if expected > 0:
            ratios = self._ratios.setdefault(key, deque(maxlen=STEPS_SEEN))
            ratios.append(seconds / expected)
            self._medians[key] = statistics.median(ratios)

    def ratio(self, key: Hashable) -> float:
        """Median of the last steps of a kind over what was expected, of kinds that were seen for a
        new one; and what comes between steps.
        """
        return (self._medians.get(key) or self._of_all) * self.between_steps

    @property
    def slowdown(self) -> float | None:
        """The same of all kinds; None before a step was seen."""
        return self._of_all * self.between_steps if self._medians else None

    @property
    def _of_all(self) -> float:
        return statistics.median(list(self._medians.values())) if self._medians else 1.0

    def turned(self, seconds: float, stepping: float) -> None:
        """Note the seconds of a turn of the engine, of which so many went into steps."""
        fade = math.exp(-seconds / TURN_SECONDS)
        self._turning = self._turning * fade + seconds
        self._stepping = self._stepping * fade + stepping

    @property
    def between_steps(self) -> float:
        """Ratio of the engine's time to that of its steps: it also decides, composes and decodes,
        the more of it the more requests come."""
        return min(max(1.0, self._turning / max(self._stepping, 1e-9)), MOST_BETWEEN)

    def delivered(self, seconds: float) -> None:
        """Note how long the images of a request took to be stored once they were there."""
        self._overheads.append(seconds)
        self.overhead_seconds = ANSWER_SECONDS + statistics.median(list(self._overheads))

    def end(self, *, late: bool) -> None:
        """Note whether a promise was broken. That it came later than foreseen says nothing: who
        comes after it may take what time it has left."""
        moved = self.margin * math.exp(MARGIN_STEP * (late - MARGIN_MISSES))
        least, most = MARGIN_RANGE
        self.margin = min(max(moved, least), most)


class Controller:
    """Decides, for each request as it comes, by what it is served."""

    def __init__(self) -> None:
        self.pace, self.learned = Pace(), Learned()

    def noticed(self, ask: Ask, choice: Choice, now: float) -> None:
        """Note a request that is not elastic, and is served by this."""
        self.pace.arrived(ask.owner, ask.images, ask.place.image_seconds(choice), now)

    def decide(
        self, ask: Ask, loads: Sequence[Load], served: Mapping[str, float], now: float
    ) -> Promise | Refusal:
        """A promise, or a refusal where none could be kept and the caller will not wait.

        `loads` is what is there; `served` the rows stepped for each owner, as `turns` has them.
        """
        seconds = {choice: ask.place.image_seconds(choice) for choice in ask.choices}
        best_first = sorted(ask.choices, key=lambda c: (-c.quality, seconds[c]))
        self.pace.arrived(ask.owner, ask.images, seconds[best_first[0]], now)
        allowed = self._allowed(ask, loads, now)
        quickest = min(best_first, key=lambda c: seconds[c])
        within = [c for c in best_first if seconds[c] <= allowed] or [quickest]
        late = self._late(loads, served, now)
        estimated, margin = ask.place.estimated, self._margin(ask.place)
        ends: dict[Choice, float] = {}

        def fits(choice: Choice) -> bool:
            ends[choice], breaks = self._end(ask, choice, loads, served, now, late)
            return not breaks and now + (ends[choice] - now) * margin <= ask.deadline

        # less work ends earlier, and a look at each would take as long as the work itself
        tried = [*(choice for choice in within if choice != quickest), quickest]
        first = bisect.bisect_left(tried, True, key=fits)
        chosen = tried[first] if first < len(tried) else None
        end = ends[quickest if chosen is None else chosen]
        hoped = 1 + LAST_SHARE * (margin - 1)
        if chosen is None and now + (end - now) * hoped <= ask.deadline:
            end, breaks = self._end(ask, quickest, loads, served, now, late, others_share=0.0)
            chosen = None if breaks else quickest  # refused, it were not there for certain
        if chosen is not None:
            for _ in range(ask.images):
                self.pace.took(ask.owner, allowed, seconds[chosen])
            return Promise(chosen, end - now, estimated=estimated)
        if not ask.yields:
            return Promise(quickest, end - now, kept=False, estimated=estimated)
        alone = self._end(ask, quickest, (), served, now, set())[0] - now
        if now + alone * margin > ask.deadline:
            return Refusal(None, alone * margin)
        wait = math.ceil(max(now + (end - now) * margin - ask.deadline, 1.0))
        return Refusal(min(wait, MOST_RETRY_SECONDS), alone * margin)

    def _allowed(self, ask: Ask, loads: Sequence[Load], now: float) -> float:
        """Seconds of the device that each image of this request may take."""
        ahead = sum(load.device_seconds for load in loads)
        slack = max(ask.deadline - now, 1e-6)
        allowed = self.pace.image_seconds(ask.owner, USED_SHARE, now)
        calm, full = CALM_BACKLOG * slack, FULL_BACKLOG * slack
        if ahead <= calm:
            return allowed
        best = max(ask.place.image_seconds(choice) for choice in ask.choices)
        return min(allowed, best) * max(0.0, (full - ahead) / (full - calm))

    def _late(self, loads: Sequence[Load], served: Mapping[str, float], now: float) -> set[int]:
        """Those of `loads` (by id) whose promise is broken already, and so bounds nobody."""
        ordered = in_turn(loads, served)
        ends = zip(ordered, self._ends(ordered, now), strict=True)
        return {id(load) for load, end in ends if self._breaks(load, end, now, OTHERS_SHARE)}

    def _end(
        self,
        ask: Ask,
        choice: Choice,
        loads: Sequence[Load],
        served: Mapping[str, float],
        now: float,
        late: set[int],
        others_share: float = OTHERS_SHARE,
    ) -> tuple[float, bool]:
        """When a request would end by a choice, and whether it would break another's promise."""
        own = self.loads_of(ask, choice)
        ordered = in_turn([*loads, *own], served)
        ends = dict(zip(map(id, ordered), self._ends(ordered, now), strict=True))
        breaks = any(
            self._breaks(load, ends[id(load)], now, others_share)
            for load in loads
            if id(load) not in late
        )
        return max(ends[id(load)] for load in own), breaks

    def _ends(self, ordered: Sequence[Load], now: float) -> list[float]:
        """Ends as they are foreseen, with what comes after the engine."""
        return [end + self.learned.overhead_seconds for end in forecast(ordered, now)]

    def _margin(self, place: Place) -> float:
        """Ratio by which a forecast may be wrong."""
        return self.learned.margin * (ESTIMATED_MARGIN if place.estimated else 1.0)

    def _breaks(self, load: Load, end: float, now: float, share: float) -> bool:
        """Whether an end that is foreseen would break a promise, by such a share of the margin."""
        margin = 1 + share * (self.learned.margin - 1)
        return load.promised and now + (end - now) * margin > load.deadline

    @staticmethod
    def loads_of(ask: Ask, choice: Choice) -> list[Load]:
        """What a request is by a choice: images that fit in a batch together are one load."""
        most = max(1, int(ask.place.full_rows / (2 if choice.guided else 1)))
        counts = [min(most, ask.images - at) for at in range(0, ask.images, most)]
        return [
            Load(
                ask.owner,
                ask.place,
                ask.deadline,
                rows=count * choice.rows,
                depth=choice.depth,
                left=choice.num_inference_steps,
                promised=True,
                elastic=True,
            )
            for count in counts
        ]
