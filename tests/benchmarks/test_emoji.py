import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.paper import emoji, tables
from benchmarks.paper.emoji import Style, compared, draw, judged, measure, nearest
from benchmarks.paper.rows import Rows
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family


@pytest.fixture
def styles(limited_data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> list[Style]:
    """Two styles: the limited data as they are, and inverted."""
    monkeypatch.setattr(emoji, "SAMPLES", 12)
    monkeypatch.setattr(emoji, "STEPS", 60)
    half = torch.arange(len(limited_data)) % 2 == 0
    inverted = dataclasses.replace(limited_data, images=255 - limited_data.images)
    return [
        Style(name, *(images.subset(torch.nonzero(part).flatten()) for part in (half, ~half)))
        for name, images in (("own", limited_data), ("inverted", inverted))
    ]


def test_sigma_learns_a_style_and_leaves_the_family_as_it_is(
    family: Family, styles: list[Style], tmp_path: Path
) -> None:
    rows, file = Rows(tmp_path / "rows"), tmp_path / "styles.png"
    before = {name: scale.clone() for name, scale in family.scales.state_dict().items()}
    measure(rows, family, styles, file)
    own, inverted = ({row["key"]["style"]: row for row in rows.all()}[s.name] for s in styles)
    assert own["loss"] == own["loss_before"]
    assert inverted["loss"] < inverted["loss_before"]
    for name, scale in family.scales.state_dict().items():
        torch.testing.assert_close(scale, before[name])
    heading, *lines = tables.emoji({"rows": rows.all()})
    assert [line[0] for line in lines] == ["inverted", "own"]
    assert {len(line) for line in lines} == {len(heading)}
    with Image.open(file) as picture:
        assert picture.size == (12 * 16, 2 * (2 * 16 + 2 * emoji.CAPTION))
    file.unlink()
    measure(rows, family, styles, file)
    assert not file.exists(), "nothing new"


def test_samples_that_are_copies_are_told(family: Family, styles: list[Style]) -> None:
    row, _ = judged(family, styles[0], steps=0)
    assert row["nearer_than_99_percent_of_unseen"] == 0
    row, pairs = compared(styles[0].train.images[:12], styles[0])
    assert (row["nearest_median"], row["nearer_than_99_percent_of_unseen"]) == (0, 1)
    assert torch.equal(pairs.neighbours, styles[0].train.images[:12])


def test_the_nearest_image_and_how_far_it_is(tmp_path: Path) -> None:
    known, asked = (
        torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
        for levels in ((0, 100, 200), (90, 200))
    )
    distances, places = nearest(asked, known)
    torch.testing.assert_close(distances, torch.tensor([10.0, 0.0]))
    assert places.tolist() == [1, 2]
    draw([("some", emoji.Pairs(asked, known[places], distances))], tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.getpixel((3, emoji.CAPTION + 3)) == (90, 90, 90)
        assert picture.getpixel((3, emoji.CAPTION + 11)) == (100, 100, 100)
