import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import pytest

from worker.sampling.turns import BatchLimits, choose, in_turn

NEVER = float("inf")
NOW = 100.0


@dataclass(eq=False)
class Waiting:
    owner: str = "a"
    deadline: float = NEVER
    rows: int = 2
    left: int = 10
    place: Hashable = "here"


def limited(rows: int, seconds: Callable[[int], float] = lambda rows: 0.1 * rows) -> BatchLimits:
    return BatchLimits(rows, seconds)


def chosen(
    candidates: Sequence[Waiting],
    rows: int = 8,
    served: dict[str, float] | None = None,
    seconds: Callable[[int], float] = lambda rows: 0.1 * rows,
) -> list[Waiting]:
    return choose(candidates, served or {}, lambda _: limited(rows, seconds), NOW)


# Whose turn it is


def test_of_one_owners_the_earliest_deadline_comes_first() -> None:
    late, early, middle = (Waiting(deadline=deadline) for deadline in (30, 10, 20))
    assert in_turn([late, early, middle], {}) == [early, middle, late]


def test_those_with_one_deadline_keep_their_order() -> None:
    waiting = [Waiting() for _ in range(5)]
    assert in_turn(waiting, {}) == waiting


def test_the_owner_that_was_served_least_comes_first() -> None:
    busy = Waiting("busy", deadline=1)
    new = Waiting("new", deadline=50)
    assert in_turn([busy, new], {"busy": 100.0, "new": 20.0}) == [new, busy]


def test_owners_take_turns_by_rows() -> None:
    small = [Waiting("small", rows=1) for _ in range(4)]
    large = [Waiting("large", deadline=5, rows=3) for _ in range(2)]
    order = in_turn([*small, *large], {})
    assert [c.owner for c in order] == ["large", "small", "small", "small", "large", "small"]


def test_an_owner_catches_up_before_it_alternates() -> None:
    behind = [Waiting("behind") for _ in range(4)]
    ahead = [Waiting("ahead") for _ in range(2)]
    order = in_turn([*ahead, *behind], {"ahead": 3.0})
    assert [c.owner for c in order] == ["behind", "behind", "ahead", "behind", "ahead", "behind"]


def test_everybody_gets_a_turn() -> None:
    generator = random.Random(0)
    for _ in range(50):
        waiting = [
            Waiting(generator.choice("abc"), generator.random(), generator.randint(1, 9))
            for _ in range(generator.randint(0, 20))
        ]
        order = in_turn(waiting, {"a": 4.0})
        assert Counter(order) == Counter(waiting)


# Who runs


def test_nobody_waits_where_everybody_fits() -> None:
    waiting = [Waiting() for _ in range(4)]
    assert chosen(waiting, rows=8) == waiting


def test_nobody_is_chosen_where_nobody_waits() -> None:
    assert chosen([]) == []


def test_a_smaller_one_takes_the_room_that_is_too_little_for_one_before_it() -> None:
    first, large, small = (Waiting(deadline=i, rows=rows) for i, rows in enumerate((6, 4, 2)))
    assert chosen([first, large, small]) == [first, small]


def test_one_runs_however_large() -> None:
    large, small = Waiting(deadline=1, rows=50), Waiting(deadline=2)
    assert chosen([large, small]) == [large]


@pytest.mark.parametrize("rows", [0, -5])
def test_one_runs_where_there_is_no_room_at_all(rows: int) -> None:
    waiting = [Waiting() for _ in range(3)]
    assert chosen(waiting, rows=rows) == waiting[:1]


def test_each_place_has_a_limit_of_its_own() -> None:
    here = [Waiting(rows=4) for _ in range(3)]
    there = [Waiting(rows=1, place="there") for _ in range(3)]
    limits = {"here": limited(8), "there": limited(2)}
    running = choose([*here, *there], {}, limits.__getitem__, NOW)
    assert Counter(c.place for c in running) == {"here": 2, "there": 2}


# Steps of 2 rows take 0.2 seconds and of 4 rows 0.4: ten of them 2 or 4.


