import pytest

from learngenes.config import DType
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from registry.settings import Settings
from worker.runtime import Runtime
from worker.sampling.step_costs import step_costs


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


@pytest.fixture
def shared(family: Family) -> SharedWeights:
    return SharedWeights(family, DType.FLOAT32)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[StepCosts]:
    """All that was measured, each unlike the others."""
    costs: list[StepCosts] = []

    def measure(shared: SharedWeights, kernels: Kernels, max_rows: int) -> StepCosts:
        costs.append(StepCosts((2, 4), (0.1, 0.1 + len(costs)), 4, 1000, {8: 0.5, 48: 1.25}))
        return costs[-1]

    monkeypatch.setattr("worker.sampling.step_costs.measure_step_costs", measure)
    return costs


def test_steps_are_measured_once_for_all_starts(
    runtime: Runtime, settings: Settings, shared: SharedWeights, measured: list[StepCosts]
) -> None:
    first = step_costs(runtime, shared, Kernels(), 64)
    again = step_costs(Runtime.start(settings), shared, Kernels(), 64)
    assert measured == [first]
    assert again == first


def test_each_dtype_has_costs_of_its_own(
    runtime: Runtime, family: Family, measured: list[StepCosts]
) -> None:
    for dtype in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT32, DType.BFLOAT16):
        step_costs(runtime, SharedWeights(family, dtype), Kernels(), 64)
    assert len(measured) == 2


@pytest.mark.parametrize("changed", ["max_rows", "torch", "compiled", "family"])
def test_what_they_depend_on_has_them_measured_again(
    runtime: Runtime,
    shared: SharedWeights,
    measured: list[StepCosts],
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    step_costs(runtime, shared, Kernels(), 64)
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
    assert step_costs(runtime, shared, kernels, max_rows) == measured[1]
    assert step_costs(runtime, shared, kernels, max_rows) == measured[1]
    assert len(measured) == 2


def test_those_of_another_release_are_measured_again(
    runtime: Runtime, shared: SharedWeights, measured: list[StepCosts]
) -> None:
    of = runtime.device_class, shared.family.manifest.name, str(shared.compute)
    runtime.repository.keep_step_costs(*of, '{"costs": {}}')
    assert step_costs(runtime, shared, Kernels(), 64) == measured[0]
