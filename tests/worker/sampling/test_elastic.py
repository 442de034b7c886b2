"""Decisions for elastic requests, alone and through the simulator of `benchmarks.elastic`."""

import statistics
from dataclasses import replace

import pytest

from benchmarks.elastic.arrivals import Rate, bursts, constant, diurnal, flash_crowd, poisson
from benchmarks.elastic.simulator import Arrival, Simulation, simulate
from worker.sampling.elastic import (
    MARGIN_RANGE,
    MOST_BETWEEN,
    Ask,
    Choice,
    Controller,
    Learned,
    Load,
    Pace,
    Place,
    Promise,
    Refusal,
    forecast,
)

FULL_ROWS = 32
SIZES = ((1.0, 12), (0.95, 8), (0.88, 5), (0.8, 3), (0.7, 2))
CHOICES = tuple(Choice(quality, depth, 10, range(2, 8)) for quality, depth in SIZES)
FULL, LEAST = CHOICES[0], CHOICES[-1]


def seconds_of_rows(rows: float) -> float:
    return 0.004 + 0.001 * rows


PLACE = Place("family", 12, FULL_ROWS, seconds_of_rows)
CAPACITY = 1 / (2 * PLACE.image_seconds(FULL))
"""Requests a second for two images each that the full size can serve."""


def arriving(rate: Rate, most: float, seconds: float, **fields: object) -> list[Arrival]:
    chosen = {"images": 2, "deadline_seconds": 1.0, "choices": CHOICES, **fields}
    return [Arrival(at, **chosen) for at in poisson(rate, most, seconds, seed=1)]  # type: ignore[arg-type]


def at_times(times: float, seconds: float = 12, **fields: object) -> Simulation:
    """Simulation of so many times what the full size can serve."""
    arrivals = arriving(constant(times * CAPACITY), times * CAPACITY, seconds, **fields)
    return simulate(arrivals, PLACE, Controller())


def ask(**fields: object) -> Ask:
    asked = {"owner": "", "images": 2, "place": PLACE, "choices": CHOICES, "deadline": 1.0}
    return Ask(**{**asked, **fields})  # type: ignore[arg-type]


def decided(controller: Controller, loads: list[Load], **fields: object) -> Promise | Refusal:
    return controller.decide(ask(**fields), loads, {}, 0.0)


def test_alone_a_request_gets_the_best_that_is_there_in_time() -> None:
    promise = decided(Controller(), [])
    assert isinstance(promise, Promise)
    assert promise.choice is FULL
    step, guided = seconds_of_rows(2), seconds_of_rows(4)
    assert promise.seconds == pytest.approx(4 * step + 6 * guided, rel=0.3)
    sooner = decided(Controller(), [], deadline=0.06)
    assert isinstance(sooner, Promise)
    assert LEAST.quality < sooner.choice.quality < FULL.quality


def test_what_even_the_least_cannot_keep_is_refused_for_good() -> None:
    refusal = decided(Controller(), [], deadline=0.005)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_seconds is None
    assert refusal.least_seconds > 0.005


def test_what_cannot_be_kept_beside_others_is_refused_for_so_long() -> None:
    ahead = [Load("", PLACE, 0.5 + i / 1000, FULL_ROWS, 12, 25, promised=True) for i in range(3)]
    refusal = decided(Controller(), ahead)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_seconds is not None
    assert refusal.retry_seconds >= 1
    late = decided(Controller(), ahead, yields=False)
    assert late == Promise(LEAST, late.seconds, kept=False)  # type: ignore[union-attr]


def test_no_promise_is_given_that_breaks_another() -> None:
    first = [Load("", PLACE, 0.9, FULL_ROWS, 12, 13, promised=True)]
    alone = forecast(first, 0.0)[0]
    assert alone < 0.9
    assert isinstance(decided(Controller(), first, deadline=0.5, images=8), Promise)
    tight = [replace(first[0], deadline=0.58)]  # it would run after what comes
    assert isinstance(decided(Controller(), [], deadline=0.5, images=32), Promise)
    assert isinstance(decided(Controller(), tight, deadline=0.5, images=32), Refusal)
    last = decided(Controller(), tight, deadline=0.5, images=8)  # there is time, if not to spare
    assert isinstance(last, Promise)
    assert last.choice is LEAST
    broken = [Load("", PLACE, 0.1, FULL_ROWS, 12, 13, promised=True)]
    assert isinstance(decided(Controller(), broken), Promise)  # it is late whatever comes


def test_a_forecast_runs_together_what_fits_and_the_rest_after_it() -> None:
    halves = [Load("", PLACE, 1.0, FULL_ROWS / 2, 12, 10) for _ in range(3)]
    first, second, third = forecast(halves, 5.0)
    together = 10 * seconds_of_rows(FULL_ROWS)
    assert first == second == pytest.approx(5 + together)
    assert third == pytest.approx(5 + together + 10 * seconds_of_rows(FULL_ROWS / 2))


