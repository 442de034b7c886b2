import pytest
import torch

from learngenes.config import Mode, NetworkConfig, Size
from learngenes.dit import DiT, Stem
from learngenes.export import diffusers_state, to_diffusers
from learngenes.factors import Learngenes, Scales
from learngenes.sigma import interpolated

SIZES = [Size(depth=2, rank=16), Size(depth=4, rank=48), Size(depth=7, rank=32)]


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


def test_factored_layers_share_their_factors(stem: Stem, genes: Learngenes, scales: Scales) -> None:
    model = DiT(stem, genes, scales, Mode.FACTORED)
    pointers = {layer.get_parameter("qkv.u").data_ptr() for layer in model.layers}
    assert len(pointers) == 1


def test_only_a_materialised_model_is_exported(
    stem: Stem, genes: Learngenes, scales: Scales
) -> None:
    with pytest.raises(ValueError, match="materialised"):
        diffusers_state(DiT(stem, genes, scales, Mode.FACTORED))
