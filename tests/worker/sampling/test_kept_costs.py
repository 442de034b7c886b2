import pytest

from learngenes.config import DType
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from registry.settings import Settings
from worker.runtime import Runtime
from worker.sampling.kept_costs import kept_step_costs


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


@pytest.fixture
def shared(family: Family) -> SharedWeights:
    return SharedWeights(family, DType.FLOAT32)


class Measuring:
    """In place of measuring: each time what is unlike the others."""

    def __init__(self) -> None:
        self.costs: list[StepCosts] = []

    def __call__(self, *_: object) -> StepCosts:
        slower = 0.1 * (1 + len(self.costs))
        self.costs.append(StepCosts((2, 4), (0.1, slower), 4, 1000, {8: 0.5, 48: 1.25}))
        return self.costs[-1]


@pytest.fixture
def measuring() -> Measuring:
    return Measuring()


def test_steps_are_measured_once_for_all_starts(
    runtime: Runtime, settings: Settings, shared: SharedWeights, measuring: Measuring
) -> None:
    first = kept_step_costs(runtime, shared, Kernels(), 64, measuring)
    again = kept_step_costs(Runtime.start(settings), shared, Kernels(), 64, measuring)
    assert measuring.costs == [first]
    assert again == first


def test_each_dtype_has_costs_of_its_own(
    runtime: Runtime, family: Family, measuring: Measuring
) -> None:
    for dtype in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT32, DType.BFLOAT16):
        kept_step_costs(runtime, SharedWeights(family, dtype), Kernels(), 64, measuring)
    assert len(measuring.costs) == 2


@pytest.mark.parametrize("changed", ["max_rows", "torch", "compiled", "family"])
def test_what_they_depend_on_has_them_measured_again(
    runtime: Runtime,
    shared: SharedWeights,
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    kept_step_costs(runtime, shared, Kernels(), 64, measuring)
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
    assert kept_step_costs(runtime, shared, kernels, max_rows, measuring) == measuring.costs[1]
    assert kept_step_costs(runtime, shared, kernels, max_rows, measuring) == measuring.costs[1]
    assert len(measuring.costs) == 2


def test_those_of_another_release_are_measured_again(
    runtime: Runtime, shared: SharedWeights, measuring: Measuring
) -> None:
    of = runtime.device_class, shared.family.manifest.name, str(shared.compute)
    runtime.repository.keep_step_costs(*of, '{"costs": {}}')
    assert kept_step_costs(runtime, shared, Kernels(), 64, measuring) == measuring.costs[0]
