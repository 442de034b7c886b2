from pathlib import Path

import pytest
import torch

from learngenes.family.family import Family
from learngenes.model.sigma import subset
from learngenes.training.prepare import PREPARATION, prepare

BRIEF = PREPARATION.model_copy(update={"steps": 20, "heldout_every_steps": 5})


@pytest.fixture
def begun(family: Family) -> Family:
    depths = {2: subset(family.scales, (0, 3)), 4: family.scales}
    return Family(**{**vars(family), "depths": depths})


def test_each_smaller_depth_learns_and_the_full_size_stays(begun: Family, tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    depths = prepare(begun, begun.limited_data, tmp_path, BRIEF, lambda *step: told.append(step))
    assert [step[:2] for step in told] == [(2, done) for done in range(1, 21)]
    assert not torch.equal(depths[2].stacked()["sigma.o"], begun.depths[2].stacked()["sigma.o"])
    torch.testing.assert_close(depths[4].stacked(), begun.scales.stacked())

    again = prepare(begun, begun.limited_data, tmp_path, BRIEF, lambda *step: told.append(step))
    assert len(told) == 20
    torch.testing.assert_close(again[2].stacked(), depths[2].stacked())
