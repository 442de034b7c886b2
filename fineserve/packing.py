"""A directory of images as one upload."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def packed(images: Path) -> Iterator[IO[bytes]]:
    """An archive as it is; of a directory a tar of all files, of a dataset's splits `train`."""
    images = images.resolve()  # `.` has no name, and `..` none that a path in an archive may have
    if not images.is_dir():
        with images.open("rb") as archive:
            yield archive
        return
    if (images / "dataset_dict.json").exists() and (images / "train").is_dir():
        images = images / "train"
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            for path in sorted(images.rglob("*")):
                if path.is_file():
                    tar.add(path, path.relative_to(images.parent))
        file.seek(0)
        yield file
