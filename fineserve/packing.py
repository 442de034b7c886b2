"""Packing of images on the user's machine as one upload."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from learngenes.data.folders import (
    CLASSES_FILE,
    Skipped,
    class_folders,
    is_image,
    listed_classes,
    walked,
)
from learngenes.data.saved import is_saved, load_saved


@contextmanager
def packed(images: Path) -> Iterator[tuple[IO[bytes], list[Skipped]]]:
    """Open an archive as it is, or a directory as a tar of class folders, and what is left out.

    A saved Hugging Face dataset gives its split `train`. Raises DataError.
    """
    images = images.resolve()  # `.` has no name, and `..` none that a path in an archive may have
    if not images.is_dir():
        with images.open("rb") as archive:
            yield archive, []
        return
    with tempfile.TemporaryFile() as file:
        skipped: list[Skipped] = []
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            if is_saved(images):
                _add_saved(images, tar)
            else:
                skipped = _add_folders(images, tar)
        file.seek(0)
        yield file, skipped


def _add_folders(images: Path, tar: tarfile.TarFile) -> list[Skipped]:
    """Add the images of class folders; where they lie in the folder itself, that is their class."""
    files = walked(images)
    loose = any(len(path.parts) == 1 and is_image(path) for path in files)
    inside = PurePosixPath(images.name.lstrip(".") or "images") if loose else PurePosixPath()
    listed = images / CLASSES_FILE
    classes = None
    if listed.exists():
        classes = listed_classes(listed.read_bytes())
        tar.add(listed, CLASSES_FILE)
    found = class_folders([inside / path for path in files], classes)
    for path in found.labels:
        tar.add(images / path.relative_to(inside), str(path))
    return found.skipped


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
