import pytest
import torch

from learngenes.config import Mode, NetworkConfig, Size, SizeSpace
from learngenes.family import Family
from learngenes.measure import measure, parameter_bytes
from learngenes.sigma import interpolated
from learngenes.sizing import Infeasible, Workload, memory_bytes, solve, weight_bytes
from learngenes.sizing.cost import dense_parameters, learngene_parameters, scale_parameters
from learngenes.sizing.solver import plans

DIT_XL = NetworkConfig(
    sample_size=32,
    in_channels=4,
    patch_size=2,
    width=1152,
    num_attention_heads=16,
    num_classes=1000,
    depth=28,
    rank=1152,
)
SPACE = SizeSpace(depths=(4, 8, 12), ranks=(64, 256, 1152))
SIZES = [Size(depth=2, rank=8), Size(depth=4, rank=48), Size(depth=3, rank=24)]


def test_the_papers_arithmetic() -> None:
    d, r = DIT_XL.width, 1152
    assert learngene_parameters(DIT_XL, r) == 23 * d * r == 30_523_392
    assert dense_parameters(DIT_XL, 28) == 28 * (18 * d * d + 15 * d)
    assert scale_parameters(DIT_XL, Size(depth=28, rank=r)) == 28 * (5 * r + 15 * d)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_are_predicted_to_the_byte(family: Family, size: Size, mode: Mode) -> None:
    model = family.assemble(interpolated(family.scales, size), mode)
    assert parameter_bytes(model) == weight_bytes(family.manifest.network, size, mode)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("mode", Mode)
def test_measured_memory_stays_within_the_prediction(
    family: Family, n: int, guidance_scale: float, mode: Mode
) -> None:
    size = Size(depth=4, rank=48)
    model = family.assemble(interpolated(family.scales, size), mode)
    measured = measure(
        model,
        family.manifest.diffusion,
        n=n,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
    )
    workload = Workload(n=n, guided=guidance_scale > 1)
    predicted = memory_bytes(family.manifest.network, size, mode, workload)
    assert 0.9 * predicted < measured.memory_bytes <= predicted


@pytest.mark.gpu
def test_measured_memory_stays_within_the_prediction_on_cuda(family: Family) -> None:
    family.to(torch.device("cuda"))
    model = family.assemble(family.scales, Mode.MATERIALISED)
    measured = measure(
        model, family.manifest.diffusion, n=4, num_inference_steps=1, guidance_scale=2.0
    )
    predicted = memory_bytes(
        family.manifest.network, family.full_size, Mode.MATERIALISED, Workload()
    )
    assert measured.memory_bytes <= 1.1 * predicted


def test_the_largest_size_that_fits_is_chosen() -> None:
    everything = list(
        plans(DIT_XL, SPACE, Workload(), num_inference_steps=25, flops_per_second=1e12)
    )
    for budget in sorted(p.predicted.memory_bytes for p in everything):
        chosen = solve(DIT_XL, SPACE, budget, Workload())
        fitting = [p for p in everything if p.predicted.memory_bytes <= budget]
        assert chosen.predicted.memory_bytes <= budget
        assert chosen.depth * chosen.rank == max(p.depth * p.rank for p in fitting)


def test_a_large_budget_gives_the_full_size_materialised() -> None:
    plan = solve(DIT_XL, SPACE, 24 * 10**9, Workload())
    assert (plan.depth, plan.rank, plan.mode) == (12, 1152, Mode.MATERIALISED)
    assert plan.predicted.latency_seconds is None


def test_latency_follows_from_the_devices_speed() -> None:
    slow, fast = (
        solve(DIT_XL, SPACE, 10**10, Workload(), flops_per_second=speed).predicted.latency_seconds
        for speed in (1e11, 1e12)
    )
    assert slow is not None
    assert fast is not None
    assert slow == pytest.approx(10 * fast)


def test_an_infeasible_budget_names_the_nearest_one() -> None:
    with pytest.raises(Infeasible, match="depth 4, rank 64, factored") as error:
        solve(DIT_XL, SPACE, 10**6, Workload())
    needed = error.value.nearest.predicted.memory_bytes
    assert 0 <= error.value.nearest_gb * 1e9 - needed <= 1000.5
    assert solve(DIT_XL, SPACE, needed, Workload()) == error.value.nearest
    with pytest.raises(Infeasible):
        solve(DIT_XL, SPACE, needed - 1, Workload())
