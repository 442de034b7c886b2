"""Make an image folder of the npm package `emoji-datasource-google` (Noto, Apache-2.0).

    python configs/emoji_images.py emoji-datasource-google-16.0.0.tgz var/data/emoji

Classes are the data's own categories; skin tones are images of their own. Every tenth emoji, with
all its skin tones, is in `test` and the others in `train`, so that no face is in both. Images are
laid on white: 32 x 32, RGB.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE = 32
STYLE = "google"
TEST_SHARE = 10


def emoji(package: tarfile.TarFile) -> Iterator[tuple[str, str, str]]:
    """(file, category, split) of every image that this style has."""
    index = package.extractfile("package/emoji.json")
    assert index is not None, "emoji.json is a file"
    for entry in json.load(index):
        if entry["category"] == "Component":  # five skin tones alone
            continue
        digest = hashlib.sha256(entry["unified"].encode()).digest()
        split = "test" if digest[0] % TEST_SHARE == 0 else "train"
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            if variant[f"has_img_{STYLE}"]:
                yield variant["image"], entry["category"], split


def main(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as package:
        for file, category, split in emoji(package):
            packed = package.extractfile(f"package/img/{STYLE}/64/{file}")
            assert packed is not None, f"{file} is a file"
            drawn = Image.open(io.BytesIO(packed.read())).convert("RGBA")
            white = Image.new("RGBA", drawn.size, "white")
            white.alpha_composite(drawn)
            folder = directory / split / category
            folder.mkdir(parents=True, exist_ok=True)
            small = white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            small.save(folder / file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
