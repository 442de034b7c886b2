import pytest
import torch

from learngenes.config import SHARED_MODES, DType, Mode, NetworkConfig, Size
from learngenes.family.family import Family
from learngenes.formats.diffusers import diffusers_state, to_diffusers
from learngenes.model import dit
from learngenes.model.factors import DenseLayers
from learngenes.model.frozen import as_served
from tests.support.sizing import EXECUTIONS

SIZES = [Size(depth=2, rank=16), Size(depth=4, rank=48), Size(depth=7, rank=32)]

NARROW = [
    (Mode.FACTORED, DType.BFLOAT16),
    (Mode.FACTORED, DType.INT8),
    (Mode.MATERIALISED, DType.BFLOAT16),
    (Mode.MATERIALISED, DType.INT8),
]


def inputs(network: NetworkConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, network.in_channels, network.sample_size, network.sample_size)
    return (
        torch.randn(shape, generator=generator),
        torch.tensor([0, 500, 999]),
        torch.tensor([0, 3, network.num_classes]),
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_modes_agree_and_are_numerically_diffusers_dit(family: Family, size: Size) -> None:
    scales = family.scales_of(size)
    factored, written_out = (family.assemble(scales, mode) for mode in SHARED_MODES)
    x, timesteps, labels = inputs(family.manifest.network)
    with torch.no_grad():
        oracle = to_diffusers(written_out)(x, timestep=timesteps, class_labels=labels).sample
    ours = written_out(x, timesteps, labels)
    assert oracle.std() > 0.1
    torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=0)
    torch.testing.assert_close(factored(x, timesteps, labels), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("native_bfloat16", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), NARROW)
def test_only_matrices_are_stored_narrow_unless_the_device_computes_so(
    family: Family,
    mode: Mode,
    dtype: DType,
    native_bfloat16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("learngenes.device.native_bfloat16", lambda _: native_bfloat16)
    exact, model = (family.assemble(family.scales, mode, d) for d in (DType.FLOAT32, dtype))
    compute = torch.bfloat16 if native_bfloat16 else torch.float32
    own = [p for name, p in model.layers.named_parameters() if name.endswith((".sigma", ".bias"))]
    assert {p.dtype for p in (*own, *model.stem.parameters())} == {compute}
    assert {p.dtype for p in family.stem.parameters()} == {torch.float32}
    given = inputs(family.manifest.network)
    narrow, wanted = model(*given), exact(*given)
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - wanted).norm() < 0.05 * wanted.norm()


def test_a_written_out_weight_is_never_stored_in_int3(family: Family) -> None:
    with pytest.raises(ValueError, match="int3 is for factored models"):
        family.assemble(family.scales, Mode.MATERIALISED, DType.INT3)


@pytest.mark.parametrize(("mode", "dtype"), [(m, d) for m, d in EXECUTIONS if d.bits is not None])
@pytest.mark.parametrize("size", SIZES[:2])
def test_what_few_bits_compute_can_be_written_in_floats(
    family: Family, mode: Mode, dtype: DType, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dit, "compute_dtype", lambda *_: torch.float32)
    scales = family.scales_of(size)
    served = family.assemble(scales, mode, dtype)(*inputs(family.manifest.network))
    floats = as_served(family.genes, scales, mode, dtype)
    assert isinstance(floats, DenseLayers)
    written = family.assemble(floats, Mode.MATERIALISED)(*inputs(family.manifest.network))
    torch.testing.assert_close(written, served)


def test_floats_are_served_as_they_are(family: Family) -> None:
    own = family.scales
    assert as_served(family.genes, own, Mode.FACTORED, DType.BFLOAT16) is own


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_factored_layers_share_their_factors(family: Family, dtype: DType) -> None:
    model = family.assemble(family.scales, Mode.FACTORED, dtype)
    for name in ("qkv.u", "qkv.vt"):
        assert len({layer.get_parameter(name).data_ptr() for layer in model.layers}) == 1


def test_only_a_materialised_model_is_exported(family: Family) -> None:
    with pytest.raises(ValueError, match="materialised"):
        diffusers_state(family.assemble(family.scales, Mode.FACTORED))
