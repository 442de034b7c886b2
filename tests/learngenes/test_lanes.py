import functools
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learngenes.lanes import Lanes, shares


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("works", range(8))
def test_what_each_gives_is_in_order(count: int, works: int) -> None:
    lanes = Lanes(count)
    assert lanes.run([functools.partial(pow, i, 2) for i in range(works)]) == [
        i * i for i in range(works)
    ]


def test_lanes_run_side_by_side_and_one_is_the_callers() -> None:
    barrier = threading.Barrier(3, timeout=60)

    def work() -> str:
        barrier.wait()  # nobody passes before all three are there
        return threading.current_thread().name

    first, *others = Lanes(3).run([work] * 3)
    assert first == threading.current_thread().name
    assert len({first, *others}) == 3


def test_a_lane_has_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        assert Lanes(2).run([torch.get_num_threads] * 2)[1] == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("inferring", [True, False])
def test_all_lanes_infer_when_the_caller_does(inferring: bool) -> None:
    with torch.inference_mode(inferring):
        assert Lanes(2).run([torch.is_inference_mode_enabled] * 3) == [inferring] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_comes_when_all_lanes_have_ended(failing: int) -> None:
    ended: list[int] = []

    def work(number: int) -> None:
        if number == failing:
            raise MemoryError(str(number))
        time.sleep(0.1)
        ended.append(number)

    lanes = Lanes(2)
    with pytest.raises(MemoryError, match=str(failing)):
        lanes.run([functools.partial(work, i) for i in range(2)])
    assert ended == [1 - failing]
    assert lanes.run([lambda: 1] * 2) == [1, 1]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40).map(
        lambda sizes: sorted(sizes, reverse=True)
    ),
    count=st.integers(1, 8),
)
def test_shares_are_even_to_within_what_cannot_be_divided(sizes: Sequence[int], count: int) -> None:
    found = shares(sizes, count)
    assert [i for share in found for i in range(len(sizes))[share]] == list(range(len(sizes)))
    assert 1 <= len(found) <= count
    taken = [sum(sizes[share]) for share in found]
    assert min(taken) > 0
    assert max(taken) < sum(sizes) / count + max(sizes)
