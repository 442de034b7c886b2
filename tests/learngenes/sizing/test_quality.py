import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from learngenes.config import DType, Mode, SizeSpace
from learngenes.sizing.quality import QualityTable
from tests.support.sizing import quality_table

SIZES = SizeSpace(depths=(2, 4, 8), ranks=(16, 64, 256))
ROUGH = ((0.5, 0.3, 0.4), (0.6, 0.2, 0.3), (0.4, 0.35, 0.25))
"""Losses as noise leaves them: some rise with depth or rank."""


@pytest.fixture
def table() -> QualityTable:
    return quality_table(SIZES)


def quality(table: QualityTable, depth: float, rank: float, loss_ratio: float = 1.0) -> float:
    losses = table.losses(np.array([depth]), np.array([rank])) * max(1, loss_ratio)
    return float(table.qualities(losses)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": ()}, "must have 0 rows of 3 losses"),
        ({"depths": (2, 8, 4)}, "ascending and without repeats"),
        ({"ranks": (16, 16, 64)}, "ascending and without repeats"),
        ({"depths": (2, 4)}, "must have 2 rows of 3 losses"),
        ({"retrained": ((0.1, 0.1),) * 3}, "must have 3 rows of 3 losses"),
        ({"unretrained": ((0.1, 0.1, 0.1),) * 2}, "must have 3 rows of 3 losses"),
        ({"retrained": ((0.1, 0.1, 0.0),) * 3}, "greater than 0"),
        ({"dtype_loss_ratios": {"bfloat16": 1.0}}, "must have float32"),
        ({"dtype_loss_ratios": {"float32": 1.0, "int2": 1.0}}, "int8"),
        ({"fid": 3.0}, "Extra inputs"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    table: QualityTable, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        QualityTable.model_validate({**table.model_dump(), **change})


def test_it_comes_back_from_json_as_it_was(table: QualityTable) -> None:
    assert QualityTable.model_validate_json(table.model_dump_json()) == table


def test_at_the_points_of_the_grid_it_is_what_was_measured(table: QualityTable) -> None:
    best = table.retrained[-1][-1]
    for depth, losses in zip(SIZES.depths, table.retrained, strict=True):
        for rank, loss in zip(SIZES.ranks, losses, strict=True):
            assert quality(table, depth, rank) == pytest.approx(best / loss)


@pytest.mark.parametrize("table", [quality_table(SIZES), quality_table(SIZES, retrained=ROUGH)])
def test_the_largest_size_is_the_best_and_counts_as_one(table: QualityTable) -> None:
    assert quality(table, 8, 256) == 1
    assert all(0 < quality(table, depth, 16) < 1 for depth in range(1, 9))


def test_the_loss_is_linear_in_depth_and_in_the_logarithm_of_the_rank(table: QualityTable) -> None:
    best = table.retrained[-1][-1]

    def loss(depth: float, rank: float) -> float:
        return best / quality(table, depth, rank)

    assert loss(6, 64) == pytest.approx((loss(4, 64) + loss(8, 64)) / 2)
    assert loss(4, 128) == pytest.approx((loss(4, 64) + loss(4, 256)) / 2)
    corners = [loss(depth, rank) for depth in (4, 8) for rank in (64, 256)]
    assert loss(6, 128) == pytest.approx(sum(corners) / 4)


@pytest.mark.parametrize("table", [quality_table(SIZES), quality_table(SIZES, retrained=ROUGH)])
def test_more_is_never_worse(table: QualityTable) -> None:
    depths, ranks = np.arange(1, 11), np.arange(8, 300, 7)
    every_depth, every_rank = (a.ravel() for a in np.meshgrid(depths, ranks, indexing="ij"))
    losses = table.losses(every_depth, every_rank).reshape(len(depths), len(ranks))
    qualities = table.qualities(losses)
    assert np.diff(qualities, axis=0).min() > -1e-12
    assert np.diff(qualities, axis=1).min() > -1e-12


def test_a_rise_is_replaced_by_the_least_loss_of_any_smaller_size(table: QualityTable) -> None:
    rough = table.model_copy(update={"retrained": ROUGH})
    assert quality(rough, 2, 256) == quality(rough, 2, 64)
    assert quality(rough, 4, 16) == quality(rough, 2, 16)
    assert quality(rough, 4, 64) == pytest.approx(0.2 / 0.2)


def test_sizes_of_one_loss_are_exactly_equal() -> None:
    """Else the solver prefers the larger for its last bit, and not the quicker."""
    sizes = SizeSpace(depths=(2, 9), ranks=(16, 64))
    for loss in (0.1, 0.13, 0.2, 0.37):
        level = quality_table(sizes, retrained=((loss, loss), (loss, loss)))
        assert {quality(level, depth, 16) for depth in range(2, 10)} == {1.0}


def test_beyond_the_grid_its_edge_holds(table: QualityTable) -> None:
    assert quality(table, 1, 64) == quality(table, 2, 64)
    assert quality(table, 20, 64) == quality(table, 8, 64)
    assert quality(table, 4, 1) == quality(table, 4, 16)
    assert quality(table, 4, 1000) == quality(table, 4, 256)
    point = quality_table(SizeSpace(depths=(4,), ranks=(64,)))
    assert quality(point, 2, 16) == quality(point, 8, 256) == 1


def test_imported_layers_are_measured_beside_what_is_shared() -> None:
    only = QualityTable.model_validate(
        {
            **dict.fromkeys(("depths", "ranks", "unretrained", "retrained"), ()),
            "dtype_loss_ratios": {},
            "source": "made up",
            "imported": {2: 0.4, 6: 0.2},
            "imported_loss_ratios": {"float32": 1.0},
        }
    )
    depths = np.array([2, 4, 6])
    qualities = only.qualities(only.imported_losses(depths))
    assert qualities.tolist() == pytest.approx([0.5, 2 / 3, 1])
    assert only.loss_ratio(Mode.DENSE, DType.FLOAT32) == 1
    assert only.loss_ratio(Mode.FACTORED, DType.FLOAT32) == math.inf
    assert only.shared_alone.imported == {}


def test_the_best_of_both_is_what_quality_is_a_share_of(table: QualityTable) -> None:
    least = float(np.min(table.retrained))
    with_better = table.model_copy(update={"imported": {4: least / 2}})
    assert quality(with_better, 8, 256) == pytest.approx(quality(table, 8, 256) / 2)


def test_a_table_of_nothing_is_refused() -> None:
    nothing = dict.fromkeys(("depths", "ranks", "unretrained", "retrained"), ())
    with pytest.raises(ValidationError, match="a loss of some size"):
        QualityTable.model_validate({**nothing, "dtype_loss_ratios": {}, "source": "made up"})


def test_a_rounded_weight_has_a_ratio_of_its_own(table: QualityTable) -> None:
    assert table.loss_ratio(Mode.FACTORED, DType.INT4) == 1.02
    assert table.loss_ratio(Mode.MATERIALISED, DType.INT4) == 1.04
    assert table.loss_ratio(Mode.MATERIALISED, DType.BFLOAT16) == 1.001
    earlier = table.model_dump(exclude={"materialised_loss_ratios"})
    of_before = QualityTable.model_validate(earlier)
    assert of_before.loss_ratio(Mode.MATERIALISED, DType.INT8) == math.inf


def test_a_storage_that_loses_is_worth_less_and_none_is_worth_more(table: QualityTable) -> None:
    ratio = table.dtype_loss_ratios[DType.INT8]
    assert quality(table, 4, 64, ratio) == pytest.approx(quality(table, 4, 64) / 1.01)
    assert quality(table, 4, 64, math.inf) == 0
    assert quality(table, 4, 64, 0.99) == quality(table, 4, 64)
