import itertools

import pytest

from learngenes.config import DType, Mode, Sampling, Size, SizeSpace
from learngenes.sizing.ladder import MOST_RUNGS, Rung, ladder
from learngenes.sizing.quality import Pictures, PictureTable, QualityTable

SIZES = SizeSpace(depths=tuple(range(2, 13)), ranks=(16, 64))
TOP = Size(depth=12, rank=64)
LOSSES = ((0.4, 0.2), (0.3, 0.15), (0.2, 0.1))
TABLE = QualityTable(
    depths=(2, 6, 12),
    ranks=(16, 64),
    unretrained=LOSSES,
    retrained=LOSSES,
    dtype_loss_ratios={DType.FLOAT32: 1.0, DType.BFLOAT16: 1.25},
    source="made up",
)
BRIEF, LONG = (Sampling(num_inference_steps=n, guidance_scale=1) for n in (4, 16))


def rungs(
    table: QualityTable = TABLE, *samplings: Sampling, top: Size = TOP, dtype: DType = DType.FLOAT32
) -> tuple[Rung, ...]:
    return ladder(table, SIZES, samplings or (BRIEF,), top=top, mode=Mode.MATERIALISED, dtype=dtype)


def test_sizes_are_few_from_the_deepest_to_the_shallowest() -> None:
    found = rungs()
    assert len(found) == MOST_RUNGS
    assert (found[0].size, found[0].quality) == (TOP, 1.0)
    assert found[-1].size == Size(depth=2, rank=64)
    assert found[-1].quality == pytest.approx(0.5)
    qualities = [rung.quality for rung in found]
    assert qualities == sorted(qualities, reverse=True)
    ratios = [a.size.depth / b.size.depth for a, b in itertools.pairwise(found)]
    assert max(ratios) < 1.7


def test_none_is_larger_than_the_top() -> None:
    found = rungs(top=Size(depth=3, rank=16))
    assert [rung.size for rung in found] == [Size(depth=d, rank=16) for d in (3, 2)]


def test_a_dtype_costs_what_it_was_measured_to() -> None:
    assert rungs(dtype=DType.BFLOAT16)[0].quality == pytest.approx(0.8)
    assert rungs(dtype=DType.INT4) == ()  # nobody has measured it


def test_what_is_no_better_for_more_is_left_out() -> None:
    assert {rung.sampling for rung in rungs(TABLE, BRIEF, LONG)} == {
        BRIEF
    }  # by loss they are alike
    poor, good = (((9.0, 8.0), (7.0, 6.0), (5.0, 4.0)), ((8.0, 6.0), (5.0, 4.0), (3.0, 2.0)))
    accuracies = (((0.5, 0.5),) * 3,) * 2
    tables = tuple(
        PictureTable(sampling=sampling, distances=distances, accuracies=accuracy)
        for sampling, distances, accuracy in zip(
            (BRIEF, LONG), (poor, good), accuracies, strict=True
        )
    )
    pictures = Pictures(
        floor=1.0,
        count=10,
        tables=tables,
        heldout_error=0.0,
        source="made up",
        accuracy_of_real=0.5,
    )
    found = rungs(TABLE.model_copy(update={"pictures": pictures}), BRIEF, LONG)
    assert {rung.sampling for rung in found} == {BRIEF, LONG}
    costs = [rung.size.depth * rung.sampling.num_inference_steps for rung in found]
    assert costs == sorted(costs, reverse=True)
    qualities = [rung.quality for rung in found]
    assert qualities == sorted(qualities, reverse=True)
    assert found[0].quality == pytest.approx(7 / 8)  # 9 is the worst, 1 are real images


def test_a_guide_guides_what_is_larger() -> None:
    guided = Sampling(guide=Size(depth=6, rank=16))
    assert min(rung.size.depth for rung in rungs(TABLE, guided)) > 6
    assert rungs(TABLE, guided, top=Size(depth=4, rank=64)) == ()