def test_a_forecast_keeps_out_what_would_break_a_promise() -> None:
    promised = Load("", PLACE, 0.0, FULL_ROWS / 2, 12, 10, promised=True)
    alone = forecast([promised], 0.0)[0]
    together = 10 * seconds_of_rows(FULL_ROWS)
    one_more = replace(promised, promised=False)
    tight = replace(promised, deadline=(alone + together) / 2)
    first, second, third = forecast([tight, one_more, replace(one_more, rows=1)], 0.0)
    assert first == pytest.approx(alone)
    assert second == pytest.approx(alone + 10 * seconds_of_rows(FULL_ROWS / 2 + 1))
    assert third == pytest.approx(second)
    loose = replace(promised, deadline=2 * together)
    assert forecast([loose, one_more], 0.0) == pytest.approx([together, together])


def test_the_quickest_is_promised_with_less_to_spare_than_others() -> None:
    """Quickest by what steps were seen to take, which is not the smallest."""
    controller = Controller()
    place = replace(PLACE, ratio=lambda deepest: 40.0 if deepest == LEAST.depth else 1.0)
    quickest = min(CHOICES, key=place.image_seconds)
    assert quickest.depth > LEAST.depth
    seconds = forecast(controller.loads_of(ask(place=place), quickest), 0.0)[0]
    seconds += controller.learned.overhead_seconds
    for margin, kind in ((1.31, Promise), (1.2, Promise), (1.1, Refusal)):
        assert isinstance(decided(controller, [], place=place, deadline=margin * seconds), kind)


def test_a_layer_takes_what_the_rows_that_need_it_take() -> None:
    mixed = PLACE.seconds([(12, 4), (3, 8)])
    assert mixed == pytest.approx(0.25 * seconds_of_rows(12) + 0.75 * seconds_of_rows(4))
    assert Place("", 12, 32, seconds_of_rows, lambda _: 2.0).seconds([(12, 4)]) == pytest.approx(
        2 * seconds_of_rows(4)
    )


@pytest.mark.parametrize(
    ("times", "least_kept", "most_refused", "quality"),
    [
        (0.5, 1.0, 0.0, (1.0, 1.0)),
        (1.0, 1.0, 0.0, (0.96, 1.0)),
        (2.0, 0.99, 0.0, (0.85, 0.95)),
        (4.0, 0.97, 0.02, (0.74, 0.85)),
    ],
)
def test_promises_hold_at_any_load_and_sizes_pay_for_it(
    times: float, least_kept: float, most_refused: float, quality: tuple[float, float]
) -> None:
    done = at_times(times)
    assert done.share_kept() >= least_kept
    assert done.share_refused() <= most_refused
    least, most = quality
    assert least <= done.quality() <= most


def test_fixed_sizes_do_worse() -> None:
    arrivals = arriving(constant(2 * CAPACITY), 2 * CAPACITY, 8)
    fixed = simulate(arrivals, PLACE, Controller(), elastic=False)
    assert fixed.share_kept() < 0.2
    least = arriving(constant(2 * CAPACITY), 2 * CAPACITY, 8, choices=(LEAST,))
    assert simulate(least, PLACE, Controller()).quality() == pytest.approx(LEAST.quality)


def test_sizes_do_not_swing_while_the_load_stays() -> None:
    done = at_times(2.0, seconds=20)
    each = [done.quality(second, second + 1) for second in range(4, 19)]
    assert statistics.pstdev(each) < 0.03


@pytest.mark.parametrize(
    ("rate", "most"),
    [
        (flash_crowd(0.3 * CAPACITY, 10, 4, 8), 3 * CAPACITY),
        (bursts(0.8 * CAPACITY, 2, 0.5), 3.2 * CAPACITY),
        (diurnal(1.5 * CAPACITY, 12), 2.7 * CAPACITY),
    ],
)
def test_promises_hold_when_the_load_changes(rate: Rate, most: float) -> None:
    done = simulate(arriving(rate, most, 12), PLACE, Controller())
    assert done.share_kept() >= 0.98
    assert done.share_refused() <= 0.05


def test_what_was_measured_in_a_hurry_has_wider_margins() -> None:
    hurried = replace(PLACE, estimated=True)
    known, estimated = (decided(Controller(), [], place=p, deadline=0.12) for p in (PLACE, hurried))
    assert isinstance(known, Promise)
    assert isinstance(estimated, Promise)
    assert (known.estimated, estimated.estimated) == (False, True)
    assert estimated.choice.depth < known.choice.depth


def test_sizes_come_back_when_the_crowd_has_gone() -> None:
    rate = flash_crowd(0.3 * CAPACITY, 10, 4, 8)
    done = simulate(arriving(rate, 3 * CAPACITY, 24), PLACE, Controller())
    assert done.quality(0, 4) == 1.0
    assert done.quality(5, 8) < 0.93
    assert done.quality(18, 24) == 1.0


