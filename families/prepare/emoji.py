"""Make image folders of the emoji that npm packages carry, in three styles.

    python families/prepare/emoji.py emoji-datasource-google-16.0.0.tgz \
        emoji-datasource-twitter-16.0.0.tgz lobehub-fluent-emoji-3d-1.1.0.tgz var/data

makes `emoji` (Noto, Apache-2.0), which the family is trained on, and the tasks `emoji-twitter`
(Twemoji, CC-BY-4.0) and `emoji-fluent` (Fluent 3D, MIT). Classes are the data's own categories;
skin tones are images of their own. Every tenth emoji, with all its skin tones, is in `test` and
the others in `train`, in every style alike, so that no face is in both. Images are laid on white:
32 x 32, RGB; `emoji-64` are those of `emoji`, 64 x 64, for a family of latents.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE, LARGE_SIDE = 32, 64
TEST_SHARE = 10


def emoji(package: tarfile.TarFile) -> Iterator[tuple[str, str, str]]:
    """(file, category, split) of every emoji that the index of an emoji-datasource package has."""
    for entry in json.loads(_read(package, "package/emoji.json")):
        if entry["category"] == "Component":  # five skin tones alone
            continue
        digest = hashlib.sha256(entry["unified"].encode()).digest()
        split = "test" if digest[0] % TEST_SHARE == 0 else "train"
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            yield variant["image"], entry["category"], split


def code_points(file: str) -> str:
    """What names an emoji in every package: without the marks that ask for the colour form."""
    return Path(file).stem.lower().replace("-fe0f", "")


def write(
    index: tarfile.TarFile,
    package: tarfile.TarFile,
    folder: str,
    directory: Path,
    side: int = SIDE,
) -> None:
    """Every emoji of `index` that `package` has an image of in its `folder`."""
    drawings = {
        code_points(name): name
        for name in package.getnames()
        if name.startswith(f"package/{folder}/")
    }
    for file, category, split in emoji(index):
        drawing = drawings.get(code_points(file))
        if drawing is None:
            continue
        drawn = Image.open(io.BytesIO(_read(package, drawing))).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        white.alpha_composite(drawn)
        target = directory / split / category
        target.mkdir(parents=True, exist_ok=True)
        small = white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        small.save((target / file).with_suffix(".png"), optimize=True)


def _read(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{name} is a file"
    return file.read()


def main(google: Path, twitter: Path, fluent: Path, directory: Path) -> None:
    with tarfile.open(google) as index:
        write(index, index, "img/google/64", directory / "emoji")
        write(index, index, "img/google/64", directory / "emoji-64", LARGE_SIDE)
        for archive, folder, name in (
            (twitter, "img/twitter/64", "emoji-twitter"),
            (fluent, "assets", "emoji-fluent"),
        ):
            with tarfile.open(archive) as package:
                write(index, package, folder, directory / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
