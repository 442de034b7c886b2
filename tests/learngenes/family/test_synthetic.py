from pathlib import Path

import pytest
import torch

from learngenes.config import DType, Mode, NetworkConfig, SizeSpace
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import (
    DIT_XL_2,
    DIT_XL_2_SIZES,
    SHAPES,
    millions,
    write_synthetic_family,
)
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.cost import learngene_parameters
from learngenes.sizing.solver import Candidates, solve
from tests.support.sizing import device_profile

SIZES = SizeSpace(depths=(2, 4), ranks=(8, 48))


@pytest.fixture
def random_family(tmp_path: Path, network: NetworkConfig) -> Family:
    write_synthetic_family(tmp_path / "random", network, SIZES)
    return load_family(tmp_path / "random")


def test_it_loads_like_any_other(random_family: Family, network: NetworkConfig) -> None:
    manifest = random_family.manifest
    assert manifest.name == "random"
    assert (manifest.network, manifest.sizes) == (network, SIZES)
    assert len(manifest.class_names) == network.num_classes
    assert manifest.trained_steps == 0
    assert random_family.is_random
    assert random_family.limited_data.images.shape[1:] == (3, 8, 8)


def test_its_quality_says_that_it_is_made_up(random_family: Family) -> None:
    table = random_family.quality
    assert table is not None
    assert (table.depths, table.ranks) == (SIZES.depths, SIZES.ranks)
    assert "not a measurement" in table.source
    assert set(table.dtype_loss_ratios) == set(DType)


def test_a_budget_can_be_solved_for_it(random_family: Family, network: NetworkConfig) -> None:
    assert random_family.quality is not None
    profile = device_profile(network, SIZES)
    candidates = Candidates.of(network, SIZES, random_family.quality, profile, Workload())
    everything = solve(candidates, Constraints()).plan
    assert (everything.depth, everything.rank, everything.quality) == (4, 48, 1)
    budget = everything.predicted.memory_bytes - 1
    less = solve(candidates, Constraints(max_mem_bytes=budget)).plan
    assert less.predicted.memory_bytes <= budget


def test_no_block_is_the_identity(random_family: Family) -> None:
    """As adaLN-Zero is before training; then nothing would be computed."""
    features: list[torch.Tensor] = []
    model = random_family.assemble(random_family.scales, Mode.MATERIALISED)
    for layer in model.layers:
        layer["adaLN"].register_forward_hook(lambda *args: features.append(args[-1]))
    model(torch.zeros(1, 3, 8, 8), torch.tensor([10]), torch.tensor([0]))
    assert len(features) == 4
    assert all(modulation.abs().max() > 0 for modulation in features)


def test_its_images_are_of_its_classes(random_family: Family, network: NetworkConfig) -> None:
    assert random_family.limited_data.labels.max() < network.num_classes


def test_by_default_it_has_the_shape_of_dit_xl_2() -> None:
    assert learngene_parameters(DIT_XL_2, DIT_XL_2_SIZES.ranks[-1]) == 23 * 1152 * 1152
    assert DIT_XL_2.tokens == 256
    assert SHAPES["dit-xl-2-512"].tokens == 1024
    published = {"s": 33, "b": 130, "l": 458, "xl": 675}  # arXiv 2212.09748, table 4
    for size, parameters in published.items():
        assert millions(SHAPES[f"dit-{size}-2-256"]) == pytest.approx(parameters, rel=0.02)
    assert DIT_XL_2_SIZES.depths[-1] == DIT_XL_2.depth
    assert DIT_XL_2_SIZES.ranks[-1] == DIT_XL_2.rank
