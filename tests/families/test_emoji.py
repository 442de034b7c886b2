import json
import subprocess
import sys
from pathlib import Path

import pytest

from learngenes.data.labelled import load
from tests.support.archives import png, tarred

CLEAR, RED = (0, 0, 0, 0), (255, 0, 0, 255)
Drawings = dict[str, tuple[int, int, int, int]]


def package(path: Path, folder: str, drawings: Drawings, index: bytes = b"") -> Path:
    """Package as npm packs it: pictures of one colour in a folder, and perhaps an index."""
    files = {"package/emoji.json": index} if index else {}
    for name, colour in drawings.items():
        content = png(colour, 64, "RGBA", Path(name).suffix[1:])
        files[f"package/{folder}/{name}"] = content
    path.write_bytes(tarred(files, "gz").getvalue())
    return path


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """60 emoji in two categories, every second one also in another skin tone; one not drawn."""
    entries = []
    google: Drawings = {}
    for number in range(60):
        name = f"1f{number:03x}-fe0f"
        entry = {
            "unified": name.upper(),
            "image": f"{name}.png",
            "category": ("People & Body", "Flags")[number % 3 == 0],
        }
        if number % 2:
            entry["skin_variations"] = {"1F3FB": {"image": f"{name}-1f3fb.png"}}
            google[f"{name}-1f3fb.png"] = RED
        if number != 7:
            google[f"{name}.png"] = CLEAR
        entries.append(entry)
    entries.append({"unified": "1F3FB", "category": "Component", "image": "1f3fb.png"})
    fluent = {f"{Path(name).stem.replace('-fe0f', '')}.webp": RED for name in list(google)[::2]}
    return [
        package(tmp_path / "google.tgz", "img/google/64", google, json.dumps(entries).encode()),
        package(tmp_path / "twitter.tgz", "img/twitter/64", google),
        package(tmp_path / "fluent.tgz", "assets", fluent),
    ]


def test_emoji_become_folders_of_three_styles(packages: list[Path], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "families/prepare/emoji.py", *packages, tmp_path], check=True)
    styles = {
        style: {split: load(tmp_path / style, split, (), 32) for split in ("train", "test")}
        for style in ("emoji", "emoji-twitter", "emoji-fluent")
    }
    for splits in styles.values():
        assert {data.class_names for data in splits.values()} == {("Flags", "People & Body")}
    sizes = [sum(map(len, splits.values())) for splits in styles.values()]
    assert sizes == [60 + 30 - 1, 60 + 30 - 1, 45]
    noto = styles["emoji"]
    assert 0 < len(noto["test"]) < len(noto["train"]) / 3
    names = {
        split: {path.stem[:5] for path in tmp_path.glob(f"emoji*/{split}/*/*.png")}
        for split in noto
    }
    assert not names["train"] & names["test"]  # in whatever style and skin tone
    colours = {tuple(image[:, 0, 0].tolist()) for image in noto["train"].images}
    assert colours == {(255, 255, 255), (255, 0, 0)}
