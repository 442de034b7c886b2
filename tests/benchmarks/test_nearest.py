from pathlib import Path

import torch
from PIL import Image

from benchmarks.paper.nearest import draw, nearest


def test_the_nearest_image_and_how_far_it_is(tmp_path: Path) -> None:
    known = torch.stack(
        [torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (0, 100, 200)]
    )
    asked = torch.stack([torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (90, 200)])
    distances, places = nearest(asked, known)
    torch.testing.assert_close(distances, torch.tensor([10.0, 0.0]))
    assert places.tolist() == [1, 2]
    draw(asked, known[places], distances, tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.getpixel((3, 3)) == (90, 90, 90)
        assert picture.getpixel((3, 11)) == (100, 100, 100)