def test_a_device_that_is_slower_than_it_was_measured_is_learned_from() -> None:
    controller = Controller()
    arrivals = arriving(constant(1.2 * CAPACITY), 1.2 * CAPACITY, 20)
    done = simulate(arrivals, PLACE, controller, slower=lambda _: 1.4)
    later = Simulation([s for s in done.served if s.arrival.at > 5], [])
    assert later.share_kept() >= 0.97


def test_an_engine_that_is_busy_with_more_than_steps_is_learned_from() -> None:
    arrivals = arriving(constant(1.2 * CAPACITY), 1.2 * CAPACITY, 20)
    done = simulate(arrivals, PLACE, Controller(), slower=lambda _: 1.3, between=1.6)
    later = Simulation([s for s in done.served if s.arrival.at > 5], [])
    assert later.share_kept() >= 0.98
    assert later.share_refused() <= 0.01


def test_a_greedy_owner_pays_with_size_and_a_modest_one_does_not() -> None:
    greedy = arriving(constant(3 * CAPACITY), 3 * CAPACITY, 12, owner="greedy")
    modest = arriving(constant(0.2 * CAPACITY), 0.2 * CAPACITY, 12, owner="modest")
    done = simulate([*greedy, *modest], PLACE, Controller())
    assert done.share_kept() >= 0.97

    def quality(owner: str) -> float:
        found = [s for s in done.served if s.arrival.owner == owner and s.arrival.at > 3]
        return statistics.mean(s.choice.quality for s in found if s.choice)

    assert quality("modest") > quality("greedy") + 0.1


def test_the_pace_shares_the_device_between_those_who_ask() -> None:
    pace = Pace(seconds=1.0)
    for owner, images in (("greedy", 90), ("modest", 1)):
        pace.arrived(owner, images, 0.05, now=0.0)
    assert pace.image_seconds("modest", 0.9, 0.0) == float("inf")
    rest = 0.9 - 0.05
    assert pace.image_seconds("greedy", 0.9, 0.0) == pytest.approx(rest / 90)
    pace.took("greedy", rest / 90, 0.25 * rest / 90)
    assert pace.image_seconds("greedy", 0.9, 0.0) == pytest.approx(1.75 * rest / 90)
    assert pace.image_seconds("greedy", 0.9, 60.0) == float("inf")
    assert pace.image_seconds("new", 0.9, -1e9) == float("inf")  # of a clock that jumps


def test_margins_follow_what_happens() -> None:
    learned = Learned()
    for number in range(2000):  # as many are broken as may be
        learned.end(late=number % 200 == 0)
    assert learned.margin == pytest.approx(1.3, rel=0.06)
    for _ in range(2000):
        learned.end(late=False)
    assert learned.margin == MARGIN_RANGE[0]
    for _ in range(100):
        learned.end(late=True)
    assert learned.margin == MARGIN_RANGE[1]


def test_a_promise_that_others_use_to_its_end_widens_no_margin() -> None:
    controller = Controller()
    arrivals = arriving(constant(2 * CAPACITY), 2 * CAPACITY, 20)
    done = simulate(arrivals, PLACE, controller)
    later = [each for each in done.served if each.seconds > 1.3 * each.foreseen]
    assert len(later) > 0.05 * len(arrivals)
    assert done.share_kept() > 0.99
    assert controller.learned.margin < 1.3


def test_what_comes_between_steps_is_learned() -> None:
    learned = Learned()
    assert learned.between_steps == 1.0
    learned.step("deep", 1.0, 2.0)
    for _ in range(200):
        learned.turned(0.3, 0.2)
    assert learned.between_steps == pytest.approx(1.5, rel=0.01)
    assert learned.ratio("deep") == pytest.approx(3.0, rel=0.01)
    for _ in range(200):
        learned.turned(0.2, 0.2)
    assert learned.between_steps == pytest.approx(1.0, rel=0.01)
    for _ in range(200):
        learned.turned(9.0, 0.0)
    assert learned.between_steps == MOST_BETWEEN


def test_steps_are_learned_by_kind_and_by_the_median() -> None:
    learned = Learned()
    assert learned.ratio("deep") == 1.0
    for seconds in (2.0, 2.0, 50.0):
        learned.step("deep", 1.0, seconds)
    assert learned.ratio("deep") == learned.ratio("shallow") == 2.0
    learned.step("shallow", 1.0, 3.0)
    assert learned.ratio("shallow") == 3.0
    learned.step("none", 0.0, 1.0)
    assert learned.ratio("deep") == 2.0
    before = learned.overhead_seconds
    learned.delivered(0.5)
    assert learned.overhead_seconds == pytest.approx(before + 0.5)
