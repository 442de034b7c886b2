"""Schemathesis' hooks: what is sent to POST /tasks, which takes no JSON."""

import io
import random
import tarfile
import zipfile
from collections.abc import Callable

import schemathesis
from hypothesis import strategies as st
from PIL import Image

Files = dict[str, bytes]
MOST_FILES = 6


def _zip(files: Files) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def _tar(files: Files, mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _tar_gz(files: Files) -> bytes:
    return _tar(files, "w:gz")


PACKS: tuple[Callable[[Files], bytes], ...] = (_zip, _tar, _tar_gz)


def _png(colour: int) -> bytes:
    image = io.BytesIO()
    Image.new("L", (28, 28), colour).save(image, "PNG")
    return image.getvalue()


def _picture(chance: random.Random, kind: str) -> bytes:
    """A picture of a kind, in some mode and size, with a text where it may have one."""
    mode = chance.choice({"PNG": ["L", "RGB", "RGBA", "P", "I;16", "1"]}.get(kind, ["L", "RGB"]))
    side = chance.choice([1, 8, 28, 300])
    image = Image.new(mode, (side, side), chance.randrange(2 if mode == "1" else 256))
    file = io.BytesIO()
    image.save(file, kind, **({"progressive": True} if kind == "JPEG" else {}))
    return file.getvalue()


IMAGES_OF_KINDS = ("PNG", "JPEG", "WEBP", "BMP")


def packed(chance: random.Random, pack: Callable[[Files], bytes], kind: str) -> bytes:
    """A good archive of pictures of one kind, in two classes."""
    names = [f"{folder}/{i}.{kind.lower()}" for folder in "ab" for i in range(2)]
    return pack({name: _picture(chance, kind) for name in names})


def _cut(packed: bytes, share: float) -> bytes:
    return packed[: int(len(packed) * share)]


IMAGES = st.integers(0, 255).map(_png)
NAMES = st.sampled_from([f"{folder}/{i}.png" for folder in "ab" for i in range(MOST_FILES)])
ODD_NAMES = st.sampled_from(["../out.png", "/etc/out.png", "a/b/c/d.png", "a"]) | st.text(
    min_size=1
)


def _uploads(pack: Callable[[Files], bytes]) -> st.SearchStrategy[bytes]:
    """Archives as they should be, with odd names or no images, cut short, or no archive at all."""
    good = st.dictionaries(NAMES, IMAGES, min_size=1, max_size=MOST_FILES)
    odd = st.dictionaries(NAMES | ODD_NAMES, IMAGES | st.binary(max_size=64), max_size=MOST_FILES)
    cut = st.builds(_cut, good.map(pack), st.floats(0, 1))
    return good.map(pack) | odd.map(pack) | cut | st.binary(max_size=64)


KINDS = ("application/zip", "application/x-tar", "application/gzip")
for kind, pack in zip(KINDS, PACKS, strict=True):
    schemathesis.openapi.media_type(kind, _uploads(pack))
