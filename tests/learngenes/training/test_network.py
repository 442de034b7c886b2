import functools
import itertools
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from learngenes.config import Kind, Mode, NetworkConfig
from learngenes.model.dit import DiT, Stem
from learngenes.model.factors import Learngenes, Scales
from learngenes.model.sigma import subset
from learngenes.training.network import (
    FactorisedDiT,
    compiled_parts,
    greedy_order,
    predict,
)

Noisy = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def noisy(network: NetworkConfig) -> Noisy:
    generator = torch.Generator().manual_seed(5)
    shape = (3, network.in_channels, network.sample_size, network.sample_size)
    images = torch.randn(shape, generator=generator)
    return images, torch.tensor([0, 500, 999]), torch.tensor([0, 1, network.num_classes])


@pytest.mark.parametrize("rank", [16, 48])
def test_what_is_trained_is_what_is_served(
    stem: Stem, genes: Learngenes, scales: Scales, noisy: Noisy, rank: int
) -> None:
    own = subset(scales, (0, 2, 3), rank)
    served = DiT(stem, genes, own, Mode.MATERIALISED)
    torch.testing.assert_close(predict(stem, genes, own, noisy), served(*noisy))


def test_a_gradient_reaches_everything_of_the_rank(
    stem: Stem, genes: Learngenes, scales: Scales, noisy: Noisy
) -> None:
    own = subset(scales, range(scales.depth), rank=16)
    predict(stem, genes, own, noisy).square().mean().backward()
    for kind in Kind:
        for factor in (genes.u[kind], genes.v[kind]):
            assert factor.grad is not None
            assert factor.grad[:, :16].abs().min() > 0
            assert (factor.grad[:, 16:] == 0).all()
        for of_own in (own.sigma[kind], own.bias[kind]):
            assert of_own.grad is not None
            assert of_own.grad.abs().amax(1).min() > 0


def test_compiled_it_predicts_the_same_and_goes_on_without_a_compiler(
    stem: Stem, genes: Learngenes, scales: Scales, noisy: Noisy
) -> None:
    expected = predict(stem, genes, scales, noisy)
    gradient = functools.partial(torch.autograd.grad, inputs=[genes.u[Kind.QKV], scales.sigma["o"]])
    wanted = gradient(expected.square().mean())
    given = predict(stem, genes, scales, noisy, compiled_parts())
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    for mine, plain in zip(gradient(given.square().mean()), wanted, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-3)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("no compiler")

    with patch("torch.compile", return_value=broken):
        uncompiled = predict(stem, genes, scales, noisy, compiled_parts())
    assert torch.equal(uncompiled, expected)


def test_the_layer_that_costs_least_leaves_first() -> None:
    cost = (5.0, 1.0, 7.0, 3.0)
    order = greedy_order(4, lambda kept: -sum(cost[layer] for layer in kept))
    assert order == (1, 3, 0, 2)


def test_what_stays_may_have_to_be_spread() -> None:
    def cheap_in_the_middle(kept: Sequence[int]) -> float:
        return -sum(abs(layer - 4) for layer in kept)

    assert greedy_order(8, cheap_in_the_middle)[:4] == (4, 3, 5, 2)
    order = greedy_order(8, cheap_in_the_middle, spread=True)
    assert sorted(order) == list(range(8))
    for left, widest in ((1, 2), (3, 2), (4, 3), (5, 4)):
        kept = sorted(order[left:])
        assert (kept[0], kept[-1]) == (0, 7)
        assert max(b - a for a, b in itertools.pairwise(kept)) <= widest


def test_a_smaller_depth_begins_with_the_layers_that_it_keeps(
    network: NetworkConfig, noisy: Noisy
) -> None:
    torch.manual_seed(0)
    trained = FactorisedDiT(network, depths=(2, 3, 4))
    torch.nn.init.normal_(trained.stem.final.weight, std=0.2)
    torch.nn.init.normal_(trained.scales.sigma[Kind.ADALN])
    assert trained.layer_order == ()
    assert list(trained.trained_depths) == [4]
    trained.begin_depths((1, 3, 0, 2))
    assert list(trained.trained_depths) == [2, 3, 4]
    kept = subset(trained.scales, (0, 2))
    expected = predict(trained.stem, trained.genes, kept, noisy)
    torch.testing.assert_close(trained(*noisy, depth=2), expected)
    trained.scales_of(2).sigma[Kind.QKV].data.zero_()
    assert not torch.equal(trained(*noisy, depth=2), expected)
    assert trained.scales.sigma[Kind.QKV].data.abs().min() > 0


def test_a_rank_prefix_has_the_longest_components(network: NetworkConfig, noisy: Noisy) -> None:
    torch.manual_seed(0)
    trained = FactorisedDiT(network, depths=(2, 4))
    torch.nn.init.normal_(trained.stem.final.weight, std=0.2)
    for depth in (2, 4):
        torch.nn.init.normal_(trained.scales_of(depth).sigma[Kind.ADALN])
    before = [trained(*noisy, depth=depth) for depth in (2, 4)]
    trained.order_components()
    for depth, expected in zip((2, 4), before, strict=True):
        torch.testing.assert_close(trained(*noisy, depth=depth), expected, atol=1e-4, rtol=1e-4)
    for kind in Kind:
        u, v = trained.genes.u[kind], trained.genes.v[kind]
        lengths = trained.scales.sigma[kind].norm(dim=0) * u.norm(dim=0) * v.norm(dim=0)
        assert (lengths.diff() <= 0).all()
