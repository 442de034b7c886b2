import pytest
import torch
from redis import RedisError

from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.stepping.kernels import Kernels
from registry.settings import Settings
from tests.support.engines import made_up_times
from worker.runtime import Runtime
from worker.sampling.kept_steps import KeptSteps, measured_steps


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


COSTS = StepCosts((2, 4), (0.1, 0.2), 4, 1000, {8: 0.5, 48: 1.25})
OTHERS = StepCosts((2, 4), (0.1, 0.3), 4, 1000, {8: 0.5, 48: 1.25})
TIMES = made_up_times()
FLOAT = torch.float32


def test_steps_are_measured_once_for_all_starts(
    runtime: Runtime, settings: Settings, family: Family
) -> None:
    assert KeptSteps(runtime).get(family, FLOAT, Kernels(), 64) is None
    KeptSteps(runtime).keep(family, FLOAT, Kernels(), 64, COSTS, TIMES)
    assert KeptSteps(Runtime.start(settings)).get(family, FLOAT, Kernels(), 64) == (COSTS, True)
    known = measured_steps(runtime.repository, runtime.device_class, family, FLOAT)
    assert known is not None
    assert known.times == TIMES


def test_each_dtype_has_steps_of_its_own(runtime: Runtime, family: Family) -> None:
    kept, dtypes = KeptSteps(runtime), (torch.float32, torch.bfloat16)
    for compute, costs in zip(dtypes, (COSTS, OTHERS), strict=True):
        kept.keep(family, compute, Kernels(), 64, costs, TIMES)
    found = [kept.get(family, compute, Kernels(), 64) for compute in dtypes]
    assert found == [(COSTS, True), (OTHERS, True)]


@pytest.mark.parametrize("changed", ["max_rows", "torch", "compiled", "family"])
def test_what_they_depend_on_has_them_measured_again(
    runtime: Runtime, family: Family, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    kept = KeptSteps(runtime)
    kept.keep(family, FLOAT, Kernels(), 64, COSTS, TIMES)
    kernels, max_rows = Kernels(), 64
    match changed:
        case "max_rows":
            max_rows = 32
        case "torch":
            monkeypatch.setattr("torch.__version__", "99.0")
        case "compiled":
            kernels = Kernels(embed=lambda *_: pytest.fail("only measured"))
        case "family":
            monkeypatch.setitem(vars(family), "fingerprint", "another")
    found = kept.get(family, FLOAT, kernels, max_rows)
    gone = changed in ("torch", "family")
    assert found == (None if gone else (COSTS, False)), "others' are better than none"
    kept.keep(family, FLOAT, kernels, max_rows, OTHERS, TIMES)
    assert kept.get(family, FLOAT, kernels, max_rows) == (OTHERS, True)


def test_those_of_another_release_are_measured_again(runtime: Runtime, family: Family) -> None:
    of = runtime.device_class, family.manifest.name, str(FLOAT)
    runtime.repository.keep_step_costs(*of, '{"costs": {}}')
    assert KeptSteps(runtime).get(family, FLOAT, Kernels(), 64) is None


def test_without_redis_they_are_measured_again(
    runtime: Runtime, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> str:
        raise RedisError

    for method in ("step_costs", "keep_step_costs"):
        monkeypatch.setattr(runtime.repository, method, away)
    KeptSteps(runtime).keep(family, FLOAT, Kernels(), 64, COSTS, TIMES)
    assert KeptSteps(runtime).get(family, FLOAT, Kernels(), 64) is None
