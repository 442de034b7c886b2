import pytest

from learngenes.config import DType, Mode, Scheduler
from learngenes.family.family import Family
from learngenes.measuring.model import (
    MOST_RUNS,
    measure,
    memory,
    parameter_bytes,
    run,
)
from learngenes.model.dit import DiT
from learngenes.sizing.budget import Workload

WORKLOAD = Workload.of(n=2, num_inference_steps=3)


@pytest.fixture
def model(family: Family) -> DiT:
    return family.assemble(family.scales, Mode.FACTORED)


@pytest.fixture
def rows(model: DiT) -> list[int]:
    """Of every forward pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_what_layers_share_counts_once(family: Family, model: DiT) -> None:
    one = family.assemble(family.scales, Mode.FACTORED)
    del one.layers[1:]
    own = sum(
        layer.get_parameter(f"{kind}.{name}").nbytes
        for layer in model.layers[1:]
        for kind in ("qkv", "o", "in", "out", "adaLN")
        for name in ("sigma", "bias")
    )
    assert parameter_bytes(model) == parameter_bytes(one) + own


def test_a_quantised_matrix_counts_as_its_parts(family: Family) -> None:
    """A byte for each number of two groups of 32, the second padded, and a scale for each group."""
    int8 = family.assemble(family.scales, Mode.FACTORED, DType.INT8)
    for name, (m, groups) in {"qkv.u": (96, 2), "out.vt": (48, 4)}.items():
        assert parameter_bytes(int8.layers[0].get_submodule(name)) == m * groups * (32 + 2)


@pytest.mark.parametrize("scheduler", Scheduler)
def test_a_run_is_a_batch_as_stated(
    family: Family, model: DiT, rows: list[int], scheduler: Scheduler
) -> None:
    for scale in (2, 1):
        workload = Workload.of(
            n=3, num_inference_steps=2, guidance_scale=scale, scheduler=scheduler
        )
        assert run(model, family.manifest.diffusion, workload) > 0
    assert rows == [6, 6, 3, 3]


def test_more_images_than_classes_can_be_measured(
    family: Family, model: DiT, rows: list[int]
) -> None:
    run(model, family.manifest.diffusion, Workload.of(n=7, num_inference_steps=1))
    assert rows == [14]


def test_memory_is_of_weights_and_of_one_batch_however_many_steps(
    family: Family, model: DiT
) -> None:
    diffusion = family.manifest.diffusion
    two, three = (memory(model, diffusion, Workload.of(n=n)) for n in (2, 3))
    unguided = memory(model, diffusion, Workload.of(n=2, guidance_scale=1))
    assert parameter_bytes(model) < unguided < two < three
    assert two == memory(model, diffusion, Workload.of(n=2, num_inference_steps=1000))


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 1), (600.0, MOST_RUNS)])
def test_batches_are_run_until_the_time_is_up(
    family: Family,
    model: DiT,
    rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    runs: int,
) -> None:
    monkeypatch.setattr("learngenes.measuring.model.RUNS_SECONDS", seconds)
    measure(model, family.manifest.diffusion, WORKLOAD)
    warm_up, memory_runs = 1, 2 * len(Scheduler)
    assert rows == [4] * (warm_up + runs * WORKLOAD.num_inference_steps + memory_runs)


def test_a_measurement_has_all_four_figures(family: Family, model: DiT) -> None:
    cost = measure(model, family.manifest.diffusion, WORKLOAD).cost
    assert cost.memory_bytes == memory(model, family.manifest.diffusion, WORKLOAD)
    assert cost.process_memory_bytes > 50_000_000 > cost.memory_bytes
    assert 0 < cost.latency_seconds <= cost.latency_p95_seconds
