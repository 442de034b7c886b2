from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learngenes.config import SHARED_MODES, DType, Mode, Size, executable
from learngenes.device import native_bfloat16, peak_bytes
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import DIT_XL_2
from learngenes.measuring.device import execution_on
from learngenes.measuring.model import memory, parameter_bytes
from learngenes.model.dit import DiT
from learngenes.model.sigma import interpolated
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import (
    Execution,
    dense_parameters,
    learngene_parameters,
    making_bytes,
    memory_bytes,
    scale_parameters,
    shared_bytes,
    weight_bytes,
)
from tests.support.sizing import executions

SIZES = [Size(depth=2, rank=8), Size(depth=3, rank=24), Size(depth=4, rank=48)]
CPU = torch.device("cpu")
WORKLOADS = [Workload.of(n=n, guidance_scale=scale) for n in (1, 4) for scale in (1, 2)]

every_execution = pytest.mark.parametrize("execution", executions(), ids=str)
every_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=str)


@pytest.fixture(scope="module")
def fashion() -> Family:
    """Wide enough that its blocks outweigh its embedders."""
    return load_family(Path("families/fashion"))


def assemble(
    family: Family, size: Size, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> DiT:
    """Computing in bfloat16 or not as `execution` says, whatever this device does better."""
    monkeypatch.setattr("learngenes.device.native_bfloat16", lambda _: execution.native_bfloat16)
    return family.assemble(family.scales_of(size), execution.mode, execution.dtype)


def plain_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if type(t.data) is Tensor]


def test_the_arithmetic_is_that_of_the_papers() -> None:
    d, r = DIT_XL_2.width, 1152
    assert learngene_parameters(DIT_XL_2, r) == 23 * d * r == 30_523_392
    assert dense_parameters(DIT_XL_2, 28) == 28 * 18 * d * d
    assert scale_parameters(DIT_XL_2, 28, r) == 28 * (5 * r + 15 * d)
    execution = Execution(Mode.MATERIALISED, DType.FLOAT32)
    assert weight_bytes(DIT_XL_2, 28, 1152, execution) / 4 == pytest.approx(675e6, rel=0.01)


@pytest.mark.parametrize("execution", executions() + executions(native_bfloat16=True), ids=str)
def test_weights_and_what_of_them_is_the_familys_are_predicted_to_the_byte(
    family: Family, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = family.manifest.network
    of_family = {t.data_ptr() for m in (family.stem, family.genes) for t in plain_tensors(m)}
    for size in SIZES:
        model = assemble(family, size, execution, monkeypatch)
        assert parameter_bytes(model) == weight_bytes(network, size.depth, size.rank, execution)
        held = {t.data_ptr(): t.nbytes for t in plain_tensors(model)}
        shared = sum(held[pointer] for pointer in held.keys() & of_family)
        assert shared == shared_bytes(network, np.array(size.rank), execution)


@every_execution
def test_what_making_a_model_takes_is_within_the_prediction(
    family: Family, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, made = family.full_size, list[DiT]()
    peak = peak_bytes(lambda: made.append(assemble(family, size, execution, monkeypatch)), CPU)
    network = family.manifest.network
    weights = weight_bytes(network, size.depth, size.rank, execution)
    assert peak <= weights + making_bytes(network, size.rank, execution)


@every_workload
@every_execution
def test_measured_memory_stays_within_the_prediction(
    family: Family, execution: Execution, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = assemble(family, family.full_size, execution, monkeypatch)
    measured = memory(model, family.manifest.diffusion, workload)
    predicted = memory_bytes(family.manifest.network, 4, 48, execution, workload)
    assert 0.9 * predicted < measured <= predicted


@pytest.mark.skipif(not native_bfloat16(CPU), reason="computes in float32")
@every_workload
@pytest.mark.parametrize(
    "execution",
    [e for e in executions(native_bfloat16=True, packing_threads=1) if e.compute_bytes == 2],
    ids=str,
)
def test_what_bfloat16_products_pack_is_within_the_prediction(
    fashion: Family, execution: Execution, workload: Workload
) -> None:
    scales = interpolated(fashion.scales, Size(depth=2, rank=128))
    model = fashion.assemble(scales, execution.mode, execution.dtype)
    measured = memory(model, fashion.manifest.diffusion, workload)
    predicted = memory_bytes(fashion.manifest.network, 2, 128, execution, workload)
    assert 0.95 * predicted < measured <= predicted


def test_many_sizes_are_computed_at_once() -> None:
    depths, ranks = np.array([4, 8, 28]), np.array([72, 576, 1152])
    for execution in executions() + executions(native_bfloat16=True):
        together = memory_bytes(DIT_XL_2, depths, ranks, execution, Workload())
        assert together.tolist() == [
            memory_bytes(DIT_XL_2, depth, rank, execution, Workload())
            for depth, rank in zip(depths.tolist(), ranks.tolist(), strict=True)
        ]


@every_execution
def test_memory_grows_with_everything(execution: Execution) -> None:
    def needed(depth: int = 8, rank: int = 144, n: int = 4, scale: float = 1) -> int:
        return int(
            memory_bytes(DIT_XL_2, depth, rank, execution, Workload.of(n=n, guidance_scale=scale))
        )

    assert min(needed(depth=28), needed(n=8), needed(scale=2)) > needed()
    factored = execution.mode is Mode.FACTORED
    assert needed(rank=1152) > needed() if factored else needed(rank=1152) == needed()


def test_narrower_storage_needs_less_and_factors_less_than_what_they_make() -> None:
    def needed(mode: Mode, dtype: DType) -> int:
        return int(weight_bytes(DIT_XL_2, 28, 1152, Execution(mode, dtype)))

    for mode in SHARED_MODES:
        by_dtype = [needed(mode, dtype) for dtype in DType if executable(mode, dtype)]
        assert by_dtype == sorted(by_dtype, reverse=True)
        assert len(set(by_dtype)) == len(by_dtype)
    for dtype in (dtype for dtype in DType if executable(Mode.MATERIALISED, dtype)):
        assert needed(Mode.FACTORED, dtype) < needed(Mode.MATERIALISED, dtype)


@pytest.mark.gpu
@every_execution
def test_measured_memory_stays_near_the_prediction_on_cuda(
    family: Family, execution: Execution
) -> None:
    device = torch.device("cuda")
    family.to(device)
    model = family.assemble(family.scales, execution.mode, execution.dtype)
    measured = memory(model, family.manifest.diffusion, Workload())
    native = execution_on(device, execution.mode, execution.dtype)
    assert measured <= 1.1 * memory_bytes(family.manifest.network, 4, 48, native, Workload())
