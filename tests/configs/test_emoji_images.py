import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from learngenes.data import load


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A package of 60 emoji in two categories; every second one also in another skin tone."""
    entries = []
    files = {}
    for number in range(60):
        entry = {
            "unified": f"1F{number:03X}",
            "image": f"{number}.png",
            "category": ("People & Body", "Flags")[number % 3 == 0],
            "has_img_google": number != 7,
            "skin_variations": {},
        }
        if number % 2:
            tone = {"image": f"{number}-tone.png", "has_img_google": True}
            entry["skin_variations"] = {"1F3FB": tone}
            files[tone["image"]] = (255, 0, 0, 255)
        files[entry["image"]] = (0, 0, 0, 0)
        entries.append(entry)
    entries.append({"unified": "1F3FB", "category": "Component", "image": "tone.png"})
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as package:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))

        add("emoji.json", json.dumps(entries).encode())
        for name, colour in files.items():
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64), colour).save(picture, "PNG")
            add(f"img/google/64/{name}", picture.getvalue())
    return path


def test_emoji_become_a_folder_that_a_family_is_trained_on(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    subprocess.run([sys.executable, "configs/emoji_images.py", archive, folder], check=True)
    splits = {split: load(folder, split, (), 32) for split in ("train", "test")}
    assert {data.class_names for data in splits.values()} == {("Flags", "People & Body")}
    assert sum(map(len, splits.values())) == 60 + 30 - 1
    assert 0 < len(splits["test"]) < len(splits["train"]) / 3
    names = {s: {p.stem.partition("-")[0] for p in (folder / s).rglob("*.png")} for s in splits}
    assert not names["train"] & names["test"]
    colours = {tuple(image[:, 0, 0].tolist()) for image in splits["train"].images}
    assert colours == {(255, 255, 255), (255, 0, 0)}
