import pytest
from redis import RedisError

from learngenes.config import DType
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from registry.settings import Settings
from worker.runtime import Runtime
from worker.sampling.kept_costs import KeptStepCosts


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


@pytest.fixture
def shared(family: Family) -> SharedWeights:
    return SharedWeights(family, DType.FLOAT32)


COSTS = StepCosts((2, 4), (0.1, 0.2), 4, 1000, {8: 0.5, 48: 1.25})
OTHERS = StepCosts((2, 4), (0.1, 0.3), 4, 1000, {8: 0.5, 48: 1.25})


def test_steps_are_measured_once_for_all_starts(
    runtime: Runtime, settings: Settings, shared: SharedWeights
) -> None:
    assert KeptStepCosts(runtime).get(shared, Kernels(), 64) is None
    KeptStepCosts(runtime).keep(shared, Kernels(), 64, COSTS)
    assert KeptStepCosts(Runtime.start(settings)).get(shared, Kernels(), 64) == COSTS


def test_each_dtype_has_costs_of_its_own(runtime: Runtime, family: Family) -> None:
    kept, dtypes = KeptStepCosts(runtime), (DType.FLOAT32, DType.BFLOAT16)
    for dtype, costs in zip(dtypes, (COSTS, OTHERS), strict=True):
        kept.keep(SharedWeights(family, dtype), Kernels(), 64, costs)
    found = [kept.get(SharedWeights(family, dtype), Kernels(), 64) for dtype in dtypes]
    assert found == [COSTS, OTHERS]


@pytest.mark.parametrize("changed", ["max_rows", "torch", "compiled", "family"])
def test_what_they_depend_on_has_them_measured_again(
    runtime: Runtime, shared: SharedWeights, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    kept = KeptStepCosts(runtime)
    kept.keep(shared, Kernels(), 64, COSTS)
    kernels, max_rows = Kernels(), 64
    match changed:
        case "max_rows":
            max_rows = 32
        case "torch":
            monkeypatch.setattr("torch.__version__", "99.0")
        case "compiled":
            kernels = Kernels(embed=lambda *_: pytest.fail("only measured"))
        case "family":
            monkeypatch.setattr(Family, "fingerprint", "another")
    assert kept.get(shared, kernels, max_rows) is None
    kept.keep(shared, kernels, max_rows, OTHERS)
    assert kept.get(shared, kernels, max_rows) == OTHERS


def test_those_of_another_release_are_measured_again(
    runtime: Runtime, shared: SharedWeights
) -> None:
    of = runtime.device_class, shared.family.manifest.name, str(shared.compute)
    runtime.repository.keep_step_costs(*of, '{"costs": {}}')
    assert KeptStepCosts(runtime).get(shared, Kernels(), 64) is None


def test_without_redis_they_are_measured_again(
    runtime: Runtime, shared: SharedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> str:
        raise RedisError

    for method in ("step_costs", "keep_step_costs"):
        monkeypatch.setattr(runtime.repository, method, away)
    KeptStepCosts(runtime).keep(shared, Kernels(), 64, COSTS)
    assert KeptStepCosts(runtime).get(shared, Kernels(), 64) is None
