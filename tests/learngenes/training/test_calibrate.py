import dataclasses
from pathlib import Path

import pytest
import torch

from learngenes.config import SHARED_MODES, DType, Mode, Size, executable
from learngenes.family.family import Family, load_family, write_quality
from learngenes.training.calibrate import calibrate, loss_ratios, spread
from learngenes.training.retrain import RetrainingConfig, retrain

CONFIG = RetrainingConfig(steps=4, heldout_every_steps=2)


@pytest.mark.parametrize(
    ("points", "expected"),
    [(2, (2, 12)), (3, (2, 6, 12)), (4, (2, 6, 8, 12)), (6, (2, 4, 6, 8, 10, 12))],
)
def test_a_grid_has_both_ends(points: int, expected: tuple[int, ...]) -> None:
    assert spread((2, 4, 6, 8, 10, 12), points) == expected


def test_a_grid_never_has_more_points_than_there_are_sizes() -> None:
    assert spread((2, 3), 4) == (2, 3)
    assert spread((5,), 2) == (5,)


def test_every_size_of_the_grid_is_retrained_and_told(family: Family) -> None:
    told: list[tuple[int, int, Size, float, float]] = []
    table = calibrate(family, CONFIG, points=2, on_size=lambda *size: told.append(size))
    assert (table.depths, table.ranks) == ((2, 4), (8, 48))
    assert [(done, of) for done, of, *_ in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for _, _, size, before, after in told:
        row, column = table.depths.index(size.depth), table.ranks.index(size.rank)
        result = retrain(family, family.scales_of(size), CONFIG)
        assert table.unretrained[row][column] == before == result.initial_heldout_loss
        assert table.retrained[row][column] == after == result.heldout_loss
        assert after < before
    assert table.dtype_loss_ratios[DType.FLOAT32] == 1
    assert "4 steps of Sigma retraining" in table.source


def test_a_table_becomes_part_of_its_family_and_changes_no_weights(
    family: Family, families_dir: Path
) -> None:
    table = calibrate(family, CONFIG, points=2)
    write_quality(families_dir / "tiny", table)
    calibrated = load_family(families_dir / "tiny")
    assert calibrated.quality == table
    assert calibrated.fingerprint == family.fingerprint


@pytest.mark.parametrize("mode", SHARED_MODES)
def test_storage_is_judged_by_its_worst_loss_over_float32s(family: Family, mode: Mode) -> None:
    small, large = (family.scales_of(size) for size in (Size(depth=2, rank=8), family.full_size))
    each = [loss_ratios(family, [scales], CONFIG, mode) for scales in (small, large)]
    worst = loss_ratios(family, [small, large], CONFIG, mode)
    executed = [dtype for dtype in DType if executable(mode, dtype)]
    assert worst == {dtype: max(ratios[dtype] for ratios in each) for dtype in executed}
    assert worst[DType.FLOAT32] == 1
    for dtype in (DType.BFLOAT16, DType.INT8):
        assert worst[dtype] != 1
        assert worst[dtype] == pytest.approx(1, abs=0.05)


def test_few_bits_are_judged_with_the_sigma_that_was_healed_for_them(family: Family) -> None:
    healed, how = family.scales_of(family.full_size), (Mode.FACTORED, DType.INT4)
    with torch.no_grad():
        for bias in healed.bias.values():
            bias.add_(3)
    depth, order = family.full_size.depth, tuple(range(family.full_size.depth))
    manifest = family.manifest.model_copy(update={"layer_order": order})
    other = dataclasses.replace(family, manifest=manifest, healed={how: {depth: healed}})
    before, after = (loss_ratios(f, [family.scales], CONFIG, how[0]) for f in (family, other))
    assert after[DType.INT4] != pytest.approx(before[DType.INT4], rel=0.01)
    assert after[DType.INT3] == before[DType.INT3]
