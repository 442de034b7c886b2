"""Packing of images on the user's machine as one upload."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO

from learngenes.data.images import CLASSES_FILE, is_image
from learngenes.data.saved import is_saved, load_saved


@contextmanager
def packed(images: Path) -> Iterator[IO[bytes]]:
    """Open an archive as it is, or a directory as a tar of class folders.

    A saved Hugging Face dataset gives its split `train`. Raises DataError.
    """
    images = images.resolve()  # `.` has no name, and `..` none that a path in an archive may have
    if not images.is_dir():
        with images.open("rb") as archive:
            yield archive
        return
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            if is_saved(images):
                _add_saved(images, tar)
            else:
                _add_folders(images, tar)
        file.seek(0)
        yield file


def _add_folders(images: Path, tar: tarfile.TarFile) -> None:
    for path in sorted(images.rglob("*")):
        inside = path.relative_to(images)
        if path.is_file() and (is_image(inside) or inside == PurePath(CLASSES_FILE)):
            tar.add(path, path.relative_to(images.parent))


def _add_saved(path: Path, tar: tarfile.TarFile) -> None:
    """Add a folder per class, named by number: a class may have a name that no folder can."""
    rows, names = load_saved(path, decode=False)
    folders = {f"{number:05}": name for number, name in enumerate(names)}
    _add(tar, CLASSES_FILE, json.dumps(folders).encode())
    for row, (content, label) in enumerate(rows):  # of any format: its name says it is an image
        _add(tar, f"{label:05}/{row:07}.png", content)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
