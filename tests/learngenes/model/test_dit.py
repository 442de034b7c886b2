import pytest
import torch

from learngenes.config import DType, Kind, Mode, NetworkConfig, Size
from learngenes.formats.diffusers import diffusers_state, to_diffusers
from learngenes.model.dit import DiT, Stem
from learngenes.model.factors import Learngenes, Scales, materialise, training_layer
from learngenes.model.sigma import interpolated

SIZES = [Size(depth=2, rank=16), Size(depth=4, rank=48), Size(depth=7, rank=32)]

NARROW = [
    (Mode.FACTORED, DType.BFLOAT16),
    (Mode.FACTORED, DType.INT8),
    (Mode.MATERIALISED, DType.BFLOAT16),
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
def test_is_numerically_diffusers_dit(
    network: NetworkConfig, stem: Stem, genes: Learngenes, scales: Scales, size: Size
) -> None:
    model = DiT(stem, genes, interpolated(scales, size), Mode.MATERIALISED)
    x, timesteps, labels = inputs(network)
    with torch.no_grad():
        oracle = to_diffusers(model)(x, timestep=timesteps, class_labels=labels).sample
    ours = model(x, timesteps, labels)
    assert oracle.std() > 0.1
    torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_modes_agree(
    network: NetworkConfig, stem: Stem, genes: Learngenes, scales: Scales, size: Size
) -> None:
    sigma = interpolated(scales, size)
    predictions = [DiT(stem, genes, sigma, mode)(*inputs(network)) for mode in Mode]
    torch.testing.assert_close(*predictions, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("native_bfloat16", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), NARROW)
def test_narrow_storage_predicts_nearly_what_float32_does(
    network: NetworkConfig,
    stem: Stem,
    genes: Learngenes,
    scales: Scales,
    mode: Mode,
    dtype: DType,
    native_bfloat16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("learngenes.device.native_bfloat16", lambda _: native_bfloat16)
    exact = DiT(stem, genes, scales, mode)(*inputs(network))
    narrow = DiT(stem, genes, scales, mode, dtype)(*inputs(network))
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("native_bfloat16", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), NARROW)
def test_only_the_matrices_are_stored_narrow_unless_the_device_computes_so(
    stem: Stem,
    genes: Learngenes,
    scales: Scales,
    mode: Mode,
    dtype: DType,
    native_bfloat16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("learngenes.device.native_bfloat16", lambda _: native_bfloat16)
    model = DiT(stem, genes, scales, mode, dtype)
    compute = torch.bfloat16 if native_bfloat16 else torch.float32
    own = [p for name, p in model.layers.named_parameters() if name.endswith((".sigma", ".bias"))]
    assert {p.dtype for p in (*own, *model.stem.parameters())} == {compute}
    assert {p.dtype for p in stem.parameters()} == {torch.float32}


def test_a_written_out_weight_is_never_stored_in_int8(
    stem: Stem, genes: Learngenes, scales: Scales
) -> None:
    with pytest.raises(ValueError, match="int8 is for factored models"):
        DiT(stem, genes, scales, Mode.MATERIALISED, DType.INT8)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_factored_layers_share_their_factors(
    stem: Stem, genes: Learngenes, scales: Scales, dtype: DType
) -> None:
    model = DiT(stem, genes, scales, Mode.FACTORED, dtype)
    for name in ("qkv.u", "qkv.vt"):
        assert len({layer.get_parameter(name).data_ptr() for layer in model.layers}) == 1


def test_only_a_materialised_model_is_exported(
    stem: Stem, genes: Learngenes, scales: Scales
) -> None:
    with pytest.raises(ValueError, match="materialised"):
        diffusers_state(DiT(stem, genes, scales, Mode.FACTORED))


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize("frozen", [True, False], ids=["phase 2", "phase 1"])
def test_a_layer_in_training_is_the_same_in_whichever_way_it_multiplies(
    genes: Learngenes, scales: Scales, rank: int, frozen: bool
) -> None:
    genes.requires_grad_(not frozen)
    layer_scales = interpolated(scales, Size(depth=2, rank=rank)).layers()[0]
    for rows in (2, 5000):
        x = torch.randn(rows, genes.v[Kind.QKV].shape[0], requires_grad=True)
        sigma, bias = layer_scales.sigma[Kind.QKV], layer_scales.bias[Kind.QKV]
        u, v = (side[Kind.QKV][:, :rank] for side in (genes.u, genes.v))
        wanted = [x, sigma, bias] if frozen else [x, sigma, bias, genes.u[Kind.QKV]]
        expected = x @ materialise(u, sigma, v).T + bias
        given = training_layer(genes, layer_scales)[Kind.QKV](x)
        torch.testing.assert_close(given, expected, atol=1e-3, rtol=1e-4)
        for mine, plain in zip(
            torch.autograd.grad(given.square().mean(), wanted),
            torch.autograd.grad(expected.square().mean(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain, atol=1e-3, rtol=1e-3)
