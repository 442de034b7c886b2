import contextlib
import functools
import gc
import threading
import time
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learngenes.device import lanes_of, with_threads
from learngenes.stepping.lanes import Lanes, shares


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("works", range(8))
def test_what_each_gives_is_in_order(count: int, works: int) -> None:
    lanes = Lanes(count)
    assert lanes.run([functools.partial(pow, i, 2) for i in range(works)]) == [
        i * i for i in range(works)
    ]


def test_lanes_run_side_by_side_with_their_threads_and_one_is_the_callers() -> None:
    barrier = threading.Barrier(3, timeout=60)

    def work() -> tuple[str, int]:
        barrier.wait()  # nobody passes before all three are there
        return threading.current_thread().name, torch.get_num_threads()

    with with_threads(2):
        threads = dict(Lanes(3, threads=2).run([work] * 3))
    assert threading.current_thread().name in threads
    assert [*threads.values()] == [2, 2, 2]


@pytest.mark.parametrize(("threads", "lanes"), [(1, (1, 1)), (2, (2, 1)), (3, (2, 1)), (9, (2, 4))])
def test_all_threads_of_a_cpu_are_shared_by_as_many_lanes_as_a_guided_image_has_rows(
    threads: int, lanes: tuple[int, int]
) -> None:
    with with_threads(threads):
        of_cpu = Lanes.of(torch.device("cpu"))
        assert (of_cpu.count, of_cpu.threads) == lanes
        assert lanes_of(torch.device("cuda")) == (1, threads)


def test_lanes_that_are_closed_leave_the_work_to_the_caller() -> None:
    lanes = Lanes(2)
    lanes.close()
    name = threading.current_thread().name
    assert lanes.run([lambda: threading.current_thread().name] * 3) == [name] * 3


def test_an_error_keeps_nothing_in_memory() -> None:
    class Large:
        pass

    def work(barrier: threading.Barrier, large: Large) -> None:
        barrier.wait()
        raise MemoryError

    gone: list[weakref.ref[Large]] = []

    def fail() -> None:
        larges, barrier = [Large(), Large()], threading.Barrier(2, timeout=60)
        gone.extend(weakref.ref(large) for large in larges)
        with contextlib.suppress(MemoryError):
            lanes.run([functools.partial(work, barrier, large) for large in larges])

    lanes = Lanes(2)
    gc.disable()
    try:
        fail()
        lanes.run([int, int])  # whoever was last in a lane has let go of it
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


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
