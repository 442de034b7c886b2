"""A directory of images as one upload."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def packed(images: Path) -> Iterator[IO[bytes]]:
    """Of a directory, a tar with all of its files; an archive is opened."""
    if not images.is_dir():
        with images.open("rb") as archive:
            yield archive
        return
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in sorted(images.rglob("*")):
                if path.is_file():
                    tar.add(path, path.relative_to(images.parent))
        file.seek(0)
        yield file
