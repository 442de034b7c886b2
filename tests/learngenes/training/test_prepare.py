from pathlib import Path

import pytest
import torch

from learngenes.config import Mode
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.sigma import subset
from learngenes.training.prepare import HEALED, PREPARATION, heal, prepare
from learngenes.training.tuning import split_heldout

BRIEF = PREPARATION.model_copy(update={"steps": 20, "heldout_every_steps": 5})


@pytest.fixture
def begun(family: Family) -> Family:
    depths = {2: subset(family.scales, (0, 3)), 4: family.scales}
    return Family(**{**vars(family), "depths": depths})


def test_each_depth_learns_alone(begun: Family, tmp_path: Path) -> None:
    told: list[tuple[str, int, float]] = []
    depths = prepare(begun, begun.limited_data, tmp_path, BRIEF, lambda *step: told.append(step))
    steps = [(depth, done) for depth in ("2", "4") for done in range(1, 21)]
    assert [step[:2] for step in told] == steps
    assert not torch.equal(depths[2].stacked()["sigma.o"], begun.depths[2].stacked()["sigma.o"])
    assert not torch.equal(depths[4].stacked()["sigma.o"], begun.scales.stacked()["sigma.o"])

    again = prepare(begun, begun.limited_data, tmp_path, BRIEF, lambda *step: told.append(step))
    assert len(told) == 40
    torch.testing.assert_close(again[2].stacked(), depths[2].stacked())


def test_sigma_mends_what_rounding_broke_at_every_depth(begun: Family, tmp_path: Path) -> None:
    healed = heal(begun, begun.limited_data, tmp_path, BRIEF)
    assert healed.keys() == set(HEALED)
    _, held = split_heldout(begun.limited_data, 200)
    process = noise_process(begun.manifest.diffusion)
    for (mode, dtype), depths in healed.items():
        assert depths.keys() == begun.depths.keys()
        for depth, own in depths.items():
            rounded, mended = (
                heldout_loss(
                    begun.assemble(scales, mode, dtype), process, held.normalised(), held.labels
                )
                for scales in (begun.depths[depth], own)
            )
            assert mended < rounded
    names = {file.name for file in tmp_path.iterdir()}
    assert f"prepared-{Mode.MATERIALISED}-int4-4.safetensors" in names
