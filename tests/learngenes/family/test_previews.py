from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from learngenes.config import Mode, Size
from learngenes.family.family import load_family
from learngenes.family.previews import write_previews
from learngenes.model.sampling import sample


@pytest.mark.parametrize("rows", [2, 32])
def test_a_row_for_each_size_and_a_column_for_each_class(
    families_dir: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("learngenes.family.previews.ROWS", rows)
    family = load_family(families_dir / "tiny")
    space, network = family.manifest.sizes, family.manifest.network
    done: list[tuple[int, int]] = []
    file = write_previews(family, families_dir / "tiny", lambda *of: done.append(of))
    count = len(space.depths) * len(space.ranks)
    assert done[-1] == (count, count)
    sheet = Image.open(file)
    side, classes = network.sample_size, len(family.manifest.class_names)
    assert sheet.size == (classes * side, count * side)
    # the last row is the largest size
    size = Size(depth=space.depths[-1], rank=space.ranks[-1])
    model = family.assemble(family.scales_of(size), Mode.MATERIALISED)
    labels = list(range(classes))
    images = sample(model, family.manifest.diffusion, labels, seeds=labels)
    row = np.asarray(sheet)[-side:]
    assert np.array_equal(row[:, side : 2 * side], images[1].permute(1, 2, 0).squeeze(-1))