@pytest.mark.parametrize(
    ("first", "place", "both"),
    [
        pytest.param(Waiting(deadline=NOW + 3), "here", False, id="it would be late"),
        pytest.param(Waiting(deadline=NOW + 4.1), "here", True, id="there is time enough"),
        pytest.param(Waiting(deadline=NOW + 1), "here", True, id="it is late anyway"),
        pytest.param(Waiting(deadline=NOW + 3), "there", False, id="another place slows it too"),
        pytest.param(Waiting(deadline=NOW + 3, left=5), "here", True, id="half of it is done"),
    ],
)
def test_one_more_runs_unless_it_makes_an_earlier_one_late(
    first: Waiting, place: str, both: bool
) -> None:
    other = Waiting(place=place)
    assert chosen([first, other]) == ([first, other] if both else [first])


def test_a_smaller_one_may_run_where_a_larger_one_would_make_another_late() -> None:
    tight, large, small = Waiting(deadline=NOW + 3.5), Waiting(rows=4), Waiting(rows=1)
    assert chosen([tight, large, small]) == [tight, small]


def test_rows_that_cost_nothing_more_make_nobody_late() -> None:
    tight, other = Waiting(deadline=NOW + 3), Waiting()
    assert chosen([tight, other], seconds=lambda rows: 0.3) == [tight, other]


# Whatever comes


def at_random(generator: random.Random) -> list[Waiting]:
    return [
        Waiting(
            owner=generator.choice("abcd"),
            deadline=NOW + generator.choice([generator.uniform(-5, 40), NEVER]),
            rows=generator.randint(1, 12),
            left=generator.randint(1, 60),
            place=generator.choice(["here", "there"]),
        )
        for _ in range(generator.randint(1, 25))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_never_more_than_the_limit_unless_one_is_alone(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(20):
        waiting = at_random(generator)
        most = generator.randint(1, 16)
        served = {owner: generator.uniform(0, 50) for owner in "abc"}
        running = chosen(waiting, most, served)
        assert running[0] is in_turn(waiting, served)[0]
        assert len(set(running)) == len(running)
        assert set(running) <= set(waiting)
        for place in ("here", "there"):
            rows = [c.rows for c in running if c.place == place]
            assert len(rows) <= 1 or sum(rows) <= most


@pytest.mark.parametrize("seed", range(20))
def test_whoever_could_be_in_time_alone_is_not_made_late_by_those_after_it(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(20):
        running = chosen(at_random(generator), generator.randint(1, 30))
        for i, c in enumerate(running):
            until_it_came = 0.1 * sum(other.rows for other in running[: i + 1])
            in_the_end = 0.1 * sum(other.rows for other in running)
            if NOW + c.left * until_it_came <= c.deadline:
                assert NOW + c.left * in_the_end <= c.deadline


def run(waiting: Sequence[Waiting], served: dict[str, float], now: float) -> float:
    """Step whoever is chosen, once at least; returns the time after it."""
    running = choose(waiting, served, lambda _: limited(8), now)
    steps = min(8, *(c.left for c in running))
    for c in running:
        served[c.owner] += steps * c.rows
        c.left -= steps
    return now + steps * 0.1 * sum(c.rows for c in running)


@pytest.mark.parametrize("seed", range(10))
def test_greedy_owners_get_the_same_share(seed: int) -> None:
    """Each always has several requests, of its own sizes, lengths and deadlines."""
    generator = random.Random(seed)
    owners = "abc"
    sizes = {owner: generator.randint(1, 8) for owner in owners}
    urgency = {owner: generator.choice([5.0, 50.0, NEVER]) for owner in owners}
    now = NOW

    def another(owner: str) -> Waiting:
        left = generator.randint(1, 40)
        return Waiting(owner, now + urgency[owner], generator.randint(1, sizes[owner]), left)

    waiting = [another(owner) for owner in owners for _ in range(4)]
    served = dict.fromkeys(owners, 0.0)
    for _ in range(3000):
        now = run(waiting, served, now)
        waiting = [c if c.left else another(c.owner) for c in waiting]
    assert max(served.values()) <= 1.05 * min(served.values())


@pytest.mark.parametrize("seed", range(10))
def test_every_request_is_done_in_the_end(seed: int) -> None:
    """However large, however late, and however many small ones of other owners keep coming."""
    generator = random.Random(seed)
    patient = Waiting("patient", rows=20, left=30)
    waiting = [patient]
    served = {"patient": 0.0, "many": 0.0}
    now = NOW
    for _ in range(200):
        few = 1 + len([c for c in waiting if c.owner == "many"])
        waiting += [Waiting("many", now + generator.uniform(0, 5)) for _ in range(few, 6)]
        now = run(waiting, served, now)
        waiting = [c for c in waiting if c.left]
        if patient not in waiting:
            break
    assert patient.left == 0
