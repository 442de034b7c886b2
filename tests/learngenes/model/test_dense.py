import torch

from learngenes.config import Mode, NetworkConfig, Size
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT, materialised
from learngenes.model.dit import Stem
from learngenes.model.factors import Learngenes, Scales
from learngenes.model.sigma import interpolated
from tests.learngenes.model.test_dit import inputs


def test_it_starts_as_the_model_that_it_was_written_out_from(family: Family) -> None:
    sigma = family.scales_of(Size(depth=3, rank=32))
    dense = DenseDiT(family.stem, materialised(family.genes, sigma))
    given = inputs(family.manifest.network)
    with torch.no_grad():
        factored = family.assemble(sigma, Mode.FACTORED)
        torch.testing.assert_close(dense(*given), factored(*given))


def test_training_moves_its_own_weights_and_not_the_learngenes(
    network: NetworkConfig, stem: Stem, genes: Learngenes, scales: Scales
) -> None:
    before = {name: tensor.clone() for name, tensor in genes.state_dict().items()}
    dense = DenseDiT(stem, materialised(genes, interpolated(scales, Size(depth=2, rank=16))))
    first = dense.weights()
    copies = [{kind: weight.clone() for kind, (weight, _) in layer.items()} for layer in first]
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    dense(*inputs(network)).square().mean().backward()
    optimizer.step()
    for layer, copy in zip(dense.weights(), copies, strict=True):
        for kind, (weight, _) in layer.items():
            assert not torch.equal(weight, copy[kind])
    assert all(torch.equal(genes.state_dict()[name], tensor) for name, tensor in before.items())
