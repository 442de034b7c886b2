import pytest
import torch

from learngenes.config import Kind, NetworkConfig, Size
from learngenes.model import sigma
from learngenes.model.factors import Scales


def test_interpolation_keeps_the_reference_at_its_own_size(
    network: NetworkConfig, scales: Scales
) -> None:
    same = sigma.interpolated(scales, Size(depth=network.depth, rank=network.rank))
    for name, tensor in scales.stacked().items():
        torch.testing.assert_close(same.stacked()[name], tensor)


def test_interpolation_is_linear_in_relative_depth(scales: Scales) -> None:
    deeper = sigma.interpolated(scales, Size(depth=7, rank=48)).stacked()
    source = scales.stacked()
    for name, tensor in deeper.items():
        torch.testing.assert_close(tensor[[0, 2, 4, 6]], source[name])
        torch.testing.assert_close(tensor[1], (source[name][0] + source[name][1]) / 2)


def test_a_single_layer_reads_the_middle(scales: Scales) -> None:
    single = sigma.interpolated(scales, Size(depth=1, rank=8)).stacked()["sigma.o"]
    source = scales.stacked()["sigma.o"]
    torch.testing.assert_close(single[0], (source[1, :8] + source[2, :8]) / 2)


def test_rank_is_a_prefix_and_biases_stay_whole(scales: Scales) -> None:
    small = sigma.interpolated(scales, Size(depth=4, rank=8)).stacked()
    torch.testing.assert_close(small["sigma.qkv"], scales.stacked()["sigma.qkv"][:, :8])
    assert small["bias.qkv"].shape == scales.stacked()["bias.qkv"].shape


def test_rank_beyond_the_source_is_refused(scales: Scales) -> None:
    with pytest.raises(ValueError, match="rank 49 is more than the 48"):
        sigma.interpolated(scales, Size(depth=2, rank=49))


def test_phase_one_starts_as_adaln_zero(network: NetworkConfig) -> None:
    start = sigma.reference_scales(network)
    assert (start.sigma[Kind.ADALN] == 0).all()


def test_layers_leave_one_after_the_other(scales: Scales, network: NetworkConfig) -> None:
    order = (2, 0, 3, 1)
    assert sigma.remaining(order, 4) == (0, 1, 2, 3)
    assert sigma.remaining(order, 2) == (1, 3)
    kept = sigma.subset(scales, sigma.remaining(order, 2), rank=8).stacked()
    torch.testing.assert_close(kept["sigma.o"], scales.stacked()["sigma.o"][[1, 3], :8])
    torch.testing.assert_close(kept["bias.o"], scales.stacked()["bias.o"][[1, 3]])
    with pytest.raises(ValueError, match="rank 49 is more than the 48"):
        sigma.subset(scales, (0,), rank=49)
